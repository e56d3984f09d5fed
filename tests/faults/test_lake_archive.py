"""kill -9, sleep and division of the archive, which reads Kafka; the relay's ledger decides."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from confluent_kafka import IsolationLevel
from tests.faults.kafkaruns import Follower, Pipeline, Run, end, until_further
from tests.faults.lakeruns import (
    KEEP_FRESH_S,
    LATENESS_S,
    ROOTS,
    Globber,
    Lake,
    judge,
    relay_for,
    seq_sum,
    staged,
    until_staged,
)
from tests.groups import SERVERS

if TYPE_CHECKING:
    from blueflow.testing.services.kafka import KafkaBroker

_logger = logging.getLogger(__name__)

RUNNER = Path(__file__).parents[2] / "runners" / "archive.py"
KILLS, KILLS_CI, KILLS_FULL = 3, 10, 100
SLEEPS, SLEEPS_FULL = 1, 10


@pytest.mark.faults
@pytest.mark.xdist_group(SERVERS)
@pytest.mark.timeout(1800)
async def test_killed_asleep_or_divided_the_archive_has_every_event_once(
    tmp_path: Path, kafka: KafkaBroker, *, full_campaign: bool
) -> None:
    kills = KILLS_FULL if full_campaign else KILLS_CI if os.environ.get("CI") else KILLS
    sleeps = SLEEPS_FULL if full_campaign else SLEEPS
    random = Random(20_261_126)
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    lake = Lake.in_folder(tmp_path / "lake")
    committed, within = 0, Counter[str]()
    async with relay_for(ledger, seed=11) as relay:
        pipeline = Pipeline.new(relay.url, kafka.bootstrap)
        produce = pipeline.command("--commit-interval", "0.1s")
        archive = command(pipeline, lake)
        with Follower(pipeline) as follower, Globber(lake) as globber:
            async with Run(produce, tmp_path / "produce.log") as producer:
                await until_further(follower, producer)
                for number in range(kills):
                    before = await seq_sum(lake)
                    left = {root: await staged(lake, root) for root in ROOTS}
                    async with Run(archive, log) as run:
                        await anyio.sleep(random.uniform(0.05, 3))
                        if number % 3:
                            await until_archived(lake, run, before)
                            root = ROOTS[number % 3 - 1]
                            await until_staged(lake, run, root, left[root])
                        assert run.code is None, run.said()[-3000:]
                        assert await run.kill() == -signal.SIGKILL
                    for root in ROOTS:
                        within[root] += bool(await staged(lake, root) - left[root])
                    committed += await seq_sum(lake) > before
                for _ in range(sleeps):
                    await a_sleeper_is_fenced(lake, archive, tmp_path)
                halves = [[*archive, "--shard", f"{at}/2"] for at in range(2)]
                async with AsyncExitStack() as running:
                    whole = await running.enter_async_context(Run(archive, tmp_path / "whole.log"))
                    await until_archived(lake, whole, await seq_sum(lake))
                    first = await running.enter_async_context(Run(halves[0], tmp_path / "0.log"))
                    assert await whole.ended(30) == 78
                    assert "another number of shards" in whole.said()
                    async with Run(halves[1], tmp_path / "1.log") as second:
                        await until_archived(lake, second, await seq_sum(lake))
                        await second.kill()
                    through = await end(producer, follower)
                    second = await running.enter_async_context(Run(halves[1], tmp_path / "1.log"))
                    ends = await anyio.to_thread.run_sync(ends_of, follower)
                    await until_all(lake, [first, second], ends)
                    await first.stop()
                    await second.stop()
    verdict = await anyio.to_thread.run_sync(lambda: judge(lake, ledger, through=through))
    _logger.info(
        "%d kills, %d had committed, %d within a commit, %d within a compaction, %d sleepers; "
        "%d events, %d hours marked",
        *(kills, committed, *(within[root] for root in ROOTS), sleeps),
        *(verdict.delivered, len(globber.marked)),
    )
    assert globber.wrong == []
    assert verdict.ok, str(verdict)
    assert verdict.delivered == verdict.demanded > 1000
    assert committed >= kills / 4
    assert min(within.values()) >= kills // 6


def command(pipeline: Pipeline, lake: Lake) -> list[str]:
    return [
        *(sys.executable, str(RUNNER), "--lake", lake.url, "--log-format", "json"),
        *("--kafka-bootstrap-servers", pipeline.bootstrap, "--topic-prefix", pipeline.prefix),
        *("--commit-interval", "0.2s", "--prometheus-port", "0"),
        *("--lateness", f"{LATENESS_S}s", "--keep-fresh", f"{KEEP_FRESH_S}s"),
    ]


async def a_sleeper_is_fenced(lake: Lake, archive: list[str], folder: Path) -> None:
    """Stop a process, start its successor, and let the first go on."""
    async with Run(archive, folder / f"sleeper-{secrets.token_hex(2)}.log") as sleeper:
        await until_archived(lake, sleeper, await seq_sum(lake))
        sleeper.send(signal.SIGSTOP)
        async with Run(archive, folder / "successor.log") as successor:
            await until_archived(lake, successor, await seq_sum(lake))
            sleeper.send(signal.SIGCONT)
            assert await sleeper.ended(30) == 78, sleeper.said()[-3000:]
            assert "BF-245" in sleeper.said()
            await until_archived(lake, successor, await seq_sum(lake))
            await successor.stop()


async def until_archived(lake: Lake, run: Run, before: int) -> None:
    with anyio.fail_after(90):
        while await seq_sum(lake) <= before:
            assert run.code is None, run.said()[-3000:]
            await anyio.sleep(0.05)


def ends_of(follower: Follower) -> dict[str, int]:
    found = follower._ends(IsolationLevel.READ_COMMITTED)
    return {
        f"{topic}/{number}": end
        for (topic, number), end in found.items()
        if end and not topic.endswith(("cursor", "dlq"))
    }


async def until_all(lake: Lake, runs: list[Run], ends: dict[str, int]) -> None:
    """Wait until every partition is read to its end."""
    with anyio.fail_after(120):
        while True:
            inputs = await anyio.to_thread.run_sync(lake.inputs)
            if all(inputs.get(name, 0) >= end for name, end in ends.items()):
                return
            for run in runs:
                assert run.code is None, run.said()[-3000:]
            await anyio.sleep(0.2)
