"""The stream for code without asyncio: a thread reads, a plain iterator hands out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio

from blueflow.logs import Throttle, clip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blueflow.cursorfile import CursorFile, Place
    from blueflow.events import Event
    from blueflow.interfaces import Batch, Source

STOP_S = 10.0  # what the end may take
_QUEUE_BATCHES = 4

_logger = logging.getLogger(__name__)


class SyncReader:
    """Runs a source in a thread, and hands its batches over a bounded queue."""

    def __init__(
        self, source: Source, place: Place, cursor: CursorFile | None, rejects: Rejects
    ) -> None:
        self._source, self._place, self._cursor = source, place, cursor
        self._rejects = rejects
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(_QUEUE_BATCHES)
        self._stop = threading.Event()
        self._wake: Any = None

    def events(self, limit: int | None) -> Iterator[Event]:
        """Iterate over at most `limit` events; what is not asked for any more is given up."""
        place, cursor, given = self._place, self._cursor, 0
        if cursor is not None:
            place.done = cursor.load()
        thread = threading.Thread(target=self._run, name="blueflow-firehose", daemon=True)
        thread.start()
        try:
            while limit is None or given < limit:
                event = place.next()
                if cursor is not None and (position := cursor.due(place)):
                    cursor.save(position)
                if event is None:
                    item = self._queue.get()
                    if item is None:
                        return
                    if isinstance(item, BaseException):
                        raise item
                    self._rejects.tell(item)
                    place.put(item)
                    continue
                given += 1
                yield event
                place.settle()
        finally:
            self._stop.set()
            if self._wake is not None:
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    self._wake()
            thread.join(timeout=STOP_S)
            if cursor is not None and (position := cursor.unsaved(place)):
                cursor.save(position)

    def _run(self) -> None:
        try:
            asyncio.run(self._read())
        except asyncio.CancelledError:
            self._put(None)  # told to stop
        except BaseException as error:  # noqa: BLE001 - it is raised where the events are read
            self._put(error)
        else:
            self._put(None)

    async def _read(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is not None:
            self._wake = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            if self._stop.is_set():
                return
            await self._source.start(self._place.done)
            async for batch in self._source:
                await asyncio.to_thread(self._put, batch)
        finally:
            with anyio.move_on_after(STOP_S, shield=True):
                await self._source.stop()

    def _put(self, item: Batch | BaseException | None) -> None:
        """Wait for a place in the queue, or for the end."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return


class Rejects:
    """Tells about input that could not become an event: a program has no quarantine."""

    def __init__(self) -> None:
        self._throttle = Throttle()

    def tell(self, batch: Batch) -> None:
        """Log a sample of what was rejected."""
        for one in batch.rejected:
            left_out = self._throttle.admit(time.monotonic())
            if left_out is not None:
                extra = {
                    "reason": one.reason,
                    "detail": clip(one.detail, 200),
                    "seq": one.seq,
                    "after_seq": one.after_seq,
                    "left_out": left_out,
                }
                _logger.warning("input that cannot be read was passed over", extra=extra)
