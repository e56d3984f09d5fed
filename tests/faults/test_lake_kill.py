"""kill -9 of a lake's writer at seeded moments; the relay's ledger and plain readers decide."""

from __future__ import annotations

import logging
import os
import signal
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from tests.faults.lakeruns import Globber, Lake, Run, judge, relay_for

if TYPE_CHECKING:
    from pathlib import Path

_logger = logging.getLogger(__name__)

KILLS, KILLS_CI, KILLS_FULL = 6, 14, 140


@pytest.mark.faults
@pytest.mark.timeout(1500)
async def test_killed_at_any_moment_a_folder_has_every_event_once(
    tmp_path: Path, *, full_campaign: bool
) -> None:
    await campaign(
        Lake.in_folder(tmp_path / "lake"),
        tmp_path,
        _size(KILLS, KILLS_CI, KILLS_FULL, full_campaign),
    )


def _size(usual: int, in_ci: int, full: int, full_campaign: bool) -> int:  # noqa: FBT001
    return full if full_campaign else in_ci if os.environ.get("CI") else usual


async def campaign(lake: Lake, folder: Path, kills: int) -> None:
    """Kill the writer again and again, every second time within a commit."""
    random = Random(20_261_126)
    ledger, log = folder / "ledger", folder / "log"
    moments = [random.uniform(0.05, 2.5) for _ in range(kills)]
    committed = within = 0
    async with relay_for(ledger, seed=7) as relay:
        environment = {**os.environ, **lake.environment}
        command = lake.produce(relay)
        with Globber(lake) as globber:
            async with Run(command, log, environment) as run:
                await until_committed(lake, run, 0)
            for number, moment in enumerate(moments):
                before = await seq_of(lake)
                async with Run(command, log, environment) as run:
                    await anyio.sleep(moment)
                    if number % 2:
                        await until_committed(lake, run, before)
                        await until_staged(lake, run)
                    assert run.code is None, run.said()[-3000:]
                    assert await run.kill() == -signal.SIGKILL
                staged = await anyio.to_thread.run_sync(lake.staged)
                within += bool(staged)
                committed += await seq_of(lake) > before
            async with Run(command, log, environment) as run:
                await until_committed(lake, run, await seq_of(lake))
                await until_marked(globber, run, 12)
                await run.stop()
        through = await seq_of(lake)
    verdict = await anyio.to_thread.run_sync(lambda: judge(lake, ledger, through=through))
    _logger.info(
        "%d kills, %d had committed, %d within a commit; %d events, %d hours marked, looks %s",
        *(kills, committed, within, verdict.delivered, len(globber.marked), dict(globber.looks)),
    )
    assert globber.wrong == []
    assert verdict.ok, str(verdict)
    assert verdict.delivered == verdict.demanded > 1000
    # A kill that hits nothing proves nothing, nor does a reader who never looks.
    assert committed >= kills / 3
    assert within >= kills / 4
    assert len(globber.marked) >= 6
    assert min(globber.looks.values()) > kills


async def seq_of(lake: Lake) -> int:
    record = await anyio.to_thread.run_sync(lake.newest_record)
    return max((one["next"] for one in record["inputs"].values()), default=0) if record else 0


async def until_committed(lake: Lake, run: Run, before: int) -> None:
    with anyio.fail_after(60):
        while await seq_of(lake) <= before:
            assert run.code is None, run.said()[-3000:]
            await anyio.sleep(0.05)


async def until_staged(lake: Lake, run: Run) -> None:
    """Wait until uploads are there that are not files yet: a commit is under way."""
    with anyio.fail_after(60):
        while not await anyio.to_thread.run_sync(lake.staged):
            assert run.code is None, run.said()[-3000:]
            await anyio.sleep(0.001)


async def until_marked(globber: Globber, run: Run, hours: int) -> None:
    with anyio.fail_after(120):
        while len(globber.marked) < hours:
            assert run.code is None, run.said()[-3000:]
            assert globber.wrong == []
            await anyio.sleep(0.2)
