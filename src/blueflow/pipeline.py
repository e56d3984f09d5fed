"""The wiring of one source to one sink, and the order of acknowledgement.

The sink is asked first what it has; the source begins behind that; batches go over one at a time,
so the position that the sink makes durable never passes an event that it does not have. What bounds
the memory is the source's read-ahead: while the sink works, nothing is decoded.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from blueflow.cursor import position_behind
from blueflow.errors import BlueflowError, DrainTimeoutError, InvariantError, sole
from blueflow.events import RepoOp, epoch_of, family, kind_of
from blueflow.metrics import Metrics
from blueflow.records import dataset_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from blueflow.events import Event, Position
    from blueflow.interfaces import Batch, Sink, Source
    from blueflow.quarantine import Quarantine

    _T = TypeVar("_T")

TICK_S = 1.0  # a sink is called at least this often
CLOSE_S = 7.0  # what closing may take; a sink's own bound is 5 s

_logger = logging.getLogger(__name__)


@dataclass
class Flow:
    """What one run did so far; whoever shows progress reads it."""

    frames: int = 0
    frame_bytes: int = 0
    events: int = 0
    rejected: int = 0
    by_dataset: Counter[str] = field(default_factory=Counter)
    position: Position | None = None
    durable: Position | None = None
    keeps_position: bool = True  # whether the sink makes positions durable
    moved_s: float = 0.0  # monotonic time of the last batch and the last commit; 0 before
    durable_s: float = 0.0
    sink_call_s: float = 0.0  # monotonic time when the call of the sink that now runs began; or 0


async def pump(  # noqa: PLR0913 - what a run is made of
    source: Source,
    sink: Sink,
    *,
    limit: int | None = None,
    stop: anyio.Event | None = None,
    drain_s: float = 10.0,
    quarantine: Quarantine | None = None,
    metrics: Metrics | None = None,
    flow: Flow | None = None,
    accept: Callable[[Position | None], None] | None = None,
) -> Flow:
    """Move events from `source` to `sink` until the source ends, `stop` is set or `limit` reached.

    Then everything taken is made durable. Both are closed in any case. A `stop` while the sink is
    still beginning ends that: nothing was taken.

    Args:
        source: not started yet.
        sink: not resumed yet.
        limit: events; a commit of several operations is never split for a sink with a position, so
            a few more may come.
        stop: set it to end; a signal handler does.
        drain_s: how long the end may take, seconds.
        quarantine: where rejected input goes; without one it is only counted.
        metrics: where to count.
        flow: what to keep up to date.
        accept: called with the position to resume behind before anything begins; may raise.

    Raises:
        DrainTimeoutError: the sink did not make everything durable within `drain_s`.
        BlueflowError: whatever source or sink raise.
    """
    run = _Run(source, sink, metrics or Metrics(), quarantine, flow or Flow())
    run.limit = limit
    try:
        positions = await unless(stop, sink.resume())
        if positions is None:
            _logger.info("stopped before anything began")
        else:
            after = newest(positions, source.name)
            if accept is not None:
                accept(after)
            run.begin(after)
            await source.start(after)
            await run.until_done(stop, drain_s)
    except BaseException:
        try:
            await _close(source, sink)
        except Exception:
            _logger.warning("closing failed as well", exc_info=True)
        raise
    await _close(source, sink)
    return run.flow


async def unless(stop: anyio.Event | None, call: Awaitable[_T]) -> _T | None:
    """Await a call; None when `stop` is set first, which cancels it.

    A sink that looks for its servers, or waits for another's transaction, takes long to begin.
    """
    if stop is None:
        return await call
    result: _T | None = None
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_at, stop, tasks.cancel_scope)
            result = await call
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = sole(group)
    if failure is not None:
        raise failure  # outside of the handler, which would make the group its context
    return result


async def _cancel_at(stop: anyio.Event, scope: anyio.CancelScope) -> None:
    await stop.wait()
    scope.cancel()


def newest(positions: Mapping[str, Position], source: str) -> Position | None:
    """Return the position of the last epoch of a source, None when there is none."""
    own = [position for name, position in positions.items() if family(name) == family(source)]
    return max(own, key=lambda position: epoch_of(position.source), default=None)


async def _close(source: Source, sink: Sink) -> None:
    """Close both, also when the source fails or hangs: the sink holds a lock."""
    try:
        with anyio.move_on_after(CLOSE_S, shield=True) as stopping:
            await source.stop()
    finally:
        with anyio.move_on_after(CLOSE_S, shield=True) as closing:
            await sink.close()
        for part, scope in (("source", stopping), ("sink", closing)):
            if scope.cancelled_caught:
                extra = {"part": part, "waited_s": CLOSE_S}
                _logger.warning("closing took too long and was given up", extra=extra)


class _Run:
    def __init__(
        self,
        source: Source,
        sink: Sink,
        metrics: Metrics,
        quarantine: Quarantine | None,
        flow: Flow,
    ) -> None:
        self.source, self.sink = source, sink
        self.metrics, self.quarantine, self.flow = metrics, quarantine, flow
        self.limit: int | None = None
        self._turn = anyio.Lock(fast_acquire=True)  # calls of a sink never overlap
        self._written: Position | None = None
        self._written_s = time.monotonic()
        # A stream without a position can end anywhere; another ends behind a whole commit, or its
        # next run would write the operations before the cut again.
        flow.keeps_position = getattr(sink, "keeps_position", True)
        # A live start begins where nobody can say again: until a first position is durable, a crash
        # would make the next start live as well, and lose what lies between.
        self.anchored = not flow.keeps_position

    def begin(self, after: Position | None) -> None:
        """Note where the sink is."""
        self.flow.position = self.flow.durable = after
        if self.flow.keeps_position:
            self.metrics.sink.begun()
        self.anchored = self.anchored or after is not None
        if after is not None:
            _logger.info("resuming", extra={"source": after.source, "seq": after.seq})

    async def until_done(self, stop: anyio.Event | None, drain_s: float) -> None:
        failure: BaseException | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tick)
                if stop is not None:
                    tasks.start_soon(self._watch, stop, drain_s)
                ended_by = await self._move()
                async with self._turn:
                    await self._finish()
                if ended_by is not None:
                    raise ended_by
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failure = sole(group)
        if failure is not None:
            raise failure  # outside of the handler, which would make the group its context

    async def _move(self) -> BlueflowError | None:
        """Hand over batches to the end of the source; return the error that it ended with.

        What came before that error is sound and may never come again (a relay that counts anew has
        forgotten it), so it is made durable first. A broken promise is raised at once.
        """
        batches = aiter(self.source)
        while True:
            try:
                batch = await anext(batches)
            except StopAsyncIteration:
                return None
            except InvariantError:
                raise
            except BlueflowError as error:
                return error
            if not await self._hand_over(batch):
                return None

    async def _watch(self, stop: anyio.Event, drain_s: float) -> None:
        """End the source when told to, and everything when that takes too long."""
        await stop.wait()
        _logger.info("stopping: making everything durable", extra={"drain_s": drain_s})
        with anyio.move_on_after(drain_s):
            await self.source.stop()
            await anyio.sleep_forever()
        self.metrics.pipeline.dropped["drain", "timeout"].inc()
        raise DrainTimeoutError(drain_s)

    async def _tick(self) -> None:
        """Let the sink look at its clock, and learn a position without events.

        In a task beside the iteration: a timeout around each batch would end a source that is an
        async generator, and costs more.
        """
        while True:
            await anyio.sleep(TICK_S / 2)
            async with self._turn:
                position = self.flow.position
                if position is not None and time.monotonic() - self._written_s >= TICK_S / 2:
                    await self._write((), position)

    async def _hand_over(self, batch: Batch) -> bool:
        """Give a batch to the sink; False when the limit is reached."""
        flow = self.flow
        flow.moved_s = time.monotonic()
        flow.frames += batch.frames
        flow.frame_bytes += batch.frame_bytes
        if batch.rejected:
            flow.rejected += len(batch.rejected)
            if self.quarantine is not None:
                await self.quarantine.put(batch.rejected, time.time())
        events, through = batch.events, batch.through
        if self.limit is not None and flow.events + len(events) > self.limit:
            events, through = self._cut(batch, self.limit - flow.events)
        if through is None:
            return True
        async with self._turn:
            if events or not self.anchored or time.monotonic() - self._written_s >= TICK_S / 2:
                await self._write(events, through)
            flow.position = through  # behind the write: a tick would tell it without the events
            if not self.anchored:
                await self._flush()
                self.anchored = True
        return self.limit is None or flow.events < self.limit

    def _cut(self, batch: Batch, limit: int) -> tuple[Sequence[Event], Position | None]:
        """Return the events to write of the batch that exceeds the limit, and their position."""
        end, before = limit, self.flow.position
        while (position := position_behind(batch, end, before)) is None and end:
            end += 1 if self.flow.keeps_position else -1
        if not self.flow.keeps_position:
            return batch.events[:limit], position or batch.through  # which nobody keeps
        return batch.events[:end], position

    async def _finish(self) -> None:
        position = self.flow.position
        if position is not None and position != self._written:
            await self._write((), position)
        await self._flush()

    async def _flush(self) -> None:
        with self._calling_sink() as began_s:
            await self.sink.flush()
        self._note_durable(time.monotonic() - began_s)

    async def _write(self, events: Sequence[Event], through: Position) -> None:
        with self._calling_sink() as began_s:
            await self.sink.write(events, through=through)
        self._written, self._written_s = through, time.monotonic()
        took_s = self._written_s - began_s
        metrics = self.metrics
        metrics.sink.write_seconds.observe(took_s)
        if events:
            metrics.sink.written_events.inc(len(events))
            metrics.pipeline.batch_events.observe(len(events))
            kinds = Counter(map(kind_of, events))
            operations = Counter(
                (event.collection, event.operation) for event in events if type(event) is RepoOp
            )
            for kind, number in kinds.items():
                metrics.pipeline.events[kind].inc(number)
            for operation, number in operations.items():
                metrics.pipeline.operations[operation].inc(number)
            self.flow.events += len(events)
            self.flow.by_dataset.update(map(dataset_of, events))
        self._note_durable(took_s)

    @contextmanager
    def _calling_sink(self) -> Iterator[float]:
        """Say that a call of the sink runs, and since when."""
        self.flow.sink_call_s = began_s = time.monotonic()
        try:
            yield began_s
        except Exception:
            self.metrics.sink.commits["error"].inc()
            raise
        finally:
            self.flow.sink_call_s = 0.0

    def _note_durable(self, took_s: float) -> None:
        durable = newest(self.sink.durable, self.source.name)
        if durable is None or durable == self.flow.durable:
            return
        self.flow.durable, self.flow.durable_s = durable, time.monotonic()
        self.metrics.sink.durable(durable.seq, durable.time_us)
        self.metrics.sink.commits["ok"].inc()
        self.metrics.sink.commit_seconds.observe(took_s)
