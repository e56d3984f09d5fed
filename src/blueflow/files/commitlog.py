"""A commit log in a local folder: files become visible together, with their positions, or never."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from blueflow.errors import CommitLogError, InvariantError
from blueflow.files.logformat import (
    LogFile,
    LogRecord,
    decode_record,
    encode_record,
    hidden_name,
    plan_recovery,
    record_name,
    record_numbers,
    unlink_order,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.files.disk import Disk

RECORDS_KEPT: Final = 10_000  # a week of one a minute; only the last one is ever needed
_TRIES: Final = 3  # a reader tidies up now and then, not all the time
_TAKEN: Final = "it is no file of this log but has the name of one"


class CommitLog:
    """Commits files into `root`; the bookkeeping stands in `folder` (`root/_blueflow`).

    A commit takes these steps, each durable before the next: the files are written in
    `folder/hidden`; a copy of the record is written there; the copy is linked as
    `folder/log/<number>.json`, which decides the commit (a link is made whole, and only if the name
    is free); the files are linked into their places; the hidden names are removed, the copy first.
    A crash before the decision leaves hidden files that nobody names, a crash after it leaves a
    copy that says what to complete.

    The caller holds the folder's lock. After an error only reading is allowed: open a new log.
    """

    def __init__(
        self,
        root: Path,
        disk: Disk,
        *,
        folder: Path | None = None,
        records_kept: int = RECORDS_KEPT,
    ) -> None:
        self._root, self._disk = root, disk
        self.folder = folder or root / "_blueflow"
        self._records, self._hidden = self.folder / "log", self.folder / "hidden"
        self._records_kept = records_kept
        self._numbers: list[int] = []
        self.last: LogRecord | None = None

    def read_last(self) -> LogRecord | None:
        """Read the last record, and remember it as `last`. Changes nothing.

        Raises:
            CommitLogError: the last record is damaged, or half of the bookkeeping is gone.
            OSError: the folder cannot be read.
        """
        self._numbers = record_numbers(self._disk.names(self._records) or ())
        self.last = None
        if self._numbers:
            number = self._numbers[-1]
            path = self._records / record_name(number)
            self.last = decode_record(str(path), number, self._disk.read(path))
            if self._disk.names(self._hidden) is None:
                raise CommitLogError(str(self._hidden), "it is missing, the log beside it is not")
        return self.last

    def recover(self) -> None:
        """Complete the last record and remove what no record names.

        Raises:
            CommitLogError: a file of the last record is lost or damaged; nothing was changed.
            OSError: the disk failed; call again after a restart.
        """
        disk = self._disk
        for folder in (self._root, self.folder, self._records, self._hidden):
            disk.make_folder(folder)
        with suppress(PermissionError):  # one that may be entered, not listed, is not ours to sync
            disk.sync_folder(self._root.parent)
        for folder in (self._root, self.folder):
            disk.sync_folder(folder)
        plan = plan_recovery(
            self.last,
            disk.names(self._hidden) or (),
            lambda name: disk.size(self._hidden / name),
            lambda path: disk.size(self._root / path),
        )
        for file in plan.link:
            if disk.sha256(self._hidden / file.hidden) != file.sha256:
                raise CommitLogError(str(self._hidden / file.hidden), "its checksum is wrong")
        # On a full disk each step may need the room that the one before it made, the try most of
        # all: on a tmpfs a link costs as much as a file.
        self._unlink(plan.free)
        self._link(plan.link)
        # A file that is in its place may be so in memory only: the crash came before the fsync.
        self._sync_places(self.last.files if self.last else ())
        self._unlink(plan.unlink)
        self._expire()
        self._try_link()

    def hidden_path(self, index: int) -> Path:
        """Return where file `index` (from 0) of the next commit is written."""
        return self._hidden / hidden_name(self._next_number(), index)

    def decide(self, files: Sequence[LogFile], head: dict[str, Any]) -> LogRecord:
        """Make the next record durable: from here on the commit happens, whatever happens.

        Args:
            files: written, synced and closed, at their hidden places.
            head: what the writer needs to go on from here, and what readers may want to know.

        Raises:
            CommitLogError: a name is taken or the record exists: nothing was decided. Somebody
                else writes here, or somebody removed a record.
            OSError: the disk failed; whether the commit happens is known after a restart.
        """
        disk, record = self._disk, LogRecord(self._next_number(), tuple(files), head)
        if [file.hidden for file in record.files] != [
            hidden_name(record.number, index) for index in range(len(record.files))
        ]:
            raise InvariantError(f"commit {record.number} takes its own hidden files in order")
        for file in record.files:  # once it is decided, every start would fail at this name
            if disk.size(self._root / file.path) is not None:
                raise CommitLogError(str(self._root / file.path), _TAKEN)
        name = record_name(record.number)
        descriptor = disk.create(self._hidden / name)
        try:
            disk.write(descriptor, encode_record(record))
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.sync_folder(self._hidden)  # the names of the files and of the copy, before the record
        try:
            disk.link(self._hidden / name, self._records / name)
        except FileExistsError as error:
            raise CommitLogError(str(self._records / name), "it exists already") from error
        disk.sync_folder(self._records)
        self.last = record
        self._numbers.append(record.number)
        return record

    def publish(self) -> None:
        """Link the files of the last record into their places.

        Raises:
            CommitLogError: a name is taken already.
            OSError: the disk failed; `recover` completes it after a restart.
        """
        record = self.last
        if record is None:
            raise InvariantError("a commit is decided before it is published")
        self._link(record.files)
        self._sync_places(record.files)
        names = [*(file.hidden for file in record.files), record_name(record.number)]
        self._unlink(unlink_order(names))
        self._expire()

    def _try_link(self) -> None:
        """Find out now, not at the first commit, whether the disk is writable and knows links."""
        first, second = (self._hidden / hidden_name(0, index) for index in range(2))
        self._disk.close(self._disk.create(first))
        self._disk.link(first, second)
        self._disk.unlink(second)
        self._disk.unlink(first)

    def _next_number(self) -> int:
        return self.last.number + 1 if self.last else 1

    def _link(self, files: Sequence[LogFile]) -> None:
        for file in files:
            for tries_left in reversed(range(_TRIES)):
                try:
                    self._link_one(file)
                    break
                except FileNotFoundError:  # a reader tidied up a folder just before the link
                    if not tries_left:
                        raise

    def _link_one(self, file: LogFile) -> None:
        for folder in self._places([file]):
            self._disk.make_folder(folder)
        try:
            self._disk.link(self._hidden / file.hidden, self._root / file.path)
        except FileExistsError as error:
            raise CommitLogError(str(self._root / file.path), _TAKEN) from error

    def _sync_places(self, files: Sequence[LogFile]) -> None:
        for folder in reversed(self._places(files)):
            with suppress(FileNotFoundError):  # a reader may tidy up empty folders
                self._disk.sync_folder(folder)

    def _places(self, files: Sequence[LogFile]) -> list[Path]:
        """Return every folder from the root down to the files, parents first."""
        places = {
            self._root / parent for file in files for parent in PurePosixPath(file.path).parents
        }
        return sorted(places, key=lambda path: (len(path.parts), path))

    def _unlink(self, names: Sequence[str]) -> None:
        for name in names:
            self._disk.unlink(self._hidden / name)
        if names:
            self._disk.sync_folder(self._hidden)

    def _expire(self) -> None:
        while len(self._numbers) > self._records_kept:
            with suppress(FileNotFoundError):  # somebody else may tidy up old records too
                self._disk.unlink(self._records / record_name(self._numbers[0]))
            del self._numbers[0]
