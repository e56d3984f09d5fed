"""The file in which a program keeps its position, and the place it has reached in the stream."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from blueflow.cursor import position_behind
from blueflow.errors import CursorFileError, OutputNotWritableError
from blueflow.events import Position, family

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.events import Event
    from blueflow.interfaces import Batch

SAVE_S = 1.0  # the file moves at most this often, and at the end


class CursorFile:
    """Keeps a position in a file that is replaced as a whole."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source
        self._saved: Position | None = None
        self._saved_s = 0.0
        self._saving: asyncio.Future[None] | None = None

    def load(self) -> Position | None:
        """Return the position; None when there is no file yet.

        Raises:
            CursorFileError: the file is damaged or of another source.
            OutputNotWritableError: there is no place for the file.
        """
        try:
            position = msgspec.json.decode(self._path.read_bytes(), type=Position)
        except FileNotFoundError:
            if not os.access(self._path.parent, os.W_OK | os.X_OK):
                problem = "its folder does not exist, or may not be written to"
                raise OutputNotWritableError(str(self._path), problem) from None
            return None
        except OSError as error:
            raise CursorFileError(str(self._path), error.strerror or str(error)) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CursorFileError(str(self._path), f"it holds no position ({error})") from error
        if family(position.source) != family(self._source):
            problem = f"it is of {position.source}, not of {self._source}"
            raise CursorFileError(str(self._path), problem)
        self._saved = position
        return position

    def save(self, position: Position) -> None:
        """Replace the file. Blocks.

        Raises:
            OutputNotWritableError: it cannot be written.
        """
        new = self._path.with_name(self._path.name + ".new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.encode(position) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            problem = error.strerror or str(error)
            raise OutputNotWritableError(str(self._path), problem) from error

    def due(self, place: Place) -> Position | None:
        """Return the position to save now, if it is time for that; it counts as saved."""
        now_s = time.monotonic()
        if now_s - self._saved_s < SAVE_S:
            return None
        self._saved_s = now_s
        return self.unsaved(place)

    def unsaved(self, place: Place) -> Position | None:
        """Return the position if it is not saved; from here on it counts as saved."""
        position = place.position
        if position is None or position == self._saved:
            return None
        self._saved = position
        return position

    def save_soon(self, place: Place) -> None:
        """Save in a thread when it is time: an fsync must not hold the event loop up.

        Raises:
            OutputNotWritableError: the last time failed.
        """
        if self._saving is not None:
            if not self._saving.done():
                return
            self._take_result()
        position = self.due(place)
        if position is not None:
            loop = asyncio.get_running_loop()
            self._saving = loop.run_in_executor(None, self.save, position)

    async def save_last(self, place: Place) -> None:
        """Save what is not saved yet, behind a save that is under way."""
        if self._saving is not None:
            await asyncio.wait([self._saving])
            with suppress(OutputNotWritableError):  # the last try tells
                self._take_result()
        position = self.unsaved(place)
        if position is not None:
            await asyncio.to_thread(self.save, position)

    def _take_result(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None and saving.exception() is not None:
            self._saved = None  # it counted as saved when it began
            saving.result()


class Place:
    """Which events were handed out, and which of them are handled. Pure."""

    def __init__(self) -> None:
        self.done: Position | None = None  # behind the batches that are handled as a whole
        self._batch: Batch | None = None
        self._given = self._handled = 0

    def put(self, batch: Batch) -> None:
        """Take the next batch."""
        self._batch, self._given, self._handled = batch, 0, 0

    def settle(self) -> None:
        """Count everything handed out as handled."""
        self._handled = self._given
        batch = self._batch
        if batch is not None and self._given == len(batch.events):
            self.done = batch.through or self.done
            self._batch, self._given, self._handled = None, 0, 0

    def next(self) -> Event | None:
        """Hand the next event out; None when there is none left."""
        batch = self._batch
        if batch is None or self._given == len(batch.events):
            self.settle()  # a batch without events is handled at once
            return None
        event = batch.events[self._given]
        self._given += 1
        return event

    def rest(self) -> list[Event]:
        """Hand out all events that are left."""
        batch = self._batch
        if batch is None:
            return []
        events = list(batch.events[self._given :])
        self._given = len(batch.events)
        if not events:
            self.settle()
        return events

    @property
    def position(self) -> Position | None:
        """The position behind what is handled, and before everything that is not."""
        batch, count = self._batch, self._handled
        if batch is None:
            return self.done
        while (position := position_behind(batch, count, self.done)) is None and count:
            count -= 1
        return position
