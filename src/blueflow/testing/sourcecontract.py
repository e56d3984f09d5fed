"""What every source has to keep. Public in `blueflow.testing.contracts`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import anyio

from blueflow.testing.samples import expect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event, Position
    from blueflow.interfaces import Batch, Source

_WAIT_S = 20.0


class SourceContract(ABC):
    """What every source keeps: a name, an order, and a place to go on from."""

    @abstractmethod
    async def make_source(self) -> Source:
        """Return a new source over the same data, not started."""

    @abstractmethod
    async def expected_events(self) -> Sequence[Event]:
        """Return every event that a source started at the beginning gives, in order."""

    async def test_the_name_is_stable(self) -> None:
        """And so is whether the data is made up: a sink's folder depends on both."""
        first, second = await self.make_source(), await self.make_source()
        expect(bool(first.name), "a source has a name")
        expect(
            (first.name, first.simulated) == (second.name, second.simulated),
            f"two sources over the same data are {first.name} and {second.name}",
        )

    async def test_every_event_comes_once_and_in_order(self) -> None:
        """With the source's name, and covered by the position of its batch."""
        batches = await self._read(None, await self.expected_events())
        name = (await self.make_source()).name
        for batch in batches:
            for event in batch.events:
                expect(event.source == name, f"an event of {event.source} came from {name}")
                expect(
                    batch.through is not None and event.seq <= batch.through.seq,
                    f"seq {event.seq} is beyond its batch's position {batch.through}",
                )

    async def test_the_position_never_goes_back(self) -> None:
        """Neither its seq nor its time."""
        last: Position | None = None
        for batch in await self._read(None, await self.expected_events()):
            if batch.through is not None:
                expect(
                    last is None
                    or (batch.through.seq >= last.seq and batch.through.time_us >= last.time_us),
                    f"{batch.through} comes after {last}",
                )
                last = batch.through
        expect(last is not None, "there was no position at all")

    async def test_a_resume_gives_exactly_what_follows(self) -> None:
        """Behind every position that was handed out."""
        expected = await self.expected_events()
        batches = await self._read(None, expected)
        for index, batch in enumerate(batches[:-1]):
            if batch.through is not None:
                seen = sum(len(one.events) for one in batches[: index + 1])
                if seen < len(expected):
                    await self._read(batch.through, expected[seen:])

    async def test_stop_ends_the_iteration(self) -> None:
        """In the middle of the data; and it may be called twice."""
        source = await self.make_source()
        await source.start(None)
        with anyio.fail_after(_WAIT_S):
            async for _ in source:
                await source.stop()
            await source.stop()

    async def test_stop_ends_a_wait_for_more(self) -> None:
        """Behind the last event a relay has nothing to say; a recording has ended by itself."""
        source, events = await self.make_source(), await self.expected_events()
        await source.start(None)
        seen = 0
        enough = anyio.Event()

        async def read() -> None:
            nonlocal seen
            async for batch in source:
                seen += len(batch.events)
                if seen >= len(events):
                    enough.set()

        with anyio.fail_after(_WAIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await enough.wait()
                await source.stop()
        expect(seen == len(events), f"{seen} events instead of {len(events)}")

    async def _read(self, after: Position | None, expected: Sequence[Event]) -> list[Batch]:
        source = await self.make_source()
        await source.start(after)
        batches: list[Batch] = []
        events: list[Event] = []
        with anyio.fail_after(_WAIT_S):
            async for batch in source:
                batches.append(batch)
                events += batch.events
                if len(events) >= len(expected):
                    await source.stop()  # a live relay would wait for more
        for number, (event, due) in enumerate(zip(events, expected, strict=False)):
            expect(event == due, f"event {number} behind {after} is {event}, due is {due}")
        expect(
            len(events) == len(expected),
            f"behind {after} came {len(events)} events, due are {len(expected)}",
        )
        return batches
