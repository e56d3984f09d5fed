"""Two processes for one pipeline, and one that slept too long: Kafka fences, the ledger decides."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from tests.faults.kafkaruns import (
    CAMPAIGN,
    CLEANUP,
    Follower,
    Pipeline,
    Run,
    aborted_records,
    end,
    judge,
    relay_for,
    stop_inside_a_transaction,
    until,
    until_further,
)

from blueflow.testing.services.kafka import KafkaBroker

if TYPE_CHECKING:
    from pathlib import Path

_logger = logging.getLogger(__name__)

ZOMBIES, ZOMBIES_FULL = 2, 20
RACES, RACES_FULL = 1, 6
PAUSES, PAUSES_FULL = 1, 5
REFUSED = 78  # tells a supervisor not to start it again
FLAGS = ("--commit-interval", "0.1s", "--commit-bytes-max", "64KiB", "--connect-wait", "30s")
ABORT_S, END_S, RACE_S = 20.0, 30.0, 60.0

pytestmark = CAMPAIGN


async def test_a_zombie_that_wakes_up_ends_and_its_successor_goes_on(
    tmp_path: Path, kafka: KafkaBroker, *, full_campaign: bool
) -> None:
    """Each process is the successor of the one before, which was stopped at a seeded moment."""
    zombies = ZOMBIES_FULL if full_campaign else ZOMBIES
    random = Random(20_261_126)
    ledger = tmp_path / "ledger"
    async with relay_for(ledger, seed=8) as relay, AsyncExitStack() as processes:
        pipeline = Pipeline.new(relay.url, kafka.bootstrap)
        follower = processes.enter_context(Follower(pipeline))
        runs = [Run(pipeline.command(*FLAGS), tmp_path / f"log{n}") for n in range(zombies + 1)]
        await processes.enter_async_context(runs[0])
        await until_further(follower, runs[0])
        for number, (zombie, successor) in enumerate(pairwise(runs)):
            await anyio.sleep(random.uniform(0, 0.5))
            if number % 2:
                zombie.send(signal.SIGSTOP)
            else:
                await stop_inside_a_transaction(zombie, follower)
            await processes.enter_async_context(successor)
            await until_further(follower, successor)
            zombie.send(signal.SIGCONT)
            assert await zombie.ended(END_S) == REFUSED, zombie.said()[-3000:]
            assert "BF-225" in zombie.said()
            await until_further(follower, successor)
        through = await end(runs[-1], follower)
    events = await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    _logger.info("%d zombies, %d events", zombies, events)
    assert await anyio.to_thread.run_sync(aborted_records, pipeline) > zombies / 2


async def test_of_two_supervised_processes_one_stays(
    tmp_path: Path, kafka: KafkaBroker, *, full_campaign: bool
) -> None:
    random = Random(20_261_127)
    for race in range(RACES_FULL if full_campaign else RACES):
        folder = tmp_path / str(race)
        folder.mkdir()
        took_s = await race_of_two(folder, kafka.bootstrap, random.choice((0.0, 0.05, 0.3, 1.0)))
        _logger.info("race %d: one was left after %.1f s", race, took_s)


async def race_of_two(folder: Path, bootstrap: str, apart_s: float) -> float:
    """Start two at once, each started again unless its exit code forbids it."""
    ledger = folder / "ledger"
    async with relay_for(ledger, seed=9) as relay:
        pipeline = Pipeline.new(relay.url, bootstrap)
        with Follower(pipeline) as follower:
            # What is delivered before the first commit of all is not asked for again.
            async with Run(pipeline.command(*FLAGS), folder / "first") as first:
                await until_further(follower, first)
            both = [Supervised(pipeline, folder / f"log{number}") for number in range(2)]
            async with anyio.create_task_group() as tasks:
                began_s = time.monotonic()
                for one in both:
                    tasks.start_soon(one.run)
                    await anyio.sleep(apart_s)
                await until(lambda: any(one.given_up for one in both), within_s=RACE_S)
                took_s = time.monotonic() - began_s
                (winner,) = (one for one in both if not one.given_up)
                await until_further(follower, winner.process)
                assert not winner.codes, winner.codes  # it was never started again
                winner.leave_off()
                through = await end(winner.process, follower)
    (loser,) = (one for one in both if one.given_up)
    assert loser.codes[-1] == REFUSED
    await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    return took_s


class Supervised:
    """What a service manager does: starts it again, whatever the exit code, except for one."""

    def __init__(self, pipeline: Pipeline, log: Path) -> None:
        self._command, self._log = pipeline.command(*FLAGS), log
        self._stopping = False
        self.process = Run(self._command, log)
        self.codes: list[int] = []
        self.given_up = False

    async def run(self) -> None:
        while not self._stopping and not self.given_up:
            self.process = Run(self._command, self._log)
            async with self.process as process:
                self.codes.append(await process.process.wait())
            self.given_up = self.codes[-1] == REFUSED

    def leave_off(self) -> None:
        self._stopping = True


async def test_one_that_slept_past_the_transaction_timeout_goes_on(
    tmp_path: Path, kafka_jars: Path, *, full_campaign: bool
) -> None:
    pauses = PAUSES_FULL if full_campaign else PAUSES
    random = Random(20_261_128)
    ledger = tmp_path / "ledger"
    async with (
        KafkaBroker(properties={CLEANUP: "500"}) as broker,
        relay_for(ledger, seed=10) as relay,
    ):
        pipeline = Pipeline.new(relay.url, broker.bootstrap)
        command = pipeline.command(*FLAGS, "--transaction-timeout", "1s")
        with Follower(pipeline) as follower:
            async with Run(command, tmp_path / "log") as run:
                await until_further(follower, run)
                for _ in range(pauses):
                    await anyio.sleep(random.uniform(0, 0.5))
                    await stop_inside_a_transaction(run, follower)
                    await until(lambda: not follower.held_back(), within_s=ABORT_S)
                    run.send(signal.SIGCONT)
                    await until_further(follower, run)
                through = await end(run, follower)
                # Awake, it finds that its own time is up, or what the broker did: both rebuild.
                assert '"a transaction failed and is repeated"' in run.said()
        assert await anyio.to_thread.run_sync(aborted_records, pipeline) >= pauses
        await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
