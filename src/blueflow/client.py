"""`blueflow.firehose`: the stream in a program or a notebook, one event at a time or in batches."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from blueflow.config import load
from blueflow.errors import CursorError, InvariantError, OutputNotWritableError
from blueflow.events import Position, family
from blueflow.factory import source_of
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator
    from types import TracebackType
    from typing import Self

    from blueflow.events import Event
    from blueflow.interfaces import Batch, Source

SAVE_S = 1.0  # the cursor file moves at most this often, and at the end
_QUEUE_BATCHES = 4


def firehose(
    source: str = "wss://bsky.network",
    *,
    collections: Collection[str] = (),
    dids: Collection[str] = (),
    cursor: str | os.PathLike[str] | int | None = None,
    **settings: Any,
) -> Firehose:
    """Return the stream of events of a source.

    ```python
    async with blueflow.firehose(collections=["app.bsky.feed.post"], cursor="my.cursor") as posts:
        async for post in posts:
            if post.record:  # a delete has none
                print(post.uri, post.record["text"])
    ```

    In a notebook, where one cell starts and another reads: `posts = await firehose(…).start()`, and
    `await posts.stop()` at the end. In a plain program: `for post in firehose(…).sync(limit=10)`.

    Args:
        source: a relay (`wss://HOST`), `replay:FILE` or `sim`.
        collections: NSIDs wanted, such as `app.bsky.feed.post` or `app.bsky.graph.*`; then only
            `RepoOp`s come. Empty: everything, account events too.
        dids: accounts wanted; empty is all.
        cursor: a file to keep the position in, so that the next run goes on there; or where to
            begin: a seq, "live" (the default) or "oldest".
        settings: others of `blueflow config`, by name: `check="used"`, `stall_timeout_s=10`.

    Raises:
        SettingError: a setting is unknown or has no usable value.
        SourceUrlError: the source names nothing that can be read.
    """
    values = {"source": source, "collections": collections, "dids": dids, **settings}
    path = None
    if cursor is not None:
        text = os.fspath(cursor) if isinstance(cursor, os.PathLike) else str(cursor)
        if text in ("live", "oldest") or text.isdecimal():
            values["cursor"] = text
        else:
            path = Path(text).expanduser()
    chosen = load({name: value for name, value in values.items() if value != ()}, {})
    return Firehose(source_of(chosen, Metrics()), path)


class Firehose:
    """Events of a source, in order. Made by `firehose()`.

    With a cursor file, the position moves when the next event is asked for: an event whose handling
    fails comes again (at least once).
    """

    def __init__(self, source: Source, cursor: Path | None) -> None:
        self._source = source
        self._cursor = cursor
        self._started = False
        self._stopped = False
        self._done: Position | None = None  # everything up to here has been handled
        self._saved: Position | None = None
        self._saved_s = 0.0
        self._batches: AsyncIterator[Batch] | None = None
        self._batch: Batch | None = None
        self._next = 0

    async def start(self) -> Self:
        """Connect. Needed only where no `async with` does it.

        Raises:
            CursorError: the cursor file is damaged or of another source.
        """
        if not self._started:
            self._started = True
            self._done = self._saved = self._load()
            await self._source.start(self._done)
            self._batches = aiter(self._source)
        return self

    async def stop(self) -> None:
        """Disconnect, and save the position behind the last event handled."""
        if self._stopped:
            return
        self._stopped = True
        await self._source.stop()
        self._save(now=True)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """Return the next event; the one before counts as handled."""
        await self.start()
        while True:
            batch = self._batch
            if batch is not None and self._next < len(batch.events):
                event = batch.events[self._next]
                if self._next and batch.events[self._next - 1].seq != event.seq:
                    self._handled(batch.events[self._next - 1])
                self._next += 1
                return event
            self._finish_batch()
            self._batch, self._next = await self._next_batch(), 0

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Iterate over lists of events, for throughput; a list counts as handled with the next."""
        await self.start()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                self._finish_batch()
                self._batch = await self._next_batch()
                self._next = len(self._batch.events)
                if self._batch.events:
                    yield list(self._batch.events)

    def sync(self, limit: int | None = None) -> Iterator[Event]:
        """Iterate without `async`, also inside a notebook; ends after `limit` events.

        A thread with an event loop of its own reads ahead by a few batches.
        """
        return _Sync(self, limit).events()

    async def _next_batch(self) -> Batch:
        if self._batches is None:
            raise InvariantError("a started stream has batches")
        if self._stopped:
            raise StopAsyncIteration
        return await anext(self._batches)

    def _finish_batch(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None and batch.through is not None:
            self._done = batch.through
            self._save(now=False)

    def _handled(self, event: Event) -> None:
        before = self._done.time_us if self._done else 0
        self._done = Position(event.source, event.seq, max(before, event.time_us))
        if time.monotonic() - self._saved_s >= SAVE_S:
            self._save(now=False)

    def _load(self) -> Position | None:
        if self._cursor is None:
            return None
        try:
            position = msgspec.json.decode(self._cursor.read_bytes(), type=Position)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise CursorError(str(self._cursor), f"the file holds no position: {error}") from error
        if family(position.source) != family(self._source.name):
            raise CursorError(
                str(self._cursor), f"it is of {position.source}, not of {self._source.name}"
            )
        return position

    def _save(self, *, now: bool) -> None:
        done = self._done
        if self._cursor is None or done is None or done == self._saved:
            return
        if not now and time.monotonic() - self._saved_s < SAVE_S:
            return
        new = self._cursor.with_name(self._cursor.name + ".new")
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.encode(done) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._cursor)
        except OSError as error:
            raise OutputNotWritableError(str(self._cursor), str(error)) from error
        self._saved, self._saved_s = done, time.monotonic()


class _Sync:
    """Runs a stream in a thread, and hands its batches over a bounded queue."""

    def __init__(self, stream: Firehose, limit: int | None) -> None:
        self._stream, self._limit = stream, limit
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(_QUEUE_BATCHES)
        self._stop = threading.Event()

    def events(self) -> Iterator[Event]:
        thread = threading.Thread(target=self._run, name="blueflow-firehose", daemon=True)
        thread.start()
        stream, given = self._stream, 0
        try:
            while self._limit is None or given < self._limit:
                item = self._queue.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                for index, event in enumerate(item.events):
                    if index and item.events[index - 1].seq != event.seq:
                        stream._handled(item.events[index - 1])  # noqa: SLF001 - one class in two
                    given += 1
                    yield event
                    if given == self._limit:
                        return
                stream._batch = item  # noqa: SLF001
                stream._finish_batch()  # noqa: SLF001
        finally:
            self._stop.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            thread.join(timeout=10)
            stream._save(now=True)  # noqa: SLF001

    def _run(self) -> None:
        try:
            asyncio.run(self._read())
        except BaseException as error:  # noqa: BLE001 - it is raised where the events are read
            self._put(error)
        else:
            self._put(None)

    async def _read(self) -> None:
        stream = self._stream
        async with stream:
            with contextlib.suppress(StopAsyncIteration):
                while not self._stop.is_set():
                    reading = asyncio.ensure_future(stream._next_batch())  # noqa: SLF001
                    while not reading.done() and not self._stop.is_set():
                        await asyncio.wait([reading], timeout=0.1)
                    if not reading.done():
                        reading.cancel()
                        return
                    batch = reading.result()
                    await asyncio.to_thread(self._put, batch)

    def _put(self, item: Batch | BaseException | None) -> None:
        """Wait for a place in the queue, or for the end."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return
