"""The contracts can fail: each broken sink or source is caught, by the test that is meant to."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from anyio.lowlevel import checkpoint

from blueflow.events import Position, encode_event
from blueflow.interfaces import Batch
from blueflow.testing.contracts import SinkContract, SourceContract, contract_events
from blueflow.testing.memory import ListSource, MemorySink, MemoryStore, batches_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.interfaces import Sink, Source


class Forgetful(MemorySink):
    """Reports a position and keeps it in its head."""

    async def close(self) -> None:
        self.store.positions.clear()


class Lossy(MemorySink):
    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        await super().write(events[:-1], through=through)


class Doubling(MemorySink):
    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        await super().write([*events, *events[:1]], through=through)


class Disordered(MemorySink):
    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        await super().write(events[::-1], through=through)


class Changing(MemorySink):
    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        changed = [msgspec.structs.replace(event, did=event.did.lower() + "x") for event in events]
        await super().write(changed, through=through)


class EventsFirst(MemorySink):
    """Stores events, waits, then stores the position: a cancellation between doubles."""

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        self.store.events.extend(events)
        await super().write([], through=through)


class PositionFirst(MemorySink):
    """Stores the position, waits, then stores the events: a cancellation between loses."""

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        await super().write([], through=through)
        await checkpoint()
        self.store.events.extend(events)


class Boasting(MemorySink):
    """Says durable of what it only buffers."""

    @property
    def durable(self) -> Mapping[str, Position]:
        return {**self.store.positions, **self._positions}


class Unfenced(MemorySink):
    async def resume(self) -> Mapping[str, Position]:
        return dict(self.store.positions)

    def _check_writer(self) -> None:
        pass


class OneEpoch(MemorySink):
    """Believes that there is one source."""

    def _commit(self) -> None:
        self.store.positions.clear()
        super()._commit()


class Deaf(MemorySink):
    """Does nothing without events."""

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        if events:
            await super().write(events, through=through)


class DropsLate(MemorySink):
    """Takes a low seq for a replay."""

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        last = self.store.positions.get(through.source)
        new = [event for event in events if last is None or event.seq > last.seq]
        await super().write(new, through=through)


@pytest.mark.parametrize(
    ("sink", "caught_by"),
    [
        (Forgetful, "a_flush_makes_events_and_position_durable"),
        (Lossy, "every_event_arrives_whole"),
        (Doubling, "every_event_arrives_whole"),
        (Disordered, "batches_keep_the_order_of_an_account"),
        (Changing, "every_event_arrives_whole"),
        (EventsFirst, "cancelled_anywhere_in_a_write_it_has_all_or_nothing"),
        (PositionFirst, "cancelled_anywhere_in_a_write_it_has_all_or_nothing"),
        (Boasting, "durable_is_never_ahead"),
        (Unfenced, "there_is_never_a_second_writer"),
        (OneEpoch, "an_epoch_has_a_position_of_its_own"),
        (Deaf, "a_position_moves_without_events"),
        (DropsLate, "a_late_event_at_or_below_the_position_is_kept"),
    ],
)
async def test_a_broken_sink_is_caught(sink: type[MemorySink], caught_by: str) -> None:
    class Contract(SinkContract):
        def __init__(self) -> None:
            self.store = MemoryStore()

        async def make_sink(self) -> Sink:
            return sink(store=self.store, buffered=sink is Boasting)

        async def stored_events(self) -> Sequence[Mapping[str, Any]]:
            return [msgspec.json.decode(encode_event(event)) for event in self.store.events]

    assert caught_by in await failures(Contract)


class Renamed(ListSource):
    """Has a new name after every start."""

    made = 0

    def __init__(self, batches: Sequence[Batch]) -> None:
        Renamed.made += 1
        super().__init__(batches, name=f"list.example:{Renamed.made}")


class Repeating(ListSource):
    """Begins at its position instead of behind it."""

    async def start(self, after: Position | None) -> None:
        await super().start(Position(after.source, after.seq - 1) if after else None)


class Backwards(ListSource):
    async def __aiter__(self) -> AsyncIterator[Batch]:
        async for batch in super().__aiter__():
            assert batch.through is not None
            yield batch
            yield Batch([], Position(self.name, batch.through.seq - 1))


class Unstoppable(ListSource):
    async def stop(self) -> None:
        await checkpoint()


class Ahead(ListSource):
    """Gives the position before the events that it covers."""

    async def __aiter__(self) -> AsyncIterator[Batch]:
        async for batch in super().__aiter__():
            assert batch.through is not None
            for event in batch.events:
                yield Batch([event], Position(self.name, max(event.seq - 1, 0)))


@pytest.mark.parametrize(
    ("source", "caught_by"),
    [
        (Renamed, "the_name_is_stable"),
        (Repeating, "a_resume_gives_exactly_what_follows"),
        (Backwards, "the_position_never_goes_back"),
        (Unstoppable, "stop_ends_a_wait_for_more"),
        (Ahead, "every_event_comes_once_and_in_order"),
    ],
)
async def test_a_broken_source_is_caught(
    source: type[ListSource], caught_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blueflow.testing.sourcecontract._WAIT_S", 0.2)
    events = contract_events("list.example", 20)

    class Contract(SourceContract):
        async def make_source(self) -> Source:
            if source is Unstoppable:
                return source(batches_of(events, 6), endless=True)
            return source(batches_of(events, 6))

        async def expected_events(self) -> Sequence[Event]:
            return events

    assert caught_by in await failures(Contract)


async def failures(contract: type[SinkContract | SourceContract]) -> set[str]:
    """Return the names of the contract's tests that fail, each on a new store."""
    failed = set()
    for name, _ in inspect.getmembers(contract, inspect.iscoroutinefunction):
        if name.startswith("test_"):
            try:
                await getattr(contract(), name)()
            except (AssertionError, TimeoutError):
                failed.add(name.removeprefix("test_"))
    return failed
