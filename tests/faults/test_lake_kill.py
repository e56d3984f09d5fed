"""kill -9 of a lake's writer at seeded moments; the relay's ledger and plain readers decide."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from tests.faults.kafkaruns import Run
from tests.faults.lakeruns import (
    ROOTS,
    Globber,
    Lake,
    judge,
    relay_for,
    seq_of,
    staged,
    until_committed,
    until_marked,
    until_staged,
)
from tests.groups import SERVERS

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.testing.services.s3 import SeaweedServer

_logger = logging.getLogger(__name__)

# Beside another campaign, on two cores, both would only measure each other.
pytestmark = [pytest.mark.faults, pytest.mark.xdist_group(SERVERS), pytest.mark.timeout(1500)]

KILLS, KILLS_CI, KILLS_FULL = 4, 12, 120
KILLS_S3, KILLS_S3_CI, KILLS_S3_FULL = 3, 8, 80


async def test_killed_at_any_moment_a_bucket_has_every_event_once(
    tmp_path: Path, seaweed: SeaweedServer, *, full_campaign: bool
) -> None:
    lake = Lake.in_bucket(f"kill-{secrets.token_hex(4)}", seaweed)
    await campaign(lake, tmp_path, _size(KILLS_S3, KILLS_S3_CI, KILLS_S3_FULL, full_campaign))


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
    """Kill the writer again and again: at any moment, within a commit, within a compaction."""
    random = Random(20_261_126)
    ledger, log = folder / "ledger", folder / "log"
    moments = [random.uniform(0.05, 2.5) for _ in range(kills)]
    committed, within = 0, Counter[str]()
    async with relay_for(ledger, seed=7) as relay:
        command, environment = lake.produce(relay), lake.environment
        with Globber(lake) as globber:
            async with Run(command, log, environment) as run:
                await until_committed(lake, run, 0)
            for number, moment in enumerate(moments):
                before = await seq_of(lake)
                left = {root: await staged(lake, root) for root in ROOTS}
                async with Run(command, log, environment) as run:
                    await anyio.sleep(moment)
                    if number % 3:
                        await until_committed(lake, run, before)
                        root = ROOTS[number % 3 - 1]
                        await until_staged(lake, run, root, left[root])
                    assert run.code is None, run.said()[-3000:]
                    assert await run.kill() == -signal.SIGKILL
                for root in ROOTS:
                    within[root] += bool(await staged(lake, root) - left[root])
                committed += await seq_of(lake) > before
            async with Run(command, log, environment) as run:
                await until_committed(lake, run, await seq_of(lake))
                await until_marked(globber, run, 12)
                await run.stop()
        through = await seq_of(lake)
    verdict = await anyio.to_thread.run_sync(lambda: judge(lake, ledger, through=through))
    _logger.info(
        "%d kills, %d had committed, %d within a commit, %d within a compaction; "
        "%d events, %d hours marked, looks %s",
        *(kills, committed, *(within[root] for root in ROOTS)),
        *(verdict.delivered, len(globber.marked), dict(globber.looks)),
    )
    assert globber.wrong == []
    assert verdict.ok, str(verdict)
    assert verdict.delivered == verdict.demanded > 1000
    # A kill that hits nothing proves nothing, nor does a reader who never looks.
    assert committed >= kills / 3
    assert within["fresh"] >= kills / 6
    assert within["raw"] >= kills / 6
    assert len(globber.marked) >= 6
    assert min(globber.looks.values()) > kills
