"""The broker dies, stops, and comes late; the sink waits for it, and the ledger decides."""

from __future__ import annotations

import logging
import time
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec
import psutil
from tests.faults.kafkaruns import (
    CAMPAIGN,
    REPEATED,
    Follower,
    Pipeline,
    Run,
    end,
    judge,
    relay_for,
    until_further,
)

from blueflow.testing.relay import spawn
from blueflow.testing.services.kafka import KafkaBroker

if TYPE_CHECKING:
    from pathlib import Path

_logger = logging.getLogger(__name__)

FLAGS = ("--commit-interval", "0.1s")
UNAVAILABLE = 69
DEATHS, DEATHS_FULL = 1, 6
TIMEOUT_S = 5
RATE = 2000
STOP_S, STOP_FULL_S = 8.0, 60.0
RESIDENT_MAX = 200_000_000
LAG_MAX_S = 1.0  # behind the relay, when all is well again

pytestmark = CAMPAIGN


async def test_a_broker_that_is_killed_and_comes_back_costs_nothing(
    tmp_path: Path, fresh_kafka: KafkaBroker, *, full_campaign: bool
) -> None:
    random = Random(20_261_129)
    ledger, back_s = tmp_path / "ledger", []
    async with relay_for(ledger, seed=13) as relay:
        pipeline = Pipeline.new(relay.url, fresh_kafka.bootstrap)
        command = pipeline.command(*FLAGS, "--transaction-timeout", f"{TIMEOUT_S}s")
        with Follower(pipeline) as follower:
            async with Run(command, tmp_path / "log") as run:
                await until_further(follower, run)
                for number in range(DEATHS_FULL if full_campaign else DEATHS):
                    await anyio.sleep(random.uniform(0, 0.5))
                    try:
                        await fresh_kafka.kill()
                        # Kafka takes some seconds more to start. The client's own patience bridges
                        # the short ones; the others outlast the transaction.
                        await anyio.sleep(random.uniform(0, 1) + TIMEOUT_S * (number % 2 == 0))
                    finally:
                        await fresh_kafka.start()
                    back_s.append(await until_further(follower, run, within_s=60))
                through = await end(run, follower)
        await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    _logger.info("%d deaths; on after %.1f s at most", len(back_s), max(back_s))
    assert REPEATED in run.said()


async def test_memory_is_bounded_while_the_broker_stands_still(
    tmp_path: Path, fresh_kafka: KafkaBroker, *, full_campaign: bool
) -> None:
    stop_s = STOP_FULL_S if full_campaign else STOP_S
    flags = () if full_campaign else ("--transaction-timeout", f"{TIMEOUT_S}s")
    ledger = tmp_path / "ledger"
    relay = spawn(
        rate=RATE, retention=int(RATE * (stop_s + 60)), cycle=4000, ledger=ledger, seed=14
    )
    async with relay:
        pipeline = Pipeline.new(relay.url, fresh_kafka.bootstrap)
        with Follower(pipeline) as follower:
            async with Run(pipeline.command(*flags), tmp_path / "log") as run:
                await until_further(follower, run)
                began_s = time.monotonic()
                peak = 0
                fresh_kafka.suspend()
                try:
                    while time.monotonic() < began_s + stop_s:
                        await anyio.sleep(0.25)
                        assert run.code is None, run.said()[-3000:]
                        peak = max(peak, resident(run))
                finally:
                    fresh_kafka.resume()
                woke_s = time.monotonic()
                await until_further(follower, run, within_s=90)
                on_s = time.monotonic() - woke_s
                with anyio.fail_after(180):
                    while await anyio.to_thread.run_sync(lag_s, follower, ledger) > LAG_MAX_S:
                        assert run.code is None, run.said()[-3000:]
                        peak = max(peak, resident(run))
                        await anyio.sleep(0.25)
                level_s = time.monotonic() - woke_s
                through = await end(run, follower)
        events = await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    kicked = relay.summary["kicked"]
    _logger.info(
        "stood still for %.0f s; on after %.1f s, level after %.1f s; %d bytes at most; "
        "%d events; given up by the relay %d times",
        *(stop_s, on_s, level_s, peak, events, kicked),
    )
    assert REPEATED in run.said()
    assert 10_000_000 < peak < RESIDENT_MAX


async def test_a_broker_that_comes_late_is_waited_for(
    tmp_path: Path, kafka_jars: Path, *, full_campaign: bool
) -> None:
    ledger, broker = tmp_path / "ledger", KafkaBroker()
    try:
        async with relay_for(ledger, seed=15) as relay:
            pipeline = Pipeline.new(relay.url, broker.bootstrap)
            impatient = pipeline.command(*FLAGS, "--connect-wait", "1s")
            async with Run(impatient, tmp_path / "impatient") as run:
                assert await run.ended(30) == UNAVAILABLE, run.said()
            async with Run(
                pipeline.command(*FLAGS, "--connect-wait", "60s"), tmp_path / "log"
            ) as run:
                await anyio.sleep(3)
                assert run.code is None, run.said()
                await broker.start()
                with Follower(pipeline) as follower:
                    await until_further(follower, run)
                    through = await end(run, follower)
            await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    finally:
        await broker.close()


def resident(run: Run) -> int:
    return psutil.Process(run.process.pid).memory_info().rss


def lag_s(follower: Follower, ledger: Path) -> float:
    """Return how far the durable position is behind what the relay has issued."""
    with ledger.open("rb") as file:
        file.seek(max(0, ledger.stat().st_size - 20_000))
        lines = file.read().splitlines()[1:-1]  # whole ones
    return (msgspec.json.decode(lines[-1])["seq"] - follower.catch_up().seq) / RATE
