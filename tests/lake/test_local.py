"""A lake's store in a folder: on disks that fail, fill, lose power, and hold what is not ours."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import anyio
import pytest

from blueflow.errors import OutputIOError, OutputNotWritableError, UploadGoneError
from blueflow.files.disk import Disk
from blueflow.lake import local
from blueflow.lake.layout import Shard, fresh_key
from blueflow.lake.local import LocalStore
from blueflow.testing.faults import Faults
from blueflow.testing.powerloss import PowerLossDisk, PowerLossError
from blueflow.testing.watcheddisk import WatchedDisk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blueflow.lake.logrecord import Staged

PATIENCE_S = 20
KEY = fresh_key(Shard("night"), 1, "posts", 495_000)
RECORD = "_blueflow/logs/night/0-of-1/999999999999-000000000001.json"
DATA = Random(1).randbytes(10_000)
SEEDS = range(12)


async def opened(root: Path, disk: Disk | None = None) -> LocalStore:
    store = LocalStore(root, disk)
    await store.open(create=True)
    return store


async def put(store: LocalStore) -> None:
    assert await store.put_new(RECORD, DATA)


async def publish(store: LocalStore) -> None:
    await store.complete(await store.stage(KEY, DATA))


@pytest.mark.parametrize("step", [put, publish])
async def test_a_disk_that_fails_at_any_change_has_all_or_nothing(
    tmp_path: Path, step: Callable[[LocalStore], Awaitable[None]]
) -> None:
    key = RECORD if step is put else KEY
    for call in count(1):
        root = tmp_path / str(call)
        await (await opened(root)).close()
        faults = Faults(call, OSError(errno.EIO, os.strerror(errno.EIO)))
        store = LocalStore(root, WatchedDisk(faults.step, synced=False))
        failed = ""
        try:
            await step(store)
        except OutputIOError as error:
            failed = str(error)
        await store.close()
        store = await opened(root)
        assert await store.get(key) in ({None, DATA} if failed else {DATA})
        assert len(await store.list("")) <= 1
        for pending in await store.uploads(""):
            await store.abort(pending)
        await step(store)
        assert await store.get(key) == DATA
        assert await store.uploads("") == []
        await store.close()
        if not faults.fired:
            return
        assert not failed or "Input/output error" in failed


class Failing(Disk):
    """Fails in one call, with one error."""

    def __init__(self, call: str, code: int) -> None:
        self._call, self._code, self.fired = call, code, 0

    def write(self, descriptor: int, data: bytes) -> None:
        super().write(descriptor, data[: len(data) // 2])  # a full disk takes a part
        self._fail("write")
        super().write(descriptor, data[len(data) // 2 :])

    def sync(self, descriptor: int) -> None:
        self._fail("sync")
        super().sync(descriptor)

    def sync_folder(self, path: Path) -> None:
        self._fail("sync_folder")
        super().sync_folder(path)

    def _fail(self, call: str) -> None:
        if call == self._call:
            self.fired += 1
            raise OSError(self._code, os.strerror(self._code))


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("write", errno.ENOSPC, "No space left on device"),
        ("sync", errno.EIO, "Input/output error"),
        ("sync_folder", errno.EIO, "Input/output error"),
    ],
)
async def test_what_could_not_be_stored_is_not_staged(
    tmp_path: Path, call: str, code: int, said: str
) -> None:
    await (await opened(tmp_path / "lake")).close()
    disk = Failing(call, code)
    store = LocalStore(tmp_path / "lake", disk)
    with pytest.raises(OutputIOError, match=said):
        await store.stage(KEY, DATA)
    assert disk.fired == 1
    assert await store.uploads("") == []
    with pytest.raises(OutputIOError, match=said):
        await store.put_new(RECORD, DATA)
    assert disk.fired == 2
    # Its name may be there when only its folder could not be synced; its content is whole.
    assert await store.get(RECORD) in {None, DATA}
    assert (call == "sync_folder") == bool(await store.list(""))
    await store.close()


@pytest.mark.parametrize("step", [put, publish])
@pytest.mark.parametrize("seed", SEEDS)
async def test_power_that_goes_at_any_call_leaves_what_was_acknowledged(
    step: Callable[[LocalStore], Awaitable[None]], seed: int
) -> None:
    root, random = Path("/lake"), Random(seed)
    key = RECORD if step is put else KEY
    for crash_at in count(1):
        disk = PowerLossDisk(crash_at)
        done = crashed = False
        staged: Staged | None = None
        store = LocalStore(root, disk)
        try:
            await store.open(create=True)
            if step is put:
                await put(store)
            else:
                staged = await store.stage(KEY, DATA)
                await store.complete(staged)
            done = True
        except PowerLossError:
            crashed = True
        await store.close()
        store = LocalStore(root, disk.after_power_loss(lambda: random.random() < 0.5))
        await store.open(create=True)
        assert await store.get(key) in ({DATA} if done else {None, DATA})
        if staged is not None:
            await store.complete(staged)
            assert await store.get(key) == DATA
        await store.close()
        if not crashed:
            return


@pytest.mark.parametrize("damage", ["cut off", "another content"])
async def test_a_staged_file_that_a_crash_damaged_is_not_completed(
    tmp_path: Path, damage: str
) -> None:
    store = await opened(tmp_path / "lake")
    staged = await store.stage(KEY, DATA)
    await store.close()
    (hidden,) = (tmp_path / "lake" / "_blueflow" / "staging").iterdir()
    hidden.write_bytes(DATA[:-1] if damage == "cut off" else DATA[:-1] + b"\0")
    store = await opened(tmp_path / "lake")
    with pytest.raises(UploadGoneError):
        await store.complete(staged)
    assert await store.get(KEY) is None
    await store.close()


async def test_whoever_completes_second_finds_it_done(tmp_path: Path) -> None:
    """Another process links the file and tidies up, just after we saw that it is staged."""

    class Overtaken(Disk):
        fired = 0

        def sha256(self, path: Path) -> str:
            checksum = super().sha256(path)
            (tmp_path / "lake" / KEY).parent.mkdir(parents=True)
            path.rename(tmp_path / "lake" / KEY)
            self.fired += 1
            return checksum

    first = await opened(tmp_path / "lake")
    staged = await first.stage(KEY, DATA)
    disk = Overtaken()
    second = await opened(tmp_path / "lake", disk)
    await second.complete(staged)
    assert disk.fired == 1
    assert await second.get(KEY) == DATA
    await first.close()
    await second.close()


async def test_a_copy_without_empty_folders_is_a_lake(tmp_path: Path) -> None:
    store = await opened(tmp_path / "lake")
    (tmp_path / "lake" / "_blueflow" / "staging").rmdir()
    await put(store)
    await publish(store)
    assert [one.key for one in await store.list("")] == [RECORD, KEY]
    await store.close()


async def test_a_file_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    store = await opened(tmp_path / "lake")
    staged = await store.stage(KEY, DATA)
    await store.put_new(KEY, b"of another size")
    with pytest.raises(OutputIOError, match="a file that is not ours has the name"):
        await store.complete(staged)
    assert await store.get(KEY) == b"of another size"
    await store.close()


async def test_a_reader_of_a_folder_changes_nothing_and_a_writer_says_why_it_cannot(
    tmp_path: Path,
) -> None:
    store = await opened(tmp_path / "lake")
    await put(store)
    await publish(store)
    await store.close()
    root = await anyio.Path(tmp_path / "lake").absolute()
    faults = Faults()

    def refuse() -> None:
        faults.step()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    store = LocalStore(Path(root), WatchedDisk(refuse))
    await store.open(create=False)
    assert await store.get(KEY) == DATA
    assert [one.key for one in await store.list("")] == [RECORD, KEY]
    assert await store.folders("") == ["_blueflow", "fresh"]
    assert await store.head(KEY) is not None
    assert await store.uploads("") == []
    assert faults.calls == 0
    with pytest.raises(OutputIOError, match="Read-only file system"):
        await store.put_new("raw/a", b"")
    with pytest.raises(OutputIOError, match="Read-only file system"):
        await store.stage("raw/a", b"")
    with pytest.raises(OutputNotWritableError, match="Read-only file system"):
        await store.open(create=True)
    assert faults.calls > 2
    await store.close()


async def test_a_folder_that_is_missing_is_made_by_writers_only(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "lake")
    with pytest.raises(OutputNotWritableError, match="there is no such folder"):
        await store.open(create=False)
    assert not (tmp_path / "lake").exists()
    await store.open(create=True)
    assert (tmp_path / "lake").is_dir()
    await store.close()
    (tmp_path / "file").touch()
    for name in ("no/parent", "file", "file/lake"):
        store = LocalStore(tmp_path / name)
        with pytest.raises(OutputNotWritableError):
            await store.open(create=True)
        await store.close()


async def test_foreign_files_and_folders_are_listed_and_do_no_harm(tmp_path: Path) -> None:
    root = tmp_path / "lake"
    store = await opened(root)
    await publish(store)
    hour = (root / KEY).parent
    (hour / "foreign").mkdir()
    (hour / "foreign" / "notes.txt").write_text("mine")
    (hour / "circle").symlink_to(hour)
    (hour / "dangling").symlink_to(hour / "nowhere")
    (hour / "linked.parquet").symlink_to(root / KEY)
    os.mkfifo(hour / "pipe")
    (hour / os.fsdecode(b"\xff\xfe")).write_bytes(b"no UTF-8")
    (root / "_blueflow" / "staging" / "notes.txt").write_text("mine")
    (root / "_blueflow" / "staging" / "folder").mkdir()
    names = [one.key.removeprefix(KEY[: KEY.rindex("/") + 1]) for one in await store.list("fresh/")]
    own = KEY.rpartition("/")[2]
    assert names == ["foreign/notes.txt", "linked.parquet", own, os.fsdecode(b"\xff\xfe")]
    assert [one.key for one in await store.list(KEY)] == [KEY]
    assert await store.uploads("") == []
    assert await store.get(KEY.rpartition("/")[0]) is None  # a folder is no object
    assert await store.get(f"{KEY}/below") is None
    await store.delete([KEY])
    assert (hour / "foreign" / "notes.txt").read_text() == "mine"
    await store.close()


async def test_folders_of_ours_go_with_their_last_file_and_come_back(tmp_path: Path) -> None:
    root = tmp_path / "lake"
    store = await opened(root)
    for _ in range(2):
        await publish(store)
        await store.delete([KEY])
        assert list((root / "fresh" / "posts").iterdir()) == []
        await store.delete([KEY])
    await store.close()


async def test_a_folder_that_is_tidied_up_just_before_a_link_is_made_again(tmp_path: Path) -> None:
    class Tidied(Disk):
        fired = 0

        def link(self, existing: Path, new: Path) -> None:
            if new.suffix == ".parquet" and not self.fired:
                self.fired += 1
                new.parent.rmdir()
            super().link(existing, new)

    disk = Tidied()
    store = await opened(tmp_path / "lake", disk)
    await publish(store)
    assert await store.get(KEY) == DATA
    assert disk.fired == 1
    await store.close()


async def test_a_disk_that_hangs_holds_up_neither_cancellation_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "CLOSE_WAIT_S", 0.05)
    goes_on, hangs = threading.Event(), threading.Event()

    class Hanging(Disk):
        def sync(self, descriptor: int) -> None:
            hangs.set()
            goes_on.wait(PATIENCE_S)
            super().sync(descriptor)

    store = await opened(tmp_path / "lake", Hanging())
    waiting = asyncio.ensure_future(store.put_new(RECORD, DATA))
    with anyio.fail_after(PATIENCE_S):
        await anyio.to_thread.run_sync(partial(hangs.wait, PATIENCE_S))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await store.close()
        await store.close()
    thread = store._worker._thread
    assert thread is not None
    assert thread.daemon
    goes_on.set()
    await anyio.to_thread.run_sync(thread.join)
    assert (tmp_path / "lake" / RECORD).read_bytes() == DATA  # it was done to its end
