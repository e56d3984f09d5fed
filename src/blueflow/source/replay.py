"""`replay:FILE[.zst]`: recorded frames or wire JSON lines as a source, at any speed."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from blueflow.decode import Wanted
from blueflow.errors import CursorError, InvariantError
from blueflow.events import Position
from blueflow.metrics import Metrics
from blueflow.source.recordings import FrameReader, LineReader, RecordingFile, Start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from blueflow.decode import Check
    from blueflow.interfaces import Batch

BATCH_FRAMES = 256
_STOP_S = 2.0
_JUMP_MAX_US = 3_600_000_000  # times are claims: a longer step is one, or a seam in the recording


class ReplaySource:
    """Batches of events out of a file that `--record` wrote, or of wire JSON lines.

    Frames keep their seq. A line's position is its number, from 1, and it keeps the source, seq and
    op_index it carries; a line without them (plain Jetstream) gets the file's name and its number.

    Args:
        path: the file, plain or zstd.
        name: what positions carry as `source`; the file's name by default.
        simulated: whether the data is made up.
        collections: NSIDs wanted; empty is everything.
        dids: accounts wanted; empty is all.
        check: blocks to compare with their hash: "all", "used" or "none".
        cursor: where to begin without a position: "oldest" (or "live") or a seq.
        on_sequence_reset: "stop" or "continue" where the recorded relay began to count anew.
        speed: 1 is the pace of the recording, `math.inf` does not wait.
        metrics: where to count.
    """

    def __init__(  # noqa: PLR0913 - each is a choice of its own, with a default
        self,
        path: str | Path,
        *,
        name: str | None = None,
        simulated: bool = False,
        collections: Collection[str] = (),
        dids: Collection[str] = (),
        check: Check = "all",
        cursor: str | int = "oldest",
        on_sequence_reset: str = "stop",
        speed: float = math.inf,
        metrics: Metrics | None = None,
    ) -> None:
        self._path = Path(path)
        self._name = name or self._path.name.replace("#", "_")  # what follows a # is an epoch
        self._simulated = simulated
        self._wanted = Wanted(collections, dids)
        self._check: Check = check
        self._cursor = cursor
        self._continue_after_reset = on_sequence_reset == "continue"
        self._pace = None if math.isinf(speed) else Pace(speed)
        self._metrics = metrics or Metrics()
        self._file: RecordingFile | None = None
        self._reading: asyncio.Future[bytes] | None = None
        self._reader: FrameReader | LineReader | None = None
        self._due: Batch | None = None
        self._stopping = asyncio.Event()
        self._clock = time.monotonic

    @property
    def name(self) -> str:
        """What positions carry as `source`."""
        return self._name

    @property
    def simulated(self) -> bool:
        """Whether the data is made up."""
        return self._simulated

    async def start(self, after: Position | None) -> None:
        """Open the file and go on behind `after`.

        Raises:
            RecordingError: the file cannot be read, or it is neither a recording nor wire JSON.
            CursorError: the cursor is no seq.
        """
        if after is None and self._cursor not in ("oldest", "live", "saved"):
            try:
                after = Position(self._name, int(self._cursor))
            except ValueError as error:
                raise CursorError(str(self._cursor), "it is not a seq") from error
        try:
            first = await anyio.to_thread.run_sync(self._open)
            start = Start(str(self._path), self._name, after, self._wanted)
            if first.lstrip()[:1] in (b"{", b""):
                self._reader = LineReader(start)
            else:
                self._reader = FrameReader(start, self._check, go_on=self._continue_after_reset)
            self._reader.feed(first, cut_off=self._cut_off)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close the file; a read that hangs keeps it."""
        self._stopping.set()
        if (reading := self._reading) is not None:
            done, _ = await asyncio.wait([reading], timeout=_STOP_S)
            if not done:
                return
            reading.exception()  # seen: nobody else will look
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch; cancelled, nothing is lost.

        Raises:
            RecordingError: the file is damaged from here on.
            SequenceResetError: the recorded relay restarted its sequence.
        """
        reader = self._reader
        if reader is None:
            raise InvariantError("a source is started before it is read")
        while not self._stopping.is_set():
            await asyncio.sleep(0)
            if self._due is None:
                self._due = reader.batch(1 if self._pace else BATCH_FRAMES)
            if self._due is not None:
                await self._wait_for(self._due)
                if self._stopping.is_set():
                    break
                batch, self._due = self._due, None
                self._count(batch, reader.filtered)
                return batch
            if reader.ended:
                break
            await self._read_on(reader)
        raise StopAsyncIteration

    async def _wait_for(self, batch: Batch) -> None:
        if self._pace is None or not batch.events:
            return
        wait_s = self._pace.wait_s(batch.events[0].time_us, self._clock())
        if wait_s > 0:
            await self._sleep(wait_s)

    async def _sleep(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._stopping.wait()

    async def _read_on(self, reader: FrameReader | LineReader) -> None:
        if self._file is None:
            return
        if self._reading is None:
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(None, self._file.read)
        data = await asyncio.shield(self._reading)  # cancelled, the next call finds it here
        self._reading = None
        reader.feed(data, cut_off=self._cut_off)

    @property
    def _cut_off(self) -> bool:
        return self._file is not None and self._file.cut_off

    def _open(self) -> bytes:
        self._file = RecordingFile(self._path)
        return self._file.read()

    def _count(self, batch: Batch, filtered: int) -> None:
        self._metrics.source.frames.inc(batch.frames)
        self._metrics.source.frame_bytes.inc(batch.frame_bytes)
        self._metrics.pipeline.filtered_frames.reach(filtered)


class Pace:
    """Decides how long to wait so that a recording takes as long as the stream did. Pure."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._last_us: int | None = None
        self._began: tuple[float, int] = 0.0, 0

    def wait_s(self, time_us: int, now_s: float) -> float:
        """Return the seconds until an event of this time is due; the same call may be repeated."""
        last_us, self._last_us = self._last_us, time_us
        if last_us is None or abs(time_us - last_us) > _JUMP_MAX_US:
            self._began = now_s, time_us
        began_s, began_us = self._began
        return max(0.0, began_s + (time_us - began_us) / 1e6 / self._speed - now_s)
