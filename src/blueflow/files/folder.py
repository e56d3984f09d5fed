"""The output folder of the `jsonl` sink: events in, committed segments out. Blocks; one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from blueflow.errors import BlueflowError, CommitLogError, InvariantError, OtherSourceError
from blueflow.events import encode_lines, family
from blueflow.files.commitlog import CommitLog
from blueflow.files.disk import output_error
from blueflow.files.layout import (
    SIMULATED_MARK,
    SIMULATED_TEXT,
    Head,
    check_origin,
    commit_of,
    data_kind,
    decode_head,
    holds_segments,
    hours_of,
    newest_hours,
    segment_path,
)
from blueflow.files.lock import FolderLock
from blueflow.files.segments import Segment
from blueflow.records import DATASETS, dataset_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from blueflow.events import Event, Position
    from blueflow.files.disk import Disk
    from blueflow.files.logformat import LogFile

SEGMENTS_OPEN_MAX: Final = 32  # about 2 MB of memory and one descriptor each; usual are 6 to 12
_EVENTS_AT_ONCE: Final = (
    500  # encoded in one piece: the interpreter is ours for about a millisecond
)


class JsonlFolder:
    """One writer's view of an output folder.

    `take` collects events in hidden segments, `commit` makes them visible together with the
    position that covers them. After an error every call raises that error again: the state on the
    disk is then known only to the next start.
    """

    def __init__(
        self,
        root: Path,
        disk: Disk,
        *,
        pipeline: str,
        source: str,
        simulated: bool,
        segments_open_max: int = SEGMENTS_OPEN_MAX,
    ) -> None:
        self._root, self._disk = root, disk
        self._pipeline, self._source, self._simulated = pipeline, source, simulated
        self._segments_open_max = segments_open_max
        self._log = CommitLog(root, disk)
        self._lock = FolderLock(self._log.folder / "lock")
        self._positions: dict[str, dict[str, Position]] = {}
        self._pending: dict[str, Position] = {}  # written, not committed
        self._open: dict[tuple[str, int], Segment] = {}
        self._parts: dict[tuple[str, int], int] = {}
        self._finished: list[LogFile] = []
        self._rows = 0
        self._ready = False
        self._error: BlueflowError | None = None
        self.uncommitted_bytes = 0  # of wire JSON
        self.durable: Mapping[str, Position] = {}

    @property
    def dirty(self) -> bool:
        """Whether a commit would change anything."""
        return bool(self._rows) or any(
            self.durable.get(source) != position for source, position in self._pending.items()
        )

    def open(self) -> Mapping[str, Position]:
        """Lock the folder, check whose it is, repair what a crash left, return the positions.

        Raises:
            OutputNotWritableError, OutputLockedError, OtherSourceError, CommitLogError,
            OutputIOError: nothing that was there is changed.
        """
        try:
            self._disk.make_folder(self._root)
            self._check_mark()  # before anything of ours is made in somebody else's folder
            self._disk.make_folder(self._log.folder)
            self._lock.acquire()
            self._check_log()
            self._log.recover()
            self._mark()
        except OSError as error:
            self._lock.release()
            self._error = output_error(self._root, error, starting=True)
            raise self._error from error
        except BlueflowError as error:
            self._lock.release()
            self._error = error
            raise
        self._ready = True
        self.durable = dict(self._positions.get(self._pipeline, {}))
        return self.durable

    def take(self, events: Sequence[Event], through: Position) -> None:
        """Add events and the position that covers them to the next commit.

        Raises:
            OutputIOError: the disk failed.
            InvariantError: the position goes back or belongs to another source.
        """
        self._check_usable()
        try:
            before_us = self._check_position(through)
            for (dataset, hour), group in _grouped(events, before_us, through.time_us).items():
                self._write(dataset, hour, group)
        except OSError as error:
            self._error = output_error(self._root, error)
            raise self._error from error
        except BlueflowError as error:
            self._error = error
            raise
        self._rows += len(events)
        self._pending[through.source] = through

    @property
    def full(self) -> bool:
        """Whether so many segments are open that the commit should come now."""
        return len(self._open) + len(self._finished) >= self._segments_open_max

    def commit(self) -> None:
        """Make everything taken durable and visible; nothing to do is no commit.

        Raises:
            OutputIOError: the disk failed.
            OutputLockedError, CommitLogError: somebody else changed the folder.
        """
        self._check_usable()
        if not self.dirty:
            return
        try:
            self._lock.check()
            while self._open:
                self._finish_oldest()
            mine = {**self.durable, **self._pending}
            positions = {**self._positions, self._pipeline: mine}
            head = Head(
                self._pipeline, family(self._source), self._simulated, self._rows, positions
            )
            self._log.decide(self._in_order(), head.encode())
            self.durable, self._positions = mine, positions
            self._log.publish()
        except OSError as error:
            self._error = output_error(self._root, error)
            raise self._error from error
        except BlueflowError as error:
            self._error = error
            raise
        self._pending, self._parts, self._finished = {}, {}, []
        self._rows = self.uncommitted_bytes = 0

    def close(self) -> None:
        """Give up what is not committed and let the next writer in."""
        for segment in self._open.values():
            segment.abandon()
        self._open.clear()
        self._lock.release()
        if self._error is None:
            self._error = InvariantError(f"the output {self._root} is not used after its end")

    def _check_mark(self) -> None:
        marked = self._disk.size(self._root / SIMULATED_MARK) is not None
        if marked and not self._simulated:
            there, ours = data_kind(simulated=True), data_kind(simulated=False)
            raise OtherSourceError(str(self._root), there, ours)

    def _check_log(self) -> None:
        record = self._log.read_last()
        if record is None:
            names = {name: self._disk.names(self._root / name) or () for name in DATASETS}
            if holds_segments(names):
                raise CommitLogError(str(self._root), "it has segments but no commit log")
            return
        head = decode_head(str(self._log.folder), record.head)
        check_origin(
            str(self._root),
            head,
            pipeline=self._pipeline,
            source=self._source,
            simulated=self._simulated,
        )
        self._check_newest(record.number)
        self._positions = head.positions

    def _check_newest(self, last: int) -> None:
        """Refuse segments newer than the log: without their record their events would come twice.

        Looks at the newest hours only, so that a folder of years opens as fast as one of a day.
        """
        for dataset in DATASETS:
            for hour in newest_hours(self._disk.names(self._root / dataset) or ()):
                for name in self._disk.names(self._root / dataset / hour) or ():
                    if (number := commit_of(name)) > last:
                        problem = f"it is of commit {number}, and the last record is {last}"
                        raise CommitLogError(str(self._root / dataset / hour / name), problem)

    def _mark(self) -> None:
        path = self._root / SIMULATED_MARK
        if self._simulated and self._disk.size(path) != len(SIMULATED_TEXT):
            if self._disk.size(path) is not None:  # cut off by a crash
                self._disk.unlink(path)
            descriptor = self._disk.create(path)
            try:
                self._disk.write(descriptor, SIMULATED_TEXT.encode())
                self._disk.sync(descriptor)
            finally:
                self._disk.close(descriptor)
            self._disk.sync_folder(self._root)

    def _check_usable(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._ready:
            raise InvariantError("a sink is resumed before it is written to")

    def _check_position(self, through: Position) -> int:
        """Return the time of the position before it; 0 when there is none."""
        if family(through.source) != family(self._source):
            raise InvariantError(f"the output of {self._source} gets no events of {through.source}")
        last = self._pending.get(through.source) or self.durable.get(through.source)
        if last is not None and through.seq < last.seq:
            raise InvariantError(f"the position of {last.source} never goes back from {last.seq}")
        return last.time_us if last else 0

    def _write(self, dataset: str, hour: int, events: list[Event]) -> None:
        segment = self._open.get((dataset, hour))
        if segment is None:
            if len(self._open) >= self._segments_open_max:
                self._finish_oldest()
            index = len(self._finished) + len(self._open)
            segment = Segment(self._disk, self._log.hidden_path(index))
            self._open[dataset, hour] = segment
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            piece = events[start : start + _EVENTS_AT_ONCE]
            try:
                lines = encode_lines(piece)
            except (msgspec.MsgspecError, TypeError, ValueError, ArithmeticError) as error:
                raise InvariantError(f"every event has a JSON form ({error!r})") from error
            self.uncommitted_bytes += len(lines)
            segment.write(lines, len(piece))

    def _finish_oldest(self) -> None:
        (dataset, hour), segment = next(iter(self._open.items()))
        part = self._parts.get((dataset, hour), 0) + 1
        number = self._log.last.number + 1 if self._log.last else 1
        self._finished.append(segment.finish(segment_path(dataset, hour, number, part)))
        self._parts[dataset, hour] = part
        del self._open[dataset, hour]

    def _in_order(self) -> list[LogFile]:
        """Sort by hidden name: a longer one has a digit more, so a higher number."""
        return sorted(self._finished, key=lambda file: (len(file.hidden), file.hidden))


def _grouped(
    events: Sequence[Event], before_us: int, through_us: int
) -> dict[tuple[str, int], list[Event]]:
    times_us = [event.time_us for event in events]
    hours = hours_of(times_us, before_us=before_us, through_us=through_us)
    groups: dict[tuple[str, int], list[Event]] = {}
    for event, hour in zip(events, hours, strict=True):
        key = dataset_of(event), hour
        group = groups.get(key)
        if group is None:
            groups[key] = [event]
        else:
            group.append(event)
    return groups
