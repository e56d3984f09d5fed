"""A sink and a source in memory, as strict and as cancellable as the real ones."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from blueflow.errors import InvariantError, OutputLockedError
from blueflow.events import Position
from blueflow.interfaces import Batch, Sink, Source
from blueflow.testing.faults import Faults

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from blueflow.events import Event


class MemoryStore:
    """What outlives a `MemorySink`: hand the same store to the next one and it is a restart."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.positions: dict[str, Position] = {}
        self.writer: MemorySink | None = None  # the newest; it fenced the others


class MemorySink(Sink):
    """Keeps events and positions in a `MemoryStore`.

    Args:
        faults: steps once in every `write` and once in every commit of a `flush`.
        store: shared with the sinks before and after; a new one when None.
        buffered: events become durable on `flush` only, as in a sink that commits by age.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        store: MemoryStore | None = None,
        buffered: bool = False,
    ) -> None:
        self.faults = faults or Faults()
        self.store = store or MemoryStore()
        self._buffered = buffered
        self._events: list[Event] = []
        self._positions: dict[str, Position] = {}

    @property
    def events(self) -> Sequence[Event]:
        """The durable events, in the order written."""
        return self.store.events

    async def resume(self) -> Mapping[str, Position]:
        """Fence the store's older writer and return the positions."""
        await checkpoint()
        self.store.writer = self
        return dict(self.store.positions)

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        """Take events and position; durable at once unless `buffered`.

        Raises:
            OutputLockedError: a newer sink has the store.
            InvariantError: the position goes back, or `resume` was not called.
        """
        await checkpoint()  # as cancellable as a real one; nothing is taken before
        self.faults.step()
        self._check_writer()
        last = self._positions.get(through.source) or self.store.positions.get(through.source)
        if last is not None and through.seq < last.seq:
            raise InvariantError(f"the position of {last.source} never goes back from {last.seq}")
        self._events.extend(events)
        self._positions[through.source] = through
        if not self._buffered:
            self._commit()

    async def flush(self) -> None:
        """Make everything written durable; raises what `write` raises."""
        await checkpoint()
        self._check_writer()
        if self._positions:
            self.faults.step()
            self._commit()

    @property
    def durable(self) -> Mapping[str, Position]:
        """The positions in the store."""
        return dict(self.store.positions)

    async def close(self) -> None:
        """Forget what was not flushed."""
        self._events.clear()
        self._positions.clear()
        if self.store.writer is self:
            self.store.writer = None

    def _commit(self) -> None:
        self.store.events.extend(self._events)
        self.store.positions.update(self._positions)
        self._events.clear()
        self._positions.clear()

    def _check_writer(self) -> None:
        if self.store.writer is self:
            return
        if self.store.writer is None:
            raise InvariantError("a sink is resumed before it is written to")
        raise OutputLockedError("the memory store", "a newer sink")


class ListSource(Source):
    """Plays prepared batches.

    Args:
        batches: in order; their events and positions carry `name` as source.
        name: what the source is called.
        simulated: whether the data counts as made up.
        endless: wait for `stop` behind the last batch, as a live relay does, instead of ending.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        *,
        name: str = "list.example",
        simulated: bool = True,
        endless: bool = False,
    ) -> None:
        self._batches = list(batches)
        self._name, self._simulated, self._endless = name, simulated, endless
        self._after: Position | None = None
        self._stopped = anyio.Event()

    @property
    def name(self) -> str:
        """The name given."""
        return self._name

    @property
    def simulated(self) -> bool:
        """As given."""
        return self._simulated

    async def start(self, after: Position | None) -> None:
        """Begin behind `after`; None is the first batch."""
        await checkpoint()
        self._after = after

    async def __aiter__(self) -> AsyncIterator[Batch]:
        """Hand over the batches that are not wholly behind the start."""
        reached: int | None = None
        for batch in self._batches:
            await checkpoint()
            if self._stopped.is_set():
                return
            rest = self._behind_start(batch, reached)
            reached = batch.through.seq if batch.through else reached
            if rest is not None:
                yield rest
        if self._endless:
            await self._stopped.wait()

    async def stop(self) -> None:
        """End the iteration before the next batch."""
        self._stopped.set()
        await checkpoint()

    def _behind_start(self, batch: Batch, reached: int | None) -> Batch | None:
        after = self._after
        if after is None or batch.through is None or (reached or 0) >= after.seq:
            return batch
        if batch.through.seq <= after.seq:
            return None
        events = [event for event in batch.events if event.seq > after.seq]
        return Batch(events, batch.through, batch.frames, batch.frame_bytes, batch.rejected)


def batches_of(events: Sequence[Event], size: int, *, source: str = "list.example") -> list[Batch]:
    """Cut events into batches of about `size`, never within a seq (a commit stays whole)."""
    batches: list[Batch] = []
    taken: list[Event] = []
    for event, following in zip_longest(events, events[1:]):
        taken.append(event)
        if following is None or (len(taken) >= size and following.seq != event.seq):
            newest_us = max(one.time_us for one in taken)
            if batches and batches[-1].through is not None:
                newest_us = max(newest_us, batches[-1].through.time_us)
            batches.append(Batch(taken, Position(source, event.seq, newest_us), len(taken)))
            taken = []
    return batches
