"""Rows in, commits out: what the sink and the archive have in common."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
import anyio.to_thread
import msgspec

from blueflow.errors import InputLostError, InvariantError
from blueflow.files.layout import HOUR_US
from blueflow.lake.logrecord import Input, Lost
from blueflow.lake.parquet import encode
from blueflow.lake.rows import RowBuffer
from blueflow.lake.shard import Made

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.lake.lines import Rejected
    from blueflow.lake.logrecord import LakeFile, Repair
    from blueflow.lake.rows import Group, Key
    from blueflow.lake.shard import ShardLog
    from blueflow.metrics import LakeMetrics

COMMIT_INTERVAL_S: Final = 60.0
COMMIT_BYTES_MAX: Final = 64 * 1024 * 1024
GROUPS_MAX: Final = 256  # files of one commit; usual are 6 to 12
LATENESS_S: Final = 300.0
CLOSE_WAIT_S: Final = 5.0

_logger = logging.getLogger(__name__)


class Again(NamedTuple):
    """A range of an input that has to be read once more, for files that are made anew from it."""

    since: Input
    reached: Input
    until: Input


class ShardWriter:
    """Collects rows and positions, and commits them together in the background.

    One task calls, never two at once. While a commit runs, as much as one commit holds is taken
    beside it; then `room` waits.

    Args:
        log: not claimed yet.
        metrics: where to count.
        commit_interval_s: age of the oldest uncommitted row (or position) that brings a commit.
        commit_bytes_max: uncommitted wire JSON that brings one.
        lateness_s: how long after its end an hour may still get rows; its close brings a commit.
        accept_loss: go on where files cannot be made anew in full.
        clock: seconds that rise; for the age.
    """

    def __init__(
        self,
        log: ShardLog,
        metrics: LakeMetrics,
        *,
        commit_interval_s: float = COMMIT_INTERVAL_S,
        commit_bytes_max: int = COMMIT_BYTES_MAX,
        lateness_s: float = LATENESS_S,
        accept_loss: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._metrics = log, metrics
        self._interval_s, self._bytes_max = commit_interval_s, commit_bytes_max
        self._lateness_us = int(lateness_s * 1_000_000)
        self._accept_loss, self._clock = accept_loss, clock
        self._committed: dict[str, Input] = {}
        self._taken: dict[str, Input] = {}
        self._pending = _Pending()
        self._in_flight: _Pending | None = None
        self._repair: Repair | None = None
        self._again: dict[str, Again] = {}  # what of it is still to be read
        self._places: Container[Key] = ()
        self._rebuilt = RowBuffer()
        self._watermark_us = 0
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    async def begin(
        self, check: Callable[[Mapping[str, Input]], None] | None = None
    ) -> Mapping[str, Input]:
        """Claim the shard and return how far its inputs are read.

        Args:
            check: raises when these inputs are not ours to read; then nothing is claimed.

        Raises:
            BlueflowError: as `ShardLog.claim`.
        """
        self._committed = dict(await self._log.claim(check))
        self._taken = dict(self._committed)
        self._watermark_us = self._log.last.watermark_us
        self._repair = self._log.last.repair
        if self._repair is not None:
            places = {(file.dataset, file.hour) for file in self._repair.files}
            self._places, self._rebuilt = places, RowBuffer()
            since = self._repair.since
            self._again = {
                name: Again(since[name], since[name], until)
                for name, until in self._repair.until.items()
                if name in since and since[name] != until
            }
            extra = {"files": len(self._repair.files), "shard": str(self._log.shard)}
            _logger.warning("files are gone and are made again from their input", extra=extra)
        return dict(self._committed)

    @property
    def again(self) -> Mapping[str, Again]:
        """What has to be read again before anything else."""
        return self._again

    @property
    def taken(self) -> Mapping[str, Input]:
        """How far the inputs are read; what is only read again does not count."""
        return self._taken

    @property
    def committed(self) -> Mapping[str, Input]:
        """How far the inputs are read in what is durable and visible."""
        return self._committed

    @property
    def dirty(self) -> bool:
        """Whether anything was taken that is not committed."""
        return self._in_flight is not None or self._is_dirty(self._pending)

    async def room(self) -> None:
        """Wait until there is room for more; raise what a commit failed with."""
        self._check()
        while self._task is not None and (self._is_full() or self._rebuilding):
            await self._settle()
        self._check()

    def add_events(self, name: str, events: Sequence[Event], after: Input) -> None:
        """Take the events of a source up to a position. Call `room` before, `commit` after.

        Args:
            name: of the input.
            events: in any order.
            after: how far the input is read with them.
        """
        if events:
            self._begin_at(name, Input(min(event.seq for event in events) - 1))
        if once_more := self._again.get(name):
            until = once_more.until.next
            again = [event for event in events if event.seq <= until]
            events = [event for event in events if event.seq > until]
            self._rebuilt.add_events(again, only=self._places)
        if rejected := self._pending.buffer.add_events(events):
            raise InvariantError(f"the numbers of an event have 64 bits: {rejected[0].problem}")
        self._move(name, after)

    def add_lines(
        self, name: str, lines: Sequence[bytes], offsets: Sequence[int], after: Input
    ) -> Sequence[Rejected]:
        """Take wire JSON out of a partition, and return what of it is no event."""
        if offsets:
            self._begin_at(name, Input(offsets[0], 0, after.topic_id))
        if once_more := self._again.get(name):
            until = once_more.until.next
            split = next((at for at, one in enumerate(offsets) if one >= until), len(offsets))
            self._rebuilt.add_lines(lines[:split], only=self._places)
            lines, offsets = lines[split:], offsets[split:]
        rejected = self._pending.buffer.add_lines(lines)
        self._move(name, after)
        return rejected

    def move(self, name: str, after: Input) -> None:
        """Note that an input is read further, without rows."""
        self._move(name, after)

    def skip(self, lost: Lost, after: Input) -> None:
        """Note that a range of an input is gone, and go on behind it."""
        self._pending.lost.append(lost)
        self._pending.since_s = min(self._pending.since_s, self._clock())
        self._metrics.lost.inc(lost.end - lost.first)
        self._move(lost.input, after)

    def give_up(self, name: str, before: int | None = None) -> None:
        """Do without a part of what has to be read again.

        The rows that are missing then count as lost when the files are made.

        Args:
            name: of the input.
            before: where the input begins now; None: nothing of the range is left.
        """
        once_more = self._again[name]
        if before is None or before >= once_more.until.next:
            del self._again[name]
        else:
            reached = msgspec.structs.replace(once_more.reached, next=before)
            self._again[name] = once_more._replace(reached=reached)

    def expect_nothing_before(self, watermark_us: int) -> None:
        """Note that events older than this are not expected any more."""
        if watermark_us > self._watermark_us:
            if not self._pending.closes and self._watermark_us:
                closes = self._hour(watermark_us) > self._hour(self._watermark_us)
                self._pending.closes = closes
            self._watermark_us = watermark_us
            self._metrics.watermark.set(watermark_us / 1_000_000)

    async def commit_if_due(self) -> None:
        """Begin a commit when the time has come, and let it run; raise what the last one raised."""
        self._note_open()
        if self._task is not None and self._task.done():
            await self._settle()
        self._check()
        if self._task is None and (self._rebuilding or self._is_due()):
            self._start()

    async def flush(self) -> None:
        """Return when everything taken is durable and visible.

        But while files are to be made anew, nothing is committed before all is read for them: what
        was taken so far comes again after a restart.

        Cancelled, the commit goes on, and the next call waits for it.
        """
        self._check()
        if self._again:
            return
        while self._task is not None or self._rebuilding or self._is_dirty(self._pending):
            self._check()
            if self._task is None:
                self._start()
            await self._settle()
        self._check()

    async def close(self) -> None:
        """Give up what is not committed; waits 5 s for a commit that is under way."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with anyio.move_on_after(CLOSE_WAIT_S, shield=True):
                await asyncio.wait([task])
        if self._failure is None:
            self._failure = InvariantError("a lake's writer is not used after its end")

    @property
    def _rebuilding(self) -> bool:
        """Whether all is read that files have to be made anew from."""
        return self._repair is not None and not self._again

    def _begin_at(self, name: str, first: Input) -> None:
        """Note where an input begins that nobody has read before."""
        if name not in self._taken:
            self._taken[name] = first

    def _move(self, name: str, after: Input) -> None:
        once_more = self._again.get(name)
        if once_more is not None:
            if after.next < once_more.until.next:
                self._again[name] = once_more._replace(reached=after)
                return
            del self._again[name]
            if after.next == once_more.until.next:
                return  # it was read up to here before
        before = self._taken.get(name)
        if before == after:
            return
        pending = self._pending
        if before is not None:
            if after.next < before.next and after.topic_id == before.topic_id and not pending.lost:
                raise InvariantError(f"the position of {name} never goes back from {before.next}")
            pending.since.setdefault(name, before)
        pending.since_s = min(pending.since_s, self._clock())
        self._taken[name] = pending.inputs[name] = after

    def _is_dirty(self, pending: _Pending) -> bool:
        return bool(
            pending.buffer.rows
            or pending.lost
            or pending.closes
            or any(self._committed.get(name) != one for name, one in pending.inputs.items())
        )

    def _is_full(self) -> bool:
        buffer = self._pending.buffer
        return buffer.bytes >= self._bytes_max or len(buffer.groups) >= GROUPS_MAX

    def _is_due(self) -> bool:
        pending = self._pending
        if self._repair is not None or not self._is_dirty(pending):
            return False
        old = self._clock() - pending.since_s >= self._interval_s
        return old or pending.closes or self._is_full()

    def _start(self) -> None:
        if self._repair is not None:
            self._task = asyncio.create_task(self._commit_repair(), name="lake repair")
            return
        self._in_flight, self._pending = self._pending, _Pending()
        # Not a later one: what it covers may be in the commit after this one.
        self._in_flight.watermark_us = self._watermark_us
        self._task = asyncio.create_task(self._commit(self._in_flight), name="lake commit")

    async def _settle(self) -> None:
        """Wait for the commit that runs; cancelled, it goes on."""
        task = self._task
        if task is None:
            return
        await asyncio.wait([task])
        self._task = None
        if task.cancelled():
            raise InvariantError("a commit of the lake was cancelled by somebody else")
        if (error := task.exception()) is not None:
            self._failure = error
            raise error

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _commit(self, pending: _Pending) -> None:
        metrics, began_s = self._metrics, time.monotonic()
        try:
            groups = pending.buffer.take()
            made = await anyio.to_thread.run_sync(_encoded, groups, abandon_on_cancel=True)
            encoded_s = time.monotonic()
            record = await self._log.publish(
                made,
                pending.inputs,
                since=pending.since,
                watermark_us=pending.watermark_us,
                lost=pending.lost,
            )
        except BaseException:
            metrics.commits["error"].inc()
            raise
        self._committed.update(pending.inputs)
        self._in_flight = None
        metrics.commits["ok"].inc()
        metrics.files.inc(len(made))
        metrics.rows.inc(sum(one.rows for one in made))
        metrics.bytes.inc(sum(len(one.data) for one in made))
        ended_s = time.monotonic()
        metrics.encode_seconds.observe(encoded_s - began_s)
        metrics.upload_seconds.observe(ended_s - encoded_s)
        metrics.flush_seconds.observe(ended_s - began_s)
        metrics.committed()
        self._note_open()
        extra = {
            "number": record.number,
            "files": len(made),
            "bytes": sum(len(m.data) for m in made),
        }
        _logger.debug("published", extra=extra)

    async def _commit_repair(self) -> None:
        repair, groups = self._repair, self._rebuilt.take()
        if repair is None:
            raise InvariantError("there is something to make anew")
        files, lost = _judged(repair.files, groups)
        if lost and not self._accept_loss:
            first, end = lost[0].first, lost[0].end
            raise InputLostError(lost[0].input, first, end, lost[0].why)
        wanted = {(file.dataset, file.hour): groups[file.dataset, file.hour] for file in files}
        made = await anyio.to_thread.run_sync(_encoded, wanted, abandon_on_cancel=True)
        await self._log.publish(made, {}, since={}, watermark_us=0, lost=lost, replaces=files)
        self._metrics.repaired_files.inc(len(files))
        self._metrics.lost.inc(sum(one.end - one.first for one in lost))
        self._repair = None

    def _note_open(self) -> None:
        in_flight = self._in_flight.buffer.bytes if self._in_flight else 0
        self._metrics.open_bytes.set(self._pending.buffer.bytes + in_flight)

    def _hour(self, watermark_us: int) -> int:
        return (watermark_us - self._lateness_us) // HOUR_US


class _Pending:
    """What the next commit will hold."""

    def __init__(self) -> None:
        self.buffer = RowBuffer()
        self.inputs: dict[str, Input] = {}
        self.since: dict[str, Input] = {}
        self.lost: list[Lost] = []
        self.since_s = float("inf")
        self.closes = False
        self.watermark_us = 0


def _encoded(groups: Mapping[Key, Group]) -> list[Made]:
    return [
        Made(dataset, hour, group.rows, group.time_min_us, group.time_max_us, encode(group.table()))
        for (dataset, hour), group in groups.items()
    ]


def _judged(
    files: Sequence[LakeFile], groups: Mapping[Key, Group]
) -> tuple[list[LakeFile], list[Lost]]:
    """Return the files that can be made anew, and what cannot be had any more."""
    found: list[LakeFile] = []
    lost: list[Lost] = []
    for file in files:
        group = groups.get((file.dataset, file.hour))
        rows = group.rows if group else 0
        if rows:
            found.append(file)
        if rows < file.rows:  # more are no loss: the input may have some twice
            why = f"rows of {file.key} that the input no longer has"
            lost.append(Lost(file.key, rows, file.rows, why))
    return found, lost
