"""What every sink has to keep. Public in `blueflow.testing.contracts`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from blueflow.errors import BlueflowError
from blueflow.events import Position, encode_event
from blueflow.testing.faults import cancel_at
from blueflow.testing.samples import HOUR_US, T0_US, contract_events, expect, odd_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.interfaces import Sink


class OutputContract(ABC):
    """What every sink keeps, also one without a position: all events, whole and in order."""

    source: ClassVar[str] = "contract.example"  # what events and positions carry
    cut_by_hour: ClassVar[bool] = False  # the store orders an account's events within an hour only

    @abstractmethod
    async def make_sink(self) -> Sink:
        """Return a new sink over the store of this test; called again it is a restart."""

    @abstractmethod
    async def stored_events(self) -> Sequence[Mapping[str, Any]]:
        """Return what a reader of the store finds now: decoded wire JSON, in the order read."""

    async def test_every_event_arrives_whole(self) -> None:
        """All kinds, all operations, and whatever JSON can hold."""
        await self._write_and_check(
            [*contract_events(self.source, 40), *odd_events(self.source, 41)]
        )

    async def test_a_large_batch_arrives(self) -> None:
        """Several thousand events in one write, spread over two days."""
        await self._write_and_check(contract_events(self.source, 2_000, step_us=86_400_000))

    async def test_batches_keep_the_order_of_an_account(self) -> None:
        """Within a collection, whatever the times say: relay times are claims."""
        events = contract_events(self.source, 60, step_us=-400_000)
        await self._write_and_check(events, batch_size=7)

    async def test_writes_without_events_are_fine(self) -> None:
        """A quiet source still has a position to tell."""
        async with self._opened() as (sink, _):
            for seq in (5, 5, 9):
                await sink.write([], through=Position(self.source, seq, T0_US))
            await sink.flush()
            await sink.flush()
        self._check_stored(await self.stored_events(), [])

    async def test_a_sink_that_got_nothing_flushes_and_closes(self) -> None:
        """The shortest life there is."""
        async with self._opened() as (sink, positions):
            expect(not positions, f"a new store has no position, yet resume() gave {positions}")
            await sink.flush()
        self._check_stored(await self.stored_events(), [])

    async def _write_and_check(self, events: Sequence[Event], batch_size: int = 10_000) -> None:
        async with self._opened() as (sink, _):
            for batch in _batches(events, batch_size):
                await sink.write(batch, through=_through(batch))
            await sink.flush()
        self._check_stored(await self.stored_events(), events)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[tuple[Sink, Mapping[str, Position]]]:
        sink = await self.make_sink()
        try:
            yield sink, await sink.resume()
        finally:
            await sink.close()

    def _check_stored(self, stored: Sequence[Mapping[str, Any]], expected: Sequence[Event]) -> None:
        wanted = [_wire(event) for event in expected]
        there, due = Counter(map(_key, stored)), Counter(map(_key, wanted))
        expect(not due - there, f"lost (source, seq, op_index): {sorted(due - there)[:5]}")
        expect(not there - due, f"doubled or unknown events: {sorted(there - due)[:5]}")
        by_key = {_key(event): event for event in wanted}
        for event in stored:
            expect(event == by_key[_key(event)], f"{_key(event)} came back changed")
        expect(
            self._by_account(stored) == self._by_account(wanted),
            "the events of an account and collection are not in the order written",
        )

    def _by_account(self, events: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Any]]:
        groups: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for event in events:
            collection = event.get("commit", {}).get("collection")
            hour = event["time_us"] // HOUR_US if self.cut_by_hour else None
            groups[event["did"], collection, hour].append(_key(event))
        return groups


class SinkContract(OutputContract):
    """What a sink with a position keeps: events and position become durable together or neither."""

    async def test_a_flush_makes_events_and_position_durable(self) -> None:
        """Seen by `durable`, by a reader, and by a restart."""
        events = contract_events(self.source, 10)
        async with self._opened() as (sink, _):
            await sink.write(events, through=_through(events))
            await sink.flush()
            expect(
                sink.durable == {self.source: _through(events)},
                f"after a flush durable is {dict(sink.durable)}",
            )
            self._check_stored(await self.stored_events(), events)
        expect(await self._restart(events) == _through(events).seq, "a flushed position is gone")

    async def test_a_close_without_a_flush_leaves_nothing_half(self) -> None:
        """Close is what comes after a failure; it makes nothing durable half."""
        events = contract_events(self.source, 30)
        async with self._opened() as (sink, _):
            for batch in _batches(events, 8):
                await sink.write(batch, through=_through(batch))
        await self._restart(events)

    async def test_a_restart_goes_on_without_loss_or_doubling(self) -> None:
        """Five lives, each of which dies in the middle, and every event is there once."""
        events = contract_events(self.source, 50)
        for life in range(5):
            async with self._opened() as (sink, positions):
                rest = _behind(events, positions.get(self.source))
                for number, batch in enumerate(_batches(rest, 5)):
                    await sink.write(batch, through=_through(batch))
                    if number == life:
                        await sink.flush()
                    if number == life + 2:
                        break
            await self._restart(events)
        async with self._opened() as (sink, positions):
            rest = _behind(events, positions.get(self.source))
            await sink.write(rest, through=_through(events))
            await sink.flush()
        self._check_stored(await self.stored_events(), events)

    async def test_a_position_moves_without_events(self) -> None:
        """The cursor advances past filtered events too."""
        position = Position(self.source, 77, T0_US)
        async with self._opened() as (sink, _):
            await sink.write([], through=position)
            await sink.flush()
        async with self._opened() as (_, positions):
            expect(positions == {self.source: position}, f"resume() gave {dict(positions)}")
        self._check_stored(await self.stored_events(), [])

    async def test_positions_are_64_bit(self) -> None:
        """Live seqs are above 31 billion."""
        position = Position(self.source, 2**53 - 1, 2**53 - 1)
        async with self._opened() as (sink, _):
            await sink.write([], through=position)
            await sink.flush()
        async with self._opened() as (_, positions):
            expect(positions == {self.source: position}, f"resume() gave {dict(positions)}")

    async def test_an_epoch_has_a_position_of_its_own(self) -> None:
        """After a relay restarted its sequence, low seqs are new events of `source#2`."""
        old, new = contract_events(self.source, 9), contract_events(f"{self.source}#2", 4)
        async with self._opened() as (sink, _):
            await sink.write(old, through=_through(old))
            await sink.write(new, through=_through(new))
            await sink.flush()
        async with self._opened() as (_, positions):
            expected = {self.source: _through(old), f"{self.source}#2": _through(new)}
            expect(positions == expected, f"resume() gave {dict(positions)}")
        self._check_stored(await self.stored_events(), [*old, *new])

    async def test_a_late_event_at_or_below_the_position_is_kept(self) -> None:
        """A seq that fell into a gap comes behind its successors; sinks drop nothing."""
        events = contract_events(self.source, 12)
        gap = events[len(events) // 2].seq
        late = [event for event in events if event.seq == gap]
        rest = [event for event in events if event.seq != gap]
        async with self._opened() as (sink, _):
            await sink.write(rest, through=_through(rest))
            await sink.flush()
            await sink.write(late, through=_through(rest))
            await sink.flush()
        stored = await self.stored_events()
        there = Counter(map(_key, stored))
        expect(
            there == Counter(_key(_wire(event)) for event in events),
            f"the late event is there {[there[_key(_wire(event))] for event in late]} times",
        )

    async def test_resume_again_changes_nothing(self) -> None:
        """Recovery may be cut off and done again as often as it likes."""
        events = contract_events(self.source, 20)
        async with self._opened() as (sink, _):
            await sink.write(events, through=_through(events))
            await sink.flush()
            await sink.write([], through=Position(self.source, 500, T0_US))
        first = await self._restart(events)
        for _ in range(3):
            expect(await self._restart(events) == first, "a second resume() found another place")

    async def test_durable_is_never_ahead(self) -> None:
        """Neither of what was written nor of what a restart finds."""
        events = contract_events(self.source, 40)
        promised: Position | None = None
        async with self._opened() as (sink, _):
            for batch in _batches(events, 6):
                await sink.write(batch, through=_through(batch))
                promised = sink.durable.get(self.source)
                expect(
                    promised is None or promised.seq <= _through(batch).seq,
                    f"durable is {promised}, written is {_through(batch)}",
                )
        found = await self._restart(events)
        expect(
            promised is None or found >= promised.seq,
            f"durable said {promised}, a restart finds {found}",
        )

    async def test_there_is_never_a_second_writer(self) -> None:
        """The second is refused, or the first cannot write any more."""
        events = contract_events(self.source, 30)
        first, second = await self.make_sink(), await self.make_sink()
        batches = _batches(events, 10)
        try:
            await first.resume()
            await first.write(batches[0], through=_through(batches[0]))
            await first.flush()
            try:
                positions = await second.resume()
            except BlueflowError:
                writer = first
            else:
                writer = second
                expect(
                    positions.get(self.source) == _through(batches[0]),
                    f"the second writer starts at {positions}",
                )
                await _expect_fenced(first, batches[1])
            await writer.write(batches[1], through=_through(batches[1]))
            await writer.flush()
        finally:
            await first.close()
            await second.close()
        self._check_stored(await self.stored_events(), [*batches[0], *batches[1]])

    async def test_cancelled_anywhere_in_a_write_it_has_all_or_nothing(self) -> None:
        """Cancelled at each suspension in turn, then closed and started again."""
        await self._sweep(flushed_before=False, flushed_after=False)

    async def test_cancelled_anywhere_in_a_flush_it_has_all_or_nothing(self) -> None:
        """As for a write: a stop may come at any moment."""
        await self._sweep(flushed_before=True, flushed_after=False)

    async def test_after_a_cancelled_write_a_flush_is_sound(self) -> None:
        """SIGTERM: the write is cancelled, then the sink drains."""
        await self._sweep(flushed_before=False, flushed_after=True)

    async def _sweep(self, *, flushed_before: bool, flushed_after: bool) -> None:
        events: list[Event] = []
        for suspension in count(1):
            async with self._opened() as (sink, positions):
                last = positions.get(self.source)
                first_seq = last.seq + 1 if last else 1
                batch = contract_events(self.source, 5, first_seq=first_seq)
                step = partial(sink.write, batch, through=_through(batch))
                if flushed_before:
                    await step()
                    step = sink.flush  # type: ignore[assignment]
                reached = await cancel_at(suspension, step)
                if flushed_after:
                    await sink.flush()
            found = await self._restart([*events, *batch])
            if found >= first_seq:
                events += batch
            if not reached:
                return

    async def _restart(self, written: Sequence[Event]) -> int:
        """Start again, check that exactly the events up to the position are there; return it."""
        async with self._opened() as (sink, positions):
            expect(
                set(positions) <= {self.source}, f"resume() gave a foreign position: {positions}"
            )
            position = positions.get(self.source)
            expect(sink.durable == positions, "durable differs from what resume() gave")
        seq = position.seq if position else 0
        covered = [event for event in written if event.seq <= seq]
        self._check_stored(await self.stored_events(), covered)
        return seq


def _batches(events: Sequence[Event], size: int) -> list[list[Event]]:
    batches: list[list[Event]] = []
    for event in events:
        if not batches or (len(batches[-1]) >= size and batches[-1][-1].seq != event.seq):
            batches.append([])
        batches[-1].append(event)
    return batches


def _through(events: Sequence[Event]) -> Position:
    last = events[-1]
    return Position(last.source, last.seq, max(0, *(event.time_us for event in events), 0))


def _behind(events: Sequence[Event], position: Position | None) -> list[Event]:
    seq = position.seq if position else 0
    return [event for event in events if event.seq > seq]


def _wire(event: Event) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(encode_event(event))
    return decoded


def _key(event: Mapping[str, Any]) -> tuple[str, int, int]:
    return event["source"], event["seq"], event["op_index"]


async def _expect_fenced(sink: Sink, batch: Sequence[Event]) -> None:
    try:
        await sink.write(batch, through=_through(batch))
        await sink.flush()
    except BlueflowError:
        return
    raise AssertionError("the first of two writers can still write")
