"""Topics that several write to: one dies inside a transaction, and the others go on."""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path

import anyio
import anyio.to_thread
from confluent_kafka import Producer
from tests.faults.kafkaruns import (
    CAMPAIGN,
    CLEANUP,
    Follower,
    Pipeline,
    Run,
    end,
    judge,
    relay_for,
    stop_inside_a_transaction,
    until,
    until_further,
)

from blueflow.testing.services.kafka import KafkaBroker

_logger = logging.getLogger(__name__)

NEIGHBOUR = Path(__file__).parent / "dying_neighbour.py"
FLAGS = ("--commit-interval", "0.1s")
READABLE_S = 30.0  # what the documentation promises, with defaults on both sides
# In full with the defaults: the timeout, and how often a broker looks for transactions past it.
TIMEOUT_S, TIMEOUT_FULL_S = 3, 15
SHORT = {CLEANUP: "500"}

pytestmark = CAMPAIGN


async def test_a_neighbour_that_dies_inside_a_transaction_holds_us_up_for_a_while_only(
    tmp_path: Path, kafka_jars: Path, *, full_campaign: bool
) -> None:
    timeout_s = TIMEOUT_FULL_S if full_campaign else TIMEOUT_S
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    async with (
        KafkaBroker(properties={} if full_campaign else SHORT) as broker,
        relay_for(ledger, seed=11) as relay,
    ):
        pipeline = Pipeline.new(relay.url, broker.bootstrap)
        command = pipeline.command(*FLAGS)
        topics = (pipeline.cursor, f"{pipeline.prefix}posts")
        neighbour = [
            *(sys.executable, str(NEIGHBOUR), broker.bootstrap, str(timeout_s * 1000)),
            *topics,
        ]
        with Follower(pipeline) as follower:
            async with Run(command, log) as run:
                await until_further(follower, run)
                await run.stop()
            # Nobody can read the topic of the cursors to its end, so we cannot begin yet.
            await dead(neighbour, tmp_path / "neighbour")
            assert {(topic, 0) for topic in topics} <= follower.held_back()
            async with Run(command, log) as run:
                started_s = await until_further(follower, run, within_s=60)
                # And now it dies while we write, behind which nobody can read what we commit.
                await dead(neighbour, tmp_path / "neighbour")
                died_s = time.monotonic()
                assert (pipeline.cursor, 0) in follower.held_back()
                await until_further(follower, run, within_s=READABLE_S)
                readable_s = time.monotonic() - died_s
                through = await end(run, follower)
        await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    _logger.info("%.1f s until our start was done", started_s)
    _logger.info("%.1f s until others were readable", readable_s)
    for held_s in (started_s, readable_s):
        assert timeout_s * 0.8 < held_s < READABLE_S  # less would mean that nothing was held up


async def test_others_are_readable_soon_after_we_died_inside_a_transaction(
    tmp_path: Path, kafka_jars: Path, *, full_campaign: bool
) -> None:
    timeout_s = TIMEOUT_FULL_S if full_campaign else TIMEOUT_S
    flags = () if full_campaign else ("--transaction-timeout", f"{timeout_s}s")
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    async with (
        KafkaBroker(properties={} if full_campaign else SHORT) as broker,
        relay_for(ledger, seed=12) as relay,
    ):
        pipeline = Pipeline.new(relay.url, broker.bootstrap)
        with Follower(pipeline) as follower:
            async with Run(pipeline.command(*FLAGS, *flags), log) as run:
                await until_further(follower, run)
                await stop_inside_a_transaction(run, follower, but=pipeline.cursor)
                await run.kill()
            died_s = time.monotonic()
            events = [one for one in follower.held_back() if one[0] != pipeline.cursor]
            topic, partition = events[0]
            before = follower.catch_up().records
            other = Producer({"bootstrap.servers": broker.bootstrap})
            other.produce(topic, value=b'{"seq":0}', partition=partition)
            assert other.flush(10) == 0
            assert follower.catch_up().records == before  # held up, as it should be here
            await until(lambda: follower.catch_up().records > before, within_s=READABLE_S)
            readable_s = time.monotonic() - died_s
            assert follower.records == before + 1  # what we had not committed stays unseen
    _logger.info("%.1f s until others were readable", readable_s)
    assert timeout_s * 0.8 < readable_s < READABLE_S


async def dead(command: list[str], log: Path) -> None:
    async with Run(command, log) as run:
        assert await run.ended(30) == -signal.SIGKILL, run.said()
