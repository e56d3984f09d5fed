"""`replay:FILE[.zst]`: recorded frames or wire JSON lines as a source, at any speed."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import anyio
import anyio.to_thread
import msgspec
import zstandard

from blueflow.decode import Decoder, Wanted
from blueflow.errors import CursorError, FrameError, InvariantError, RecordingError
from blueflow.events import Position, decode_line
from blueflow.interfaces import Batch, Rejected
from blueflow.metrics import Metrics
from blueflow.wire.recording import Unpacker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from blueflow.decode import Check
    from blueflow.events import Event

READ_BYTES = 256 * 1024
BATCH_FRAMES = 256
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_MEMORY_MAX = 128 * 1024 * 1024
_LINE_BYTES_MAX = 16 * 1024 * 1024
_GAP_MAX_S = 3600.0  # times are claims: no gap between two events is longer


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
        speed: float = math.inf,
        metrics: Metrics | None = None,
    ) -> None:
        self._path = Path(path)
        self._name = name or self._path.name
        self._simulated = simulated
        self._wanted = Wanted(collections, dids)
        self._check: Check = check
        self._cursor = cursor
        self._speed = speed
        self._metrics = metrics or Metrics()
        self._file: BinaryIO | None = None
        self._reader: _Frames | _Lines | None = None
        self._stopping = asyncio.Event()
        self._began: tuple[float, int] | None = None  # monotonic seconds, event time

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
        self._file, first = await anyio.to_thread.run_sync(self._open)
        kind = _Lines if first.lstrip()[:1] in (b"{", b"") else _Frames
        decoder = Decoder(self._name, after=after, wanted=self._wanted, check=self._check)
        self._reader = kind(str(self._path), decoder, first)

    async def stop(self) -> None:
        """Close the file."""
        self._stopping.set()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch.

        Raises:
            RecordingError: the file is damaged from here on.
        """
        reader = self._reader
        if reader is None:
            raise InvariantError("a source is started before it is read")
        while not self._stopping.is_set() and self._file is not None:
            await asyncio.sleep(0)
            batch = reader.batch(1 if self._speed < math.inf else BATCH_FRAMES)
            if batch is not None:
                await self._pace(batch)
                self._metrics.source.frames.inc(batch.frames)
                self._metrics.source.frame_bytes.inc(batch.frame_bytes)
                return batch
            if reader.ended:
                break
            data = await anyio.to_thread.run_sync(self._read)
            reader.feed(data)
        raise StopAsyncIteration

    async def _pace(self, batch: Batch) -> None:
        if self._speed == math.inf or not batch.events:
            return
        time_us = batch.events[0].time_us
        if self._began is None:
            self._began = time.monotonic(), time_us
        began_s, began_us = self._began
        due_s = began_s + (time_us - began_us) / 1e6 / self._speed
        with anyio.move_on_after(min(due_s - time.monotonic(), _GAP_MAX_S)):
            await self._stopping.wait()

    def _open(self) -> tuple[BinaryIO, bytes]:
        try:
            raw = self._path.open("rb")
            magic = raw.read(len(_ZSTD_MAGIC))
            raw.seek(0)
            file: BinaryIO = raw
            if magic == _ZSTD_MAGIC:
                reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MEMORY_MAX)
                file = reader.stream_reader(raw, read_across_frames=True, closefd=True)
            return file, file.read(READ_BYTES)
        except (OSError, zstandard.ZstdError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            raise RecordingError(str(self._path), 0, problem) from error

    def _read(self) -> bytes:
        if self._file is None:
            return b""
        try:
            return self._file.read(READ_BYTES)
        except (OSError, zstandard.ZstdError) as error:
            raise RecordingError(str(self._path), -1, str(error)) from error


class _Frames:
    """Frames of a recording to batches."""

    def __init__(self, path: str, decoder: Decoder, data: bytes) -> None:
        self._path, self._decoder = path, decoder
        self._unpacker = Unpacker(path)
        self._frames: list[bytes] = []
        self._next = 0
        self.ended = False
        decoder.connected()  # frames at or below the position are a replay, not a fault
        self.feed(data)

    def feed(self, data: bytes) -> None:
        if not data:
            self.ended = True
            if left := self._unpacker.finish():
                raise RecordingError(self._path, -1, f"the last frame is cut off, {left} bytes")
            return
        self._frames = self._frames[self._next :] + self._unpacker.feed(data)
        self._next = 0

    def batch(self, frames: int) -> Batch | None:
        decoder, end = self._decoder, min(len(self._frames), self._next + frames)
        now_us = time.time_ns() // 1000
        while self._next < end:
            frame = self._frames[self._next]
            try:
                decoder.feed(frame, now_us)
            except FrameError:
                decoder.feed(frame, now_us)  # a file sends nothing else: into the quarantine
            self._next += 1
        return decoder.take() if decoder.take_ready else None


class _Lines:
    """Wire JSON lines to batches; a position is the number of a line."""

    def __init__(self, path: str, decoder: Decoder, data: bytes) -> None:
        self._path, self._name = path, decoder.source
        self._wanted = decoder.wanted
        after = decoder.position
        self._skip = after.seq if after else 0
        self._time_us = after.time_us if after else 0
        self._number = 0
        self._rest = b""
        self._lines: list[bytes] = []
        self._next = 0
        self.ended = False
        self.feed(data)

    def feed(self, data: bytes) -> None:
        text = self._rest + data
        lines = text.split(b"\n")
        self._rest = lines.pop() if data else b""
        if not data:
            self.ended = True
        if len(self._rest) > _LINE_BYTES_MAX:
            raise RecordingError(self._path, -1, f"line {self._number} has no end")
        self._lines = self._lines[self._next :] + lines
        self._next = 0

    def batch(self, lines: int) -> Batch | None:
        events: list[Event] = []
        rejected: list[Rejected] = []
        size = taken = 0
        end = min(len(self._lines), self._next + lines)
        while self._next < end:
            line = self._lines[self._next]
            self._next += 1
            self._number += 1
            if self._number <= self._skip or not line.strip():
                continue
            taken += 1
            size += len(line)
            try:
                event = decode_line(line, self._name, self._number)
            except msgspec.MsgspecError as error:
                rejected.append(self._rejected(line, error))
                continue
            self._time_us = max(self._time_us, event.time_us)
            if self._wanted.event(event):
                events.append(event)
        if not taken:
            return None
        through = Position(self._name, self._number, self._time_us)
        return Batch(events, through, taken, size, rejected)

    def _rejected(self, line: bytes, error: Exception) -> Rejected:
        number = self._number
        return Rejected(self._name, number - 1, number, None, "body", str(error), line)
