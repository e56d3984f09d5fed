"""A disk that fails to sync, and one that is full, under a lake; the ledger decides."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.faults.kafkaruns import Run
from tests.faults.lakeruns import Lake, judge, relay_for, seq_of, until_committed
from tests.groups import SERVERS

from blueflow.errors import OutputIOError, OutputNotWritableError
from blueflow.events import Position
from blueflow.lake.local import LocalStore
from blueflow.lake.writer import LakeWriter
from blueflow.testing.faults import Faults
from blueflow.testing.samples import contract_events
from blueflow.testing.watcheddisk import WatchedDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blueflow.events import Event

SYNCS, SYNCS_FULL = (40,), (1, 5, 9, 14, 22, 31, 40, 55, 70, 90)
EVERY, EVERY_FULL = 9, 1
SOURCE = "disk.example"
CANNOT_WRITE = 73

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group(SERVERS), pytest.mark.timeout(900)]


@pytest.mark.needs("strace")
async def test_an_fsync_that_fails_ends_the_run_and_costs_nothing(
    tmp_path: Path, *, full_campaign: bool
) -> None:
    for number in SYNCS_FULL if full_campaign else SYNCS:
        folder = tmp_path / str(number)
        folder.mkdir()
        ledger, log, lake = folder / "ledger", folder / "log", Lake.in_folder(folder / "lake")
        fail = f"inject=fsync:error=EIO:when={number}"
        strace = [
            "strace",
            "-f",
            "-qq",
            "-o",
            str(folder / "trace"),
            "-e",
            "trace=fsync",
            "-e",
            fail,
        ]
        async with relay_for(ledger, seed=number) as relay:
            async with Run([*strace, *lake.produce(relay)], log) as run:
                assert await run.ended(60) == CANNOT_WRITE, run.said()[-2000:]
                assert "Input/output error" in run.said()
            assert "(INJECTED)" in (folder / "trace").read_text()
            before = await seq_of(lake)
            # A run that ended before its first commit has no place to go on from.
            more = () if before else ("--cursor", "oldest")
            async with Run(lake.produce(relay, *more), log) as run:
                await until_committed(lake, run, before)
                await run.stop()
            through = await seq_of(lake)
        verdict = judge(lake, ledger, through=through)
        assert verdict.ok, str(verdict)
        assert verdict.delivered == verdict.demanded > 0


async def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(tmp_path: Path) -> None:
    """On a tmpfs of its own; what was committed before can be read all the time."""
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    with small_disk(tmp_path / "disk", "1m") as (disk, resize):
        lake = Lake.in_folder(disk / "lake")
        async with relay_for(ledger, seed=3) as relay:
            for room in ("2m", "3m", "64m"):
                async with Run(lake.produce(relay, "--compaction", "off"), log) as run:
                    assert await run.ended(60) == CANNOT_WRITE, run.said()[-2000:]
                    assert "No space left on device" in run.said()
                    assert run.said().splitlines()[-1].startswith("BF-208: ")
                through = await seq_of(lake)
                verdict = judge(lake, ledger, through=through)
                assert verdict.ok, str(verdict)
                resize(room)
            async with Run(lake.produce(relay), log) as run:
                await until_committed(lake, run, await seq_of(lake))
                await run.stop()
            through = await seq_of(lake)
        verdict = judge(lake, ledger, through=through)
    assert verdict.ok, str(verdict)
    assert verdict.delivered == verdict.demanded > 1000


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Yield a tmpfs that lives in a mount namespace of its own, and what makes it larger."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder} && echo mounted && exec cat"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    with subprocess.Popen(unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"mounted\n"

            def resize(size: str) -> None:
                enter = ["nsenter", "--target", str(holder.pid), "--user", "--mount"]
                remount = ["mount", "-o", f"remount,size={size}", str(folder)]
                subprocess.run([*enter, *remount], check=True)

            yield Path(f"/proc/{holder.pid}/root{folder}"), resize
        finally:
            holder.stdin.close()


async def test_a_disk_that_fails_at_any_call_costs_nothing(
    tmp_path: Path, *, full_campaign: bool
) -> None:
    """Every call that changes the disk fails once, in the middle of writes too."""
    events = contract_events(SOURCE, 12, step_us=900_000_000)
    failed = 0
    for number in range(1, 10_000, EVERY_FULL if full_campaign else EVERY):
        folder = tmp_path / str(number)
        faults = Faults(number, OSError(5, "Input/output error"))
        try:
            await write(LocalStore(folder, WatchedDisk(faults.step, synced=False)), events)
        except (OutputIOError, OutputNotWritableError):
            failed += 1
        await write(LocalStore(folder), events)
        stored = Lake.in_folder(folder)
        ids = [
            (row["seq"], row["op_index"])
            for path in stored.files("fresh")
            for row in stored.table(path, ["seq", "op_index"]).to_pylist()
        ]
        assert sorted(ids) == sorted((event.seq, event.op_index) for event in events), number
        if not faults.fired:
            break
    assert failed > 100 / (1 if full_campaign else EVERY)


async def write(store: LocalStore, events: list[Event]) -> None:
    sink = LakeWriter("folder", origin_source=SOURCE, store=store, compaction=False)
    try:
        positions = await sink.resume()
        after = positions[SOURCE].seq if positions else 0
        for end in (4, 8, 12):
            batch = [event for event in events if after < event.seq <= end]
            if batch:
                await sink.write(batch, through=Position(SOURCE, end, batch[-1].time_us))
                await sink.flush()
            after = max(after, end)
    finally:
        await sink.close()
