"""The memory doubles: as strict as the contract asks, and shared by a restart."""

from __future__ import annotations

from itertools import pairwise

import anyio
import pytest

from blueflow.errors import InvariantError, OutputIOError, OutputLockedError
from blueflow.events import Position
from blueflow.interfaces import Sink, Source
from blueflow.testing.contracts import contract_events
from blueflow.testing.faults import Faults
from blueflow.testing.memory import ListSource, MemorySink, MemoryStore, batches_of

EVENTS = contract_events("list.example", 12)
BATCHES = batches_of(EVENTS, 5)


def test_they_are_what_they_stand_for() -> None:
    assert isinstance(MemorySink(), Sink)
    assert isinstance(ListSource([]), Source)


async def test_a_store_outlives_its_sink() -> None:
    store = MemoryStore()
    first = MemorySink(store=store)
    await first.resume()
    await first.write(EVENTS, through=Position("list.example", 12))
    await first.close()
    second = MemorySink(store=store)
    assert await second.resume() == {"list.example": Position("list.example", 12)}
    assert second.events == EVENTS


async def test_a_planned_fault_comes_before_anything_is_stored() -> None:
    faults = Faults(2, OutputIOError("memory", "full"))
    sink = MemorySink(faults)
    await sink.resume()
    await sink.write(EVENTS[:2], through=Position("list.example", 2))
    with pytest.raises(OutputIOError):
        await sink.write(EVENTS[2:], through=Position("list.example", 12))
    assert faults.fired == 1
    assert sink.events == EVENTS[:2]
    assert sink.durable == {"list.example": Position("list.example", 2)}


async def test_a_buffered_sink_can_fail_in_its_flush() -> None:
    sink = MemorySink(Faults(2, OutputIOError("memory", "full")), buffered=True)
    await sink.resume()
    await sink.write(EVENTS, through=Position("list.example", 12))
    with pytest.raises(OutputIOError):
        await sink.flush()
    assert sink.durable == {}
    assert sink.events == []


async def test_the_callers_mistakes_are_errors() -> None:
    store = MemoryStore()
    sink = MemorySink(store=store)
    with pytest.raises(InvariantError, match="resumed before"):
        await sink.write([], through=Position("list.example", 1))
    await sink.resume()
    await sink.write([], through=Position("list.example", 5))
    with pytest.raises(InvariantError, match="never goes back from 5"):
        await sink.write([], through=Position("list.example", 4))
    await MemorySink(store=store).resume()
    with pytest.raises(OutputLockedError):
        await sink.flush()


def test_batches_keep_commits_whole() -> None:
    assert [event for batch in BATCHES for event in batch.events] == EVENTS
    seqs = [{event.seq for event in batch.events} for batch in BATCHES]
    assert all(left.isdisjoint(right) for left, right in pairwise(seqs))
    assert all(len(batch.events) >= 5 for batch in BATCHES[:-1])
    assert batches_of([], 5) == []


@pytest.mark.parametrize("seq", range(13))
async def test_a_list_source_begins_behind_any_seq(seq: int) -> None:
    source = ListSource(BATCHES)
    await source.start(Position("list.example", seq))
    seen = [event async for batch in source for event in batch.events]
    assert seen == [event for event in EVENTS if event.seq > seq]


async def test_an_endless_source_waits_until_it_is_stopped() -> None:
    source, seen = ListSource(BATCHES, endless=True), 0
    await source.start(None)
    with anyio.move_on_after(0.01) as scope:
        async for batch in source:
            seen += len(batch.events)
    assert scope.cancelled_caught
    assert seen == len(EVENTS)
