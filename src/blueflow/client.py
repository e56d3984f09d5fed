"""`blueflow.firehose`: the stream in a program or a notebook, one event at a time or in batches."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from blueflow.config import SETTINGS, Settings
from blueflow.cursorfile import CursorFile, Place
from blueflow.errors import SettingError
from blueflow.factory import source_of
from blueflow.metrics import Metrics
from blueflow.syncreader import STOP_S, Rejects, SyncReader

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
    from types import TracebackType
    from typing import Self

    from blueflow.events import Event
    from blueflow.interfaces import Batch, Source

_APPLICABLE = (
    *("source_name", "check", "speed", "on_sequence_reset", "connect_wait_s", "stall_timeout_s"),
    *("ping_interval_s", "buffer_bytes_max", "sim_rate", "sim_seed", "sim_frames"),
)


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
        settings: others of `blueflow config` about the source, by name: `check="used"`,
            `stall_timeout_s=10`. The environment and `blueflow.toml` are for commands, not read.

    Raises:
        SettingError: a setting is unknown, has no usable value, or is not about a source.
        SourceUrlError: the source names nothing that can be read.
    """
    for name in settings:
        if name not in _APPLICABLE:
            raise SettingError(name, "blueflow.firehose", _why_not(name))
    given = {"source": source, "collections": _list(collections), "dids": _list(dids), **settings}
    file = None
    if isinstance(cursor, os.PathLike):
        file = Path(cursor).expanduser()
    elif cursor is not None:
        text = str(cursor)
        if text in ("live", "oldest") or text.lstrip("-").isdecimal():
            given["cursor"] = text
        else:
            file = Path(text).expanduser()
    return Firehose(source_of(_settings(given), Metrics()), file)


class Firehose:
    """Events of a source, in order. Made by `firehose()`, read once.

    With a cursor file, the position moves when the next event is asked for: an event whose handling
    fails comes again (at least once).
    """

    def __init__(self, source: Source, cursor: Path | None) -> None:
        self._source = source
        self._cursor = None if cursor is None else CursorFile(cursor, source.name)
        self._place = Place()
        self._rejects = Rejects()
        self._batches: AsyncIterator[Batch] | None = None
        self._started = self._stopped = False
        self._finalizer: weakref.finalize[..., Firehose] | None = None

    async def start(self) -> Self:
        """Connect, for where no `async with` does it; then `stop` is yours to call.

        Raises:
            CursorFileError: the cursor file is damaged or of another source.
            OutputNotWritableError: there is no place for the cursor file.
        """
        if self._started:
            if self._stopped:
                raise RuntimeError("a stream is read once: make another with blueflow.firehose")
            return self
        self._started = True
        try:
            if self._cursor is not None:
                self._place.done = await asyncio.to_thread(self._cursor.load)
                if self._stopped:  # by another task meanwhile
                    return self
            # A stream that nobody holds any more (`async for … in firehose(): break`, a notebook
            # cell run again) must not leave a connection behind.
            end = _End(self._source, self._place, self._cursor)
            self._finalizer = weakref.finalize(self, end.soon, asyncio.get_running_loop())
            self._finalizer.atexit = False
            await self._source.start(self._place.done)
            self._batches = aiter(self._source)
        except BaseException:
            self._stopped = True
            if self._finalizer is not None:
                self._finalizer.detach()
            with anyio.move_on_after(STOP_S, shield=True):
                await self._source.stop()
            raise
        return self

    async def stop(self) -> None:
        """Disconnect, and save the position behind the last event handled.

        Raises:
            OutputNotWritableError: the cursor file cannot be written.
        """
        if self._stopped or not self._started:
            self._stopped = self._started = True
            return
        self._stopped = True
        if self._finalizer is not None:
            self._finalizer.detach()
        await _End(self._source, self._place, self._cursor).now()

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
        """Return the next event; the one before counts as handled. Cancelled, nothing is lost."""
        place = self._place
        place.settle()
        while not self._stopped:
            if self._cursor is not None:  # first: it may raise, and what was handed out is handled
                self._cursor.save_soon(place)
            event = place.next()
            if event is not None:
                return event
            await self._take_batch()
        raise StopAsyncIteration

    async def batches(self) -> AsyncGenerator[list[Event]]:
        """Iterate over lists of events, for throughput; a list counts as handled with the next."""
        place = self._place
        while not self._stopped:
            place.settle()
            if self._cursor is not None:
                self._cursor.save_soon(place)
            events = place.rest()
            if events:
                yield events
                continue
            try:
                await self._take_batch()
            except StopAsyncIteration:
                return

    def sync(self, limit: int | None = None) -> Iterator[Event]:
        """Iterate without `async`, also inside a notebook; ends after `limit` events.

        A thread with an event loop of its own reads ahead by a few batches; it ends with the loop.
        """
        if self._started:
            raise RuntimeError("a stream that was started is read with `async for`")
        self._started = self._stopped = True
        return SyncReader(self._source, self._place, self._cursor, self._rejects).events(limit)

    async def _take_batch(self) -> None:
        if not self._started:
            await self.start()
        if self._batches is None:
            raise StopAsyncIteration
        batch = await anext(self._batches)
        self._rejects.tell(batch)
        self._place.put(batch)


class _End:
    """What the end of a stream takes; it does not hold the stream itself."""

    def __init__(self, source: Source, place: Place, cursor: CursorFile | None) -> None:
        self._source, self._place, self._cursor = source, place, cursor

    async def now(self) -> None:
        try:
            with anyio.move_on_after(STOP_S, shield=True):
                await self._source.stop()
        finally:
            if self._cursor is not None:
                with anyio.move_on_after(STOP_S, shield=True):
                    await self._cursor.save_last(self._place)

    def soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do it in the loop of the stream, if that still turns."""
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self.now(), loop=loop))


def _list(given: Collection[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _why_not(name: str) -> str:
    if name in ("limit", "for_s"):
        return "a program ends its loop itself, and .sync takes a limit"
    if name in SETTINGS:
        return "it is about the command `blueflow produce`, not about a source"
    return f"there is no such setting; there are {', '.join(_APPLICABLE)}"


def _settings(given: dict[str, Any]) -> Settings:
    values = {}
    for name, raw in given.items():
        if raw is None:
            continue
        try:
            values[name] = SETTINGS[name].read(raw)
        except ValueError as error:
            raise SettingError(name, "blueflow.firehose", f"{raw!r} {error}") from error
    return Settings(**values)
