"""What is in a file that can be replayed: bytes, frames or lines, and where it is damaged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import zstandard

from blueflow.cursor import Sequence
from blueflow.decode import Decoder
from blueflow.errors import FrameError, RecordingError, SequenceResetError
from blueflow.events import Position, decode_line, epoch_after
from blueflow.interfaces import Batch, Rejected
from blueflow.wire.recording import Unpacker

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.decode import Check, Wanted
    from blueflow.events import Event

READ_BYTES = 256 * 1024
_PIECE_BYTES = 2048  # zstd makes at most 64 MiB out of it
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_MEMORY_MAX = 128 * 1024 * 1024
_LINE_BYTES_MAX = 16 * 1024 * 1024


class RecordingFile:
    """A file in pieces, decompressed when it is zstd. Blocks."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._zstd: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._error: RecordingError | None = None
        self._offset = 0  # in the file as it is on the disk
        self.cut_off = False  # whether it ended within a zstd frame
        try:
            self._raw = path.open("rb")
            self._is_zstd = self._raw.peek(len(_ZSTD_MAGIC)).startswith(_ZSTD_MAGIC)
        except OSError as error:
            raise RecordingError(self._path, -1, error.strerror or str(error)) from error

    def read(self) -> bytes:
        """Return about READ_BYTES; nothing at the end.

        Raises:
            RecordingError: the disk failed, or the zstd data is damaged.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._unpacked() if self._is_zstd else self._read(READ_BYTES)
        except OSError as error:
            problem = error.strerror or str(error)
            raise RecordingError(self._path, self._offset, problem) from error

    def close(self) -> None:
        """Close it."""
        self._raw.close()

    def _read(self, size: int) -> bytes:
        data = self._raw.read(size)
        self._offset += len(data)
        return data

    def _unpacked(self) -> bytes:
        unpacked = bytearray()
        while len(unpacked) < READ_BYTES:
            data = self._compressed or self._read(_PIECE_BYTES)
            self._compressed = b""
            if not data:
                self.cut_off = self._zstd is not None
                break
            if self._zstd is None:
                reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MEMORY_MAX)
                self._zstd = reader.decompressobj()
            try:
                unpacked += self._zstd.decompress(data)
            except zstandard.ZstdError as error:
                place = self._offset - len(data)
                self._error = RecordingError(self._path, place, f"damaged zstd data ({error})")
                if unpacked:
                    break  # what was good comes first
                raise self._error from error
            if self._zstd.eof:
                self._compressed, self._zstd = self._zstd.unused_data, None
        return bytes(unpacked)


class Start(NamedTuple):
    """Where a reader begins, and what for."""

    path: str
    name: str
    after: Position | None
    wanted: Wanted


class FrameReader:
    """Frames of a recording to batches.

    Args:
        start: where to begin.
        check: blocks to compare with their hash.
        go_on: whether a new epoch begins where the recorded relay counted anew.
    """

    def __init__(self, start: Start, check: Check, *, go_on: bool) -> None:
        self._path = start.path
        self._go_on = go_on
        after = start.after
        # A position in a later epoch says nothing about the seqs before: those are decoded, and
        # not handed over.
        self._seek = after if after is not None and after.source != start.name else None
        begin = None if self._seek else after
        # Never `connected()`: a file begins at its beginning, however far behind the position.
        self._decoder = Decoder(start.name, after=begin, wanted=start.wanted, check=check)
        self._unpacker = Unpacker(start.path)
        self._frames: list[bytes] = []
        self._next = 0
        self._error: RecordingError | None = None
        self._last: Rejected | None = None
        self.ended = False

    @property
    def filtered(self) -> int:
        """Frames so far without anything wanted."""
        return self._decoder.counts.filtered_frames

    def feed(self, data: bytes, *, cut_off: bool) -> None:
        """Take the next piece of the file; an empty one is its end, maybe `cut_off`.

        Raises:
            RecordingError: what was there before is handed over, and here the damage begins.
        """
        if self._error is not None:
            raise self._error
        if not data:
            self.ended = True
            left = self._unpacker.rest
            if left or cut_off:
                detail = f"the recording is cut off: {len(left)} bytes of its last frame are there"
                name, position = self._decoder.source, self._decoder.position
                after = position.seq if position else None
                self._last = Rejected(name, after, None, None, "frame", detail, left)
            return
        self._frames = self._frames[self._next :] + self._unpack(data)
        self._next = 0

    def _unpack(self, data: bytes) -> list[bytes]:
        fed = self._unpacker.offset
        try:
            return self._unpacker.feed(data)
        except RecordingError as error:
            good = error.offset - fed - len(self._unpacker.rest)
            if good <= 0:
                raise
            self._error = error
            return self._unpacker.feed(data[:good])

    def batch(self, frames: int) -> Batch | None:
        """Return a batch of at most so many frames; None: feed more, or it has ended.

        Raises:
            SequenceResetError: the recorded relay restarted its sequence.
        """
        decoder, fed = self._decoder, 0
        now_us = time.time_ns() // 1000
        while self._next < len(self._frames) and fed < frames:
            frame = self._frames[self._next]
            try:
                decoder.feed(frame, now_us)
            except FrameError:
                decoder.feed(frame, now_us)  # a file sends nothing else: into the quarantine
            except SequenceResetError:
                if decoder.take_ready and self._seek is None:
                    return decoder.take()  # the old epoch's events first
                if self._seek is None and not self._go_on:
                    raise
                self._begin_epoch()
                continue
            self._next += 1
            fed += self._seek is None
        decoder.take_infos()
        if self._seek is not None:
            decoder.take()
        if decoder.take_ready:
            return decoder.take()
        last, self._last = self._last, None
        return None if last is None else Batch((), decoder.position, rejected=(last,))

    def _begin_epoch(self) -> None:
        decoder, seek = self._decoder, self._seek
        decoder.take()
        decoder.new_epoch(epoch_after(decoder.source))
        if seek is not None and seek.source == decoder.source:
            counts = decoder.sequence.counts
            decoder.sequence = Sequence(seek)
            decoder.sequence.counts = counts
            self._seek = None


class LineReader:
    """Wire JSON lines to batches; a position is the number of a line."""

    def __init__(self, start: Start) -> None:
        self._path, self._name, after, self._wanted = start
        self._skip = after.seq if after else 0
        self._time_us = after.time_us if after else 0
        self._number = 0
        self._rest = b""
        self._lines: list[bytes] = []
        self._next = 0
        self._last: Rejected | None = None
        self.ended = False
        self.filtered = 0

    def feed(self, data: bytes, *, cut_off: bool) -> None:
        """Take the next piece of the file; an empty one is its end, maybe `cut_off`.

        Raises:
            RecordingError: a line has no end.
        """
        if not data:
            self.ended = True
            lines, self._rest = [self._rest] if self._rest else [], b""
            if cut_off:
                number = self._number + len(self._lines) - self._next + len(lines)
                detail = "the zstd data ends before its end"
                self._last = Rejected(self._name, number, None, None, "frame", detail, b"")
        else:
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _LINE_BYTES_MAX:
                raise RecordingError(self._path, -1, f"line {self._number + 1} has no end")
        self._lines = self._lines[self._next :] + lines
        self._next = 0

    def batch(self, lines: int) -> Batch | None:
        """Return a batch of at most so many lines; None: feed more, or it has ended."""
        events: list[Event] = []
        numbers: list[int] = []
        rejected: list[Rejected] = []
        size = taken = 0
        while self._next < len(self._lines) and taken < lines:
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
                numbers.append(self._number)
            else:
                self.filtered += 1
        if self._next == len(self._lines) and self._last is not None:
            rejected.append(self._last)
            self._last = None
        if not taken and not rejected:
            return None
        through = Position(self._name, max(self._number, self._skip), self._time_us)
        return Batch(events, through, taken, size, rejected, numbers)

    def _rejected(self, line: bytes, error: Exception) -> Rejected:
        number = self._number
        return Rejected(self._name, number - 1, number, None, "body", str(error), line)
