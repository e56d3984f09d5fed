"""The commit log against a disk that loses power anywhere, and the verdicts on damage."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.errors import CommitLogError, InvariantError
from blueflow.files.commitlog import CommitLog
from blueflow.files.disk import Disk
from blueflow.files.logformat import (
    LogFile,
    LogRecord,
    decode_record,
    encode_record,
    plan_recovery,
    record_name,
    record_numbers,
)
from blueflow.testing.powerloss import PowerLossDisk, PowerLossError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path("/out")
Contents = dict[str, bytes]


def commit(log: CommitLog, disk: Disk, contents: Contents) -> None:
    files = []
    for index, (path, content) in enumerate(contents.items()):
        hidden = log.hidden_path(index)
        descriptor = disk.create(hidden)
        disk.write(descriptor, content)
        disk.sync(descriptor)
        disk.close(descriptor)
        digest = hashlib.sha256(content).hexdigest()
        files.append(LogFile(path, hidden.name, len(content), 1, digest))
    log.decide(files, {"note": len(contents)})
    log.publish()


def opened(disk: Disk, root: Path = ROOT, records_kept: int = 10_000) -> CommitLog:
    log = CommitLog(root, disk, records_kept=records_kept)
    log.read_last()
    log.recover()
    return log


def visible(disk: PowerLossDisk) -> Contents:
    return {
        str(path.relative_to(ROOT)): content
        for path, content in disk.files().items()
        if path.is_relative_to(ROOT) and "_blueflow" not in path.parts
    }


commits = st.lists(
    st.dictionaries(
        st.sampled_from(["posts/hour=1", "posts/hour=2", "likes/hour=1"]),
        st.binary(min_size=1, max_size=6),
        max_size=3,
    ),
    min_size=1,
    max_size=4,
)


@given(commits, st.data())
def test_power_loss_anywhere_leaves_whole_commits_or_none(
    plans: list[Contents], data: st.DataObject
) -> None:
    numbered: Sequence[Contents] = [
        {f"{folder}/{number}": content for folder, content in plan.items()}
        for number, plan in enumerate(plans, start=1)
    ]
    disk, promised = PowerLossDisk(data.draw(st.integers(1, 60), label="first loss")), 0
    for loss in range(4):  # the power may go again during the recovery
        done = 0
        try:
            log = opened(disk, records_kept=2)
            done = log.last.number if log.last else 0
            assert done >= promised, "a commit that was reported is gone"
            assert visible(disk) == merged(numbered[:done])
            for plan in numbered[done:]:
                disk.before_each = lambda disk=disk: check_reader(disk, numbered)  # type: ignore[misc]
                commit(log, disk, plan)
                assert log.last is not None
                promised = log.last.number
        except PowerLossError:
            seed = data.draw(st.integers(0, 2**32), label="what survives")
            chance = random.Random(seed)
            disk = disk.after_power_loss(lambda chance=chance: chance.random() < 0.5)  # type: ignore[misc]
            crash_at = data.draw(st.integers(1, 60), label="next loss") if loss < 2 else 0
            disk._crash_at = crash_at
            continue
        break
    assert visible(disk) == merged(numbered)


def merged(plans: Sequence[Contents]) -> Contents:
    return {path: content for plan in plans for path, content in plan.items()}


def check_reader(disk: PowerLossDisk, plans: Sequence[Contents]) -> None:
    """What a reader finds at this very moment is whole."""
    whole = merged(plans)
    assert all(whole.get(path) == content for path, content in visible(disk).items())


def test_what_a_reader_moved_away_neither_comes_back_nor_is_missed() -> None:
    """After the publication the power may go at once: the hidden names stay removed."""
    disk = PowerLossDisk()
    commit(opened(disk), disk, {"posts/hour=1/1": b"content"})
    disk.unlink(ROOT / "posts/hour=1/1")
    disk.sync_folder(ROOT / "posts/hour=1")
    after = disk.after_power_loss(lambda: False)
    opened(after)
    assert visible(after) == {}


def test_killed_while_it_tidies_up_a_commit_is_not_called_lost() -> None:
    """The first hidden name that goes is the record's copy, which says what has to be there."""
    contents = {"posts/hour=1/1": b"content", "likes/hour=1/1": b"more"}
    moved = 0
    for crash_at in range(1, 100):
        disk = PowerLossDisk(crash_at)
        try:
            commit(opened(disk), disk, contents)
        except PowerLossError:
            after = disk.after_power_loss(lambda: True)  # a kill: the kernel goes on
            hidden = after.names(ROOT / "_blueflow/hidden") or []
            if visible(after) == contents and len(hidden) <= len(contents):
                moved += 1
                for path in contents:
                    after.unlink(ROOT / path)
            opened(after)
    assert moved == 3


def test_the_model_disk_loses_what_was_not_synced() -> None:
    disk = PowerLossDisk()
    disk.make_folder(ROOT)
    disk.sync_folder(Path("/"))
    descriptor = disk.create(ROOT / "a")
    disk.write(descriptor, b"content")
    disk.sync_folder(ROOT)
    assert disk.after_power_loss(lambda: False).files() == {ROOT / "a": b""}
    disk.sync(descriptor)
    disk.link(ROOT / "a", ROOT / "b")
    assert disk.after_power_loss(lambda: False).files() == {ROOT / "a": b"content"}
    disk.unlink(ROOT / "a")
    assert disk.after_power_loss(lambda: True).files() == {ROOT / "b": b"content"}


@pytest.mark.parametrize("call", ["sync", "sync_folder"])
def test_the_property_finds_a_missing_sync(call: str) -> None:
    """A disk that forgets to sync has to lose something, or the property proves nothing."""
    losses = 0
    for crash_at in range(1, 80):
        disk = PowerLossDisk(crash_at)
        setattr(disk, call, lambda _: None)
        done = 0
        try:
            log = opened(disk)
            for number in range(1, 4):
                commit(log, disk, {f"posts/hour=1/{number}": b"content"})
                done = number
        except PowerLossError:
            pass
        after = disk.after_power_loss(lambda: False)
        try:
            last = CommitLog(ROOT, after).read_last()
            losses += (last.number if last else 0) < done
        except CommitLogError:
            losses += 1
    assert losses > 10


def test_records_expire_and_the_last_one_stays(tmp_path: Path) -> None:
    disk, root = Disk(), tmp_path / "out"
    log = opened(disk, root, records_kept=3)
    for number in range(1, 8):
        commit(log, disk, {f"posts/{number}": b"x"})
    records = sorted(path.name for path in (root / "_blueflow" / "log").iterdir())
    assert records == [record_name(number) for number in (5, 6, 7)]
    again = opened(disk, root, records_kept=1)
    assert again.last is not None
    assert again.last.number == 7
    assert [path.name for path in (root / "_blueflow" / "log").iterdir()] == [record_name(7)]


def test_a_commit_takes_its_own_hidden_files(tmp_path: Path) -> None:
    log = opened(Disk(), tmp_path / "out")
    with pytest.raises(InvariantError, match="own hidden files"):
        log.decide([LogFile("posts/1", "000000000002-0000.part", 1, 1, "")], {})
    with pytest.raises(InvariantError, match="decided before"):
        log.publish()


def test_a_second_writer_of_the_same_record_is_found_out(tmp_path: Path) -> None:
    disk, root = Disk(), tmp_path / "out"
    first, second = opened(disk, root), opened(disk, root)
    commit(first, disk, {"posts/1": b"x"})
    with pytest.raises(CommitLogError, match="exists already"):
        commit(second, disk, {"posts/2": b"y"})


def test_a_foreign_file_in_our_place_is_not_overwritten(tmp_path: Path) -> None:
    disk, root = Disk(), tmp_path / "out"
    log = opened(disk, root)
    (root / "posts").mkdir()
    (root / "posts" / "1").write_bytes(b"mine")
    with pytest.raises(CommitLogError, match="name of one"):
        commit(log, disk, {"posts/1": b"x"})
    assert (root / "posts" / "1").read_bytes() == b"mine"


def test_a_copy_of_a_folder_without_links_recovers(tmp_path: Path) -> None:
    """`cp -r` in the middle of a publication makes two files of one."""
    disk, root = Disk(), tmp_path / "out"
    log = opened(disk, root)
    log.decide([_written(disk, log, b"content")], {})
    (root / "posts").mkdir()
    (root / "posts" / "1").write_bytes(b"content")
    again = opened(disk, root)
    assert again.last is not None
    assert (root / "posts" / "1").read_bytes() == b"content"
    assert list((root / "_blueflow" / "hidden").iterdir()) == []


def test_foreign_names_are_left_alone(tmp_path: Path) -> None:
    disk, root = Disk(), tmp_path / "out"
    opened(disk, root)
    for name in ("hidden/notes.txt", "hidden/000000000009-0001.part.bak", "log/x.json"):
        (root / "_blueflow" / name).write_text("mine")
    (root / "_blueflow/hidden/000000000009-0001.part").write_text("ours")
    log = opened(disk, root)
    assert log.last is None
    assert not (root / "_blueflow/hidden/000000000009-0001.part").exists()
    assert len(list((root / "_blueflow").glob("*/*"))) == 3


RECORD = LogRecord(3, (LogFile("posts/h/3.zst", "000000000003-0000.part", 5, 1, "ab"),), {"n": 1})
WHOLE = encode_record(RECORD)


def test_a_record_comes_back_as_it_was() -> None:
    assert decode_record("x", 3, WHOLE) == RECORD


@given(st.integers(0, len(WHOLE) - 2))
def test_a_cut_record_is_damaged(size: int) -> None:
    with pytest.raises(CommitLogError):
        decode_record("x", 3, WHOLE[:size])


@given(st.integers(0, len(WHOLE) - 2), st.integers(1, 255))
def test_a_changed_byte_is_found(place: int, change: int) -> None:
    """JSON has other spellings of the same value; every other change is damage."""
    changed = bytearray(WHOLE)
    changed[place] ^= change
    try:
        assert decode_record("x", 3, bytes(changed)) == RECORD
    except CommitLogError:
        return


@given(st.binary(max_size=300))
def test_garbage_is_damaged(garbage: bytes) -> None:
    with pytest.raises(CommitLogError):
        decode_record("x", 3, garbage)


@pytest.mark.parametrize("path", ["/etc/x", "../x", "posts/../../x"])
def test_a_record_names_no_file_outside(path: str) -> None:
    file = LogFile(path, "000000000003-0000.part", 5, 1, "")
    with pytest.raises(CommitLogError, match="outside the folder"):
        decode_record("x", 3, encode_record(LogRecord(3, (file,), {})))


def test_a_record_under_another_number_is_damaged() -> None:
    with pytest.raises(CommitLogError, match="record 3"):
        decode_record("x", 4, WHOLE)


def test_numbers_are_read_from_names_alone() -> None:
    names = ["000000000010.json", "000000000002.json", "10.json", "x", "000000000011.json.bak"]
    assert record_numbers(names) == [2, 10]


@pytest.mark.parametrize(
    ("hidden_size", "visible_size", "pending", "verdict"),
    [
        (5, None, True, "link"),
        (5, 5, True, "done"),
        (None, 5, True, "done"),
        (None, None, True, "lost"),
        (4, None, True, "4 bytes"),
        (5, 4, True, "4 bytes"),
        (None, 5, False, "done"),
        (None, None, False, "done"),  # a reader moved it away
        (5, None, False, "done"),
        (None, 4, False, "4 bytes"),
    ],
)
def test_each_state_of_a_file_has_its_verdict(
    *, hidden_size: int | None, visible_size: int | None, pending: bool, verdict: str
) -> None:
    names = [*([record_name(3)] if pending else []), "000000000004-0000.part"]
    if verdict in ("link", "done"):
        plan = plan_recovery(RECORD, names, lambda _: hidden_size, lambda _: visible_size)
        assert plan.link == (RECORD.files if verdict == "link" else ())
        assert plan.unlink == tuple(names[:-1])
        assert plan.free == ("000000000004-0000.part",)
    else:
        with pytest.raises(CommitLogError, match=verdict):
            plan_recovery(RECORD, names, lambda _: hidden_size, lambda _: visible_size)


def _written(disk: Disk, log: CommitLog, content: bytes) -> LogFile:
    hidden = log.hidden_path(0)
    descriptor = disk.create(hidden)
    disk.write(descriptor, content)
    disk.sync(descriptor)
    disk.close(descriptor)
    digest = hashlib.sha256(content).hexdigest()
    return LogFile("posts/1", hidden.name, len(content), 1, digest)


def test_a_place_that_is_taken_is_refused_before_anything_is_decided(tmp_path: Path) -> None:
    disk, root = Disk(), tmp_path / "out"
    log = opened(disk, root)
    (root / "posts").mkdir()
    (root / "posts" / "1").write_bytes(b"mine")
    with pytest.raises(CommitLogError, match="name of one"):
        commit(log, disk, {"likes": b"x", "posts/1": b"x"})
    again = opened(disk, root)
    assert again.last is None
    commit(again, disk, {"likes": b"x", "posts/2": b"x"})
    assert (root / "posts" / "1").read_bytes() == b"mine"


class FullDisk(Disk):
    """A disk with room for so many more names; each costs as much, as links do on a tmpfs."""

    def __init__(self, room: int = 0) -> None:
        self.room = room

    def create(self, path: Path) -> int:
        self._take()
        return super().create(path)

    def link(self, existing: Path, new: Path) -> None:
        self._take()
        super().link(existing, new)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.room += 1

    def _take(self) -> None:
        if not self.room:
            raise OSError(errno.ENOSPC, "no space left on device")
        self.room -= 1


def test_what_a_crash_left_makes_room_for_the_next_start(tmp_path: Path) -> None:
    log = opened(Disk(), tmp_path)
    for index in range(2):
        log.hidden_path(index).write_bytes(b"taken, not committed")
    assert opened(FullDisk(), tmp_path).last is None
    assert list((tmp_path / "_blueflow" / "hidden").iterdir()) == []
    with pytest.raises(OSError, match="no space"):
        opened(FullDisk(), tmp_path)


def test_a_decided_commit_is_completed_before_anything_new_is_tried(tmp_path: Path) -> None:
    disk = Disk()
    (tmp_path / "posts").mkdir()
    log = opened(disk, tmp_path)
    log.decide([_written(disk, log, b"content")], {})
    with pytest.raises(OSError, match="no space"):
        opened(FullDisk(), tmp_path)
    assert not (tmp_path / "posts" / "1").exists()
    opened(FullDisk(room=1), tmp_path)  # for the segment; then its hidden names make room
    assert (tmp_path / "posts" / "1").read_bytes() == b"content"
    assert list((tmp_path / "_blueflow" / "hidden").iterdir()) == []


def test_what_a_crash_left_of_a_published_commit_makes_room_too(tmp_path: Path) -> None:
    """Killed while it tidied up: the record's copy is gone, its segments' hidden names are not."""
    disk = Disk()
    log = opened(disk, tmp_path)
    for number in (1, 2):
        commit(log, disk, {f"posts/{number}": b"content"})
    for index in range(2):
        (tmp_path / "_blueflow/hidden" / f"000000000002-{index:04}.part").write_bytes(b"content")
    opened(FullDisk(), tmp_path)
    assert list((tmp_path / "_blueflow" / "hidden").iterdir()) == []


def test_a_damaged_log_keeps_what_a_crash_left(tmp_path: Path) -> None:
    disk = Disk()
    log = opened(disk, tmp_path)
    file = _written(disk, log, b"content")
    log.decide([file], {})
    log.hidden_path(0).write_bytes(b"a later one, not committed")
    for damage in (b"Content", b"short"):
        (tmp_path / "_blueflow" / "hidden" / file.hidden).write_bytes(damage)
        names = sorted(path.name for path in (tmp_path / "_blueflow" / "hidden").iterdir())
        with pytest.raises(CommitLogError):
            opened(disk, tmp_path)
        assert names == sorted(path.name for path in (tmp_path / "_blueflow/hidden").iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_the_folder_above_may_be_one_that_cannot_be_listed(tmp_path: Path, code: int) -> None:
    disk = FolderAboveDisk(tmp_path, code)
    for path in ("posts/1", "posts/2"):
        commit(opened(disk, tmp_path / "out"), disk, {path: b"x"})
        assert (tmp_path / "out" / path).read_bytes() == b"x"
    assert disk.asked == 2


def test_a_disk_that_cannot_sync_the_folder_above_is_not_relied_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="out"):
        opened(FolderAboveDisk(tmp_path, errno.EIO), tmp_path / "out")


def test_the_folder_of_an_earlier_start_that_was_killed_outlives_a_power_loss() -> None:
    """It was made and not synced: that it is there does not mean that it stays."""
    disk = PowerLossDisk()
    disk.make_folder(ROOT)
    commit(opened(disk), disk, {"posts/1": b"x"})
    assert visible(disk.after_power_loss(lambda: False)) == {"posts/1": b"x"}


@pytest.mark.parametrize("call", ["make_folder", "link", "sync_folder"])
def test_a_reader_may_tidy_up_at_any_moment(tmp_path: Path, call: str) -> None:
    """Segments are moved away and empty folders removed, just before a call that needs them."""
    places = ["posts/hour=1/1", "posts/hour=2/1", "likes/hour=1/1"]
    for moment in range(1, 100):
        root = tmp_path / str(moment)
        disk = TidiedDisk(root, call, moment)
        log = opened(disk, root)
        disk.armed = True
        commit(log, disk, dict.fromkeys(places, b"content"))
        commit(log, disk, {"posts/hour=2/2": b"more"})
        kept = [path for path in root.glob("*/hour=*/*") if path.is_file()]
        assert len(kept) + len(disk.moved) == len(places) + 1
        again = opened(Disk(), root)
        assert again.last is not None
        assert again.last.number == 2
        if disk.armed:  # the moment lies behind the last call
            assert moment > 3
            return


class TidiedDisk(Disk):
    """A disk whose reader takes everything away before one call, and every empty folder."""

    def __init__(self, root: Path, call: str, moment: int) -> None:
        self._root, self._call, self._left = root, call, moment
        self.armed = False
        self.moved: list[Path] = []

    def make_folder(self, path: Path) -> None:
        self._tidy("make_folder", path)
        super().make_folder(path)

    def link(self, existing: Path, new: Path) -> None:
        self._tidy("link", new)
        super().link(existing, new)

    def sync_folder(self, path: Path) -> None:
        self._tidy("sync_folder", path)
        super().sync_folder(path)

    def _tidy(self, call: str, path: Path) -> None:
        ours = path == self._root or "_blueflow" in path.parts
        if not self.armed or call != self._call or ours:
            return
        self._left -= 1
        if self._left:
            return
        self.armed = False
        for segment in self._root.glob("*/hour=*/*"):
            segment.unlink()
            self.moved.append(segment)
        for folder in [*self._root.glob("*/hour=*"), *self._root.glob("[!_]*")]:
            folder.rmdir()


class FolderAboveDisk(Disk):
    """A disk that cannot sync the folder above the output."""

    def __init__(self, path: Path, code: int) -> None:
        self._path, self._code = path, code
        self.asked = 0

    def sync_folder(self, path: Path) -> None:
        if path == self._path:
            self.asked += 1
            raise OSError(self._code, os.strerror(self._code), "out")
        super().sync_folder(path)
