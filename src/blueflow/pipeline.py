"""The wiring of one source to one sink, and the order of acknowledgement.

The sink is asked first what it has; the source begins behind that; batches go over one at a time,
so the position that the sink makes durable never passes an event that it does not have. What bounds
the memory is the source's read-ahead: while the sink works, nothing is decoded.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from blueflow.errors import BlueflowError, DrainTimeoutError
from blueflow.events import Position, RepoOp, family, kind_of
from blueflow.metrics import Metrics
from blueflow.records import dataset_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.interfaces import Batch, Sink, Source
    from blueflow.quarantine import Quarantine

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
    moved_s: float = 0.0  # monotonic time of the last batch and the last commit; 0 before
    durable_s: float = 0.0


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

    Then everything taken is made durable. Both are closed in any case.

    Args:
        source: not started yet.
        sink: not resumed yet.
        limit: events; a commit of several operations is never split for a sink with a position.
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
        positions = await sink.resume()
        after = newest(positions, source.name)
        if accept is not None:
            accept(after)
        run.flow.position = run.flow.durable = after
        if after is not None:
            _logger.info("resuming", extra={"source": after.source, "seq": after.seq})
        await source.start(after)
        await run.until_done(stop, drain_s)
        if run.drain_timed_out:
            run.metrics.pipeline.dropped["drain", "timeout"].inc()
            raise DrainTimeoutError(drain_s)
    finally:
        with anyio.move_on_after(CLOSE_S, shield=True):
            await source.stop()
            await sink.close()
    return run.flow


def newest(positions: Mapping[str, Position], source: str) -> Position | None:
    """Return the position of the last epoch of a source, None when there is none."""
    own = [position for name, position in positions.items() if family(name) == family(source)]
    return max(own, key=lambda position: _epoch(position.source), default=None)


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
        self.drain_timed_out = False
        self._written_s = time.monotonic()
        # A stream without a position can end anywhere; another ends behind a whole commit, or its
        # next run would write the operations before the cut again.
        self._split = not getattr(sink, "keeps_position", True)

    async def until_done(self, stop: anyio.Event | None, drain_s: float) -> None:
        if stop is None:
            await self.move()
            return
        failure: BlueflowError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, stop, drain_s, tasks.cancel_scope)
            try:
                await self.move()
            except BlueflowError as error:  # callers know errors, not groups of one
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _watch(self, stop: anyio.Event, drain_s: float, scope: anyio.CancelScope) -> None:
        """End the source when told to, and everything when that takes too long."""
        await stop.wait()
        _logger.info("stopping: making everything durable", extra={"drain_s": drain_s})
        await self.source.stop()
        await anyio.sleep(drain_s)
        self.drain_timed_out = True
        scope.cancel()

    async def move(self) -> None:
        batches = aiter(self.source)
        while True:
            batch = None
            with anyio.move_on_after(TICK_S):
                try:
                    batch = await anext(batches)
                except StopAsyncIteration:
                    break
            if batch is None:
                await self._tick()
            elif not await self._hand_over(batch):
                break
        await self._tick()
        await self.sink.flush()
        self._note_durable(0.0)

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
        if self.limit is not None and flow.events + len(events) >= self.limit:
            events, through = self._cut(events, through, self.limit - flow.events)
        if through is None:
            return True
        flow.position = through
        if events or time.monotonic() - self._written_s >= TICK_S:
            await self._write(events, through)
        return self.limit is None or flow.events < self.limit

    def _cut(
        self, events: Sequence[Event], through: Position | None, left: int
    ) -> tuple[Sequence[Event], Position | None]:
        end = left
        if not self._split:
            while end < len(events) and events[end].seq == events[end - 1].seq:
                end += 1
        if end == len(events) or through is None:
            return events, through
        last = events[end - 1]
        # Not the running maximum, which may come from frames behind the cut; what is too low only
        # makes a sequence reset easier to believe, so take the best that is certain.
        time_us = max(event.time_us for event in events[:end])
        before = self.flow.position.time_us if self.flow.position else 0
        return events[:end], Position(last.source, last.seq, max(time_us, before))

    async def _tick(self) -> None:
        """Let the sink look at its clock and learn a position without events."""
        if self.flow.position is not None and time.monotonic() - self._written_s >= TICK_S / 2:
            await self._write((), self.flow.position)

    async def _write(self, events: Sequence[Event], through: Position) -> None:
        began_s = time.monotonic()
        await self.sink.write(events, through=through)
        self._written_s = time.monotonic()
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

    def _note_durable(self, took_s: float) -> None:
        durable = newest(self.sink.durable, self.source.name)
        if durable is None or durable == self.flow.durable:
            return
        self.flow.durable, self.flow.durable_s = durable, time.monotonic()
        self.metrics.sink.durable(durable.seq, durable.time_us)
        self.metrics.sink.commits["ok"].inc()
        if took_s:
            self.metrics.sink.commit_seconds.observe(took_s)


def _epoch(source: str) -> int:
    return int(source.partition("#")[2] or 1)
