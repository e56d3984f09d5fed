"""kill -9 of the Kafka sink at seeded moments; the relay's ledger and librdkafka decide."""

from __future__ import annotations

import logging
import os
import signal
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from tests.faults.kafkaruns import (
    Follower,
    Pipeline,
    Run,
    aborted_records,
    end,
    judge,
    relay_for,
    stays_open,
    stop_inside_a_transaction,
    until,
    until_further,
)
from tests.groups import SERVERS

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.testing.services.kafka import KafkaBroker

_logger = logging.getLogger(__name__)

KILLS, KILLS_CI, KILLS_FULL = 8, 20, 200
SETTLED_S = 10.0  # how long a commit that was under way may take to show in all partitions
# A transaction is open for some milliseconds, ten times a second. So every second kill is aimed.
FLAGS = ("--commit-interval", "0.1s", "--commit-bytes-max", "64KiB", "--connect-wait", "30s")


@pytest.mark.faults
@pytest.mark.xdist_group(SERVERS)
@pytest.mark.timeout(1500)
async def test_killed_at_any_moment_nothing_is_lost_or_twice(
    tmp_path: Path, kafka: KafkaBroker, *, full_campaign: bool
) -> None:
    kills = KILLS_FULL if full_campaign else KILLS_CI if os.environ.get("CI") else KILLS
    random = Random(20_261_125)
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    moments = [random.uniform(0.05, 1.7) for _ in range(kills)]
    committed = left_open = 0
    async with relay_for(ledger, seed=7) as relay:
        pipeline = Pipeline.new(relay.url, kafka.bootstrap)
        command = pipeline.command(*FLAGS)
        with Follower(pipeline) as follower:
            # A live start becomes a position with its first commit; from there on all is kept.
            async with Run(command, log) as first:
                await until_further(follower, first)
            for number, moment in enumerate(moments):
                before = follower.seq
                async with Run(command, log) as run:
                    await anyio.sleep(moment)
                    if number % 4 == 3:  # else most would hit the start
                        await until_further(follower, run)
                    if number % 2:
                        await stop_inside_a_transaction(run, follower)
                    assert run.code is None, run.said()[-3000:]
                    assert await run.kill() == -signal.SIGKILL
                left_open += await anyio.to_thread.run_sync(stays_open, follower)
                await until(lambda: agrees(follower), within_s=SETTLED_S)
                committed += follower.seq > before
            async with Run(command, log) as last:
                await until_further(follower, last)
                through = await end(last, follower)
            assert await anyio.to_thread.run_sync(agrees, follower)
    events = await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    aborted = await anyio.to_thread.run_sync(aborted_records, pipeline)
    _logger.info(
        "%d kills, %d had committed, %d left a transaction open; %d records aborted, %d events",
        *(kills, committed, left_open, aborted, events),
    )
    # A kill that hits nothing proves nothing.
    assert committed >= kills / 4
    assert left_open >= kills // 2
    assert aborted > left_open


def agrees(follower: Follower) -> bool:
    """Whether the newest cursor that can be read is that of the newest event that can be read."""
    follower.catch_up()
    return follower.seq == follower.newest_seq
