"""One source to one sink: what arrives, in which order, and what a failure anywhere leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import blueflow.pipeline
from blueflow.cursor import position_behind
from blueflow.errors import (
    CursorError,
    DrainTimeoutError,
    InvariantError,
    OutputIOError,
    RelayUnavailableError,
)
from blueflow.events import Position, encode_event
from blueflow.files.jsonl import JsonlSink
from blueflow.files.stdout import StdoutSink
from blueflow.interfaces import Batch, Rejected, Sink
from blueflow.metrics import Metrics
from blueflow.pipeline import Flow, newest, pump
from blueflow.quarantine import Quarantine
from blueflow.testing.contracts import contract_events
from blueflow.testing.faults import Faults, cancel_at
from blueflow.testing.memory import ListSource, MemorySink, MemoryStore, batches_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from blueflow.events import Event

NAME = "list.example"
EVENTS = contract_events(NAME, 40)
BATCHES = batches_of(EVENTS, 5)
LAST = BATCHES[-1].through
FULL = OutputIOError("memory", "no space left")
AWAY = RelayUnavailableError("wss://host", 1, "refused")
TICKS_S = 0.02  # in place of a second


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueflow.pipeline, "TICK_S", TICKS_S)


def filtered(seq: int) -> Batch:
    """Return a batch of frames in which nothing was wanted."""
    return Batch((), Position(NAME, seq, 0), 1, 100)


class Calls(MemorySink):
    """Remembers what it was called with; a call that begins within another fails."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.writes: list[tuple[int, int]] = []  # events, seq
        self.busy = False
        self.ended: list[str] = []
        self.anchoring = not self.store.positions
        self.changed = anyio.Event()

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        assert not self.busy
        self.busy = True
        await asyncio.sleep(0)
        await super().write(events, through=through)
        self.busy = False
        self.writes.append((len(events), through.seq))
        self.changed.set()
        self.changed = anyio.Event()

    async def flush(self) -> None:
        assert not self.busy
        if self.anchoring and self.writes:  # a live start's first position is durable at once
            self.anchoring = False
        else:
            self.ended.append("flush")
        await super().flush()

    async def close(self) -> None:
        self.ended.append("close")
        await super().close()


class Feed(ListSource):
    """Gives batches as a test puts them, and an error when it is one."""

    def __init__(self) -> None:
        super().__init__([])
        self._queue: asyncio.Queue[Batch | Exception] = asyncio.Queue()
        self.put = self._queue.put_nowait
        self.stops = 0

    async def __aiter__(self) -> AsyncIterator[Batch]:
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()


async def test_everything_arrives_once_in_order_and_is_durable() -> None:
    sink, flow = Calls(buffered=True), Flow()
    assert await pump(ListSource(BATCHES), sink, flow=flow) is flow
    assert sink.events == EVENTS
    assert sink.durable == {NAME: LAST}
    assert sink.ended == ["flush", "close"]
    assert sink.writes == [(len(b.events), b.through.seq) for b in BATCHES if b.through]
    assert (flow.events, flow.frames, flow.position, flow.durable) == (
        len(EVENTS), sum(batch.frames for batch in BATCHES), LAST, LAST,
    )  # fmt: skip
    assert flow.by_dataset.total() == len(EVENTS)


async def test_an_empty_source_is_a_run_without_a_write() -> None:
    sink = Calls()
    flow = await pump(ListSource([]), sink)
    assert (sink.writes, sink.ended) == ([], ["flush", "close"])
    assert flow.position is None


async def test_the_source_begins_behind_what_the_sink_has() -> None:
    store = MemoryStore()
    for end in (0, 3, 3, 6):
        await pump(ListSource(BATCHES[:end]), MemorySink(store=store))
    flow = await pump(ListSource(BATCHES), MemorySink(store=store))
    assert store.events == EVENTS
    assert flow.events == sum(len(batch.events) for batch in BATCHES[6:])


async def test_accept_is_asked_before_the_source_begins() -> None:
    store = MemoryStore()
    seen: list[Position | None] = []
    await pump(ListSource(BATCHES[:3]), MemorySink(store=store), accept=seen.append)

    def refuse(after: Position | None) -> None:
        seen.append(after)
        raise CursorError("live", "no")

    feed, sink = Feed(), Calls(store=store)
    with pytest.raises(CursorError):
        await pump(feed, sink, accept=refuse)
    assert seen == [None, BATCHES[2].through]
    assert feed._after is None
    assert sink.writes == []
    assert sink.ended == ["close"]


# Positions


def test_newest_is_the_last_epoch_of_this_source() -> None:
    positions = {
        "host": Position("host", 900),
        "host#2": Position("host#2", 50),
        "host#10": Position("host#10", 7),
        "other#99": Position("other#99", 1),
    }
    assert newest(positions, "host") == Position("host#10", 7)
    assert newest(positions, "host#2") == Position("host#10", 7)
    assert newest(positions, "other") == Position("other#99", 1)
    assert newest(positions, "nobody") is None
    assert newest({}, "host") is None


async def test_an_epoch_goes_on_where_it_was() -> None:
    store = MemoryStore()
    store.positions = {NAME: Position(NAME, 900), f"{NAME}#2": Position(f"{NAME}#2", 5)}
    source = ListSource([])
    await pump(source, MemorySink(store=store))
    assert source._after == Position(f"{NAME}#2", 5)


@pytest.mark.usefixtures("quick_ticks")
async def test_filtered_batches_move_the_position_while_they_flow() -> None:
    feed, sink = Feed(), Calls()
    running = asyncio.ensure_future(pump(feed, sink))
    try:
        with anyio.fail_after(20):
            for seq in count(1):
                feed.put(filtered(seq))
                await asyncio.sleep(TICKS_S / 10)
                if len(sink.writes) >= 3:
                    break
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert all(events == 0 for events, _ in sink.writes)
    seqs = [seq for _, seq in sink.writes]
    assert seqs == sorted(set(seqs))


@pytest.mark.usefixtures("quick_ticks")
async def test_an_idle_sink_is_called_and_an_idle_source_is_left_in_peace() -> None:
    """`Feed` is an async generator: a cancelled wait for its next batch would end it."""
    feed, sink = Feed(), Calls()
    running = asyncio.ensure_future(pump(feed, sink))
    try:
        with anyio.fail_after(20):
            await asyncio.sleep(3 * TICKS_S)
            assert sink.writes == []  # there is no position to tell
            feed.put(BATCHES[0])
            while len(sink.writes) < 4:
                await sink.changed.wait()
            feed.put(BATCHES[1])
            while sink.writes[-1][1] != BATCHES[1].through.seq:  # type: ignore[union-attr]
                await sink.changed.wait()
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert sink.writes[0][0] == len(BATCHES[0].events)
    assert [events for events, _ in sink.writes[1:4]] == [0, 0, 0]
    assert sink.events == [*BATCHES[0].events, *BATCHES[1].events]


@pytest.mark.usefixtures("quick_ticks")
async def test_a_tick_never_tells_a_position_before_its_events() -> None:
    """A sink so slow that ticks are due all the time."""

    class Slow(Calls):
        async def write(self, events: Sequence[Event], *, through: Position) -> None:
            await asyncio.sleep(TICKS_S)
            await super().write(events, through=through)
            covered = [event for event in EVENTS if event.seq <= through.seq]
            assert self.events == covered

    sink = Slow()
    await pump(ListSource(BATCHES), sink)
    assert sink.events == EVENTS


async def test_a_batch_without_a_position_is_passed_over() -> None:
    sink = Calls()
    flow = await pump(ListSource([Batch((), None, 3, 30), *BATCHES]), sink)
    assert flow.frames == 3 + sum(batch.frames for batch in BATCHES)
    assert sink.events == EVENTS


# Limits

REPEATED = {event.seq for event in EVENTS if event.op_index}


@pytest.mark.parametrize("limit", range(1, len(EVENTS) + 2))
async def test_a_limit_ends_behind_a_whole_commit_and_the_next_run_goes_on(limit: int) -> None:
    store = MemoryStore()
    flow = await pump(ListSource(BATCHES), MemorySink(store=store), limit=limit)
    given = flow.events
    assert given == len(store.events)
    assert min(limit, len(EVENTS)) <= given <= limit + 1  # a commit here has two operations
    if given == limit + 1:
        assert EVENTS[limit].seq == EVENTS[limit - 1].seq
    await pump(ListSource(BATCHES), MemorySink(store=store))
    assert store.events == EVENTS


class NoPosition(Calls):
    keeps_position = False


@pytest.mark.parametrize("limit", range(1, len(EVENTS) + 2))
async def test_a_limit_is_exact_for_a_sink_without_a_position(limit: int) -> None:
    sink = NoPosition()
    await pump(ListSource(BATCHES), sink, limit=limit)
    assert sink.events == EVENTS[:limit]


def test_stdout_keeps_no_position_and_says_so() -> None:
    assert StdoutSink.keeps_position is False
    assert not hasattr(JsonlSink, "keeps_position")


async def test_a_limit_ends_a_source_that_would_wait_for_ever() -> None:
    with anyio.fail_after(10):
        flow = await pump(ListSource(BATCHES, endless=True), Calls(), limit=len(EVENTS))
    assert flow.position == LAST


async def test_lines_of_a_recording_are_cut_by_their_numbers() -> None:
    """Their events carry the source and the seq of the relay they once came from."""
    events = contract_events("relay.example", 6, first_seq=31_000_000_000)
    batch = Batch(events, Position(NAME, 20, 0), seqs=range(11, 11 + len(events)))
    sink = Calls()
    flow = await pump(ListSource([batch]), sink, limit=3)
    assert sink.events == events[:3]
    assert flow.position == Position(NAME, 13, 0)


async def test_a_cut_does_not_believe_a_time_that_the_source_does_not_believe() -> None:
    events = [msgspec.structs.replace(event, time_us=2**60) for event in EVENTS[:5]]
    batch = Batch(events, Position(NAME, 99, 1000))
    flow = await pump(ListSource([batch]), Calls(), limit=1)
    assert flow.position == Position(NAME, events[0].seq, 1000)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, Position | None]:
    """Give a batch with whole commits and late events, and the position before it."""
    before = draw(st.one_of(st.none(), st.builds(Position, st.just(NAME), st.integers(0, 15))))
    operations = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), max_size=12))
    seqs = [seq for seq, number in dict(operations).items() for _ in range(number)]
    events = [
        msgspec.structs.replace(EVENTS[0], seq=seq, op_index=index, time_us=draw(st.integers(0, 9)))
        for index, seq in enumerate(seqs)
    ]
    top = max([*seqs, before.seq if before else 0])
    return Batch(events, Position(NAME, top + draw(st.integers(0, 3)), 9)), before


@given(batches())
def test_a_position_covers_exactly_what_was_consumed(case: tuple[Batch, Position | None]) -> None:
    batch, before = case
    last = before
    for consumed in range(len(batch.events) + 1):
        position = position_behind(batch, consumed, before)
        rest = batch.events[consumed:]
        if position is None:
            if consumed:  # only where every position that covers the consumed covers others, too
                top = max([e.seq for e in batch.events[:consumed]] + [before.seq if before else 0])
                assert any(event.seq <= top for event in rest)
            continue
        if consumed:
            assert all(event.seq <= position.seq for event in batch.events[:consumed])
            assert all(event.seq > position.seq for event in rest)
        if last is not None:
            assert (position.seq, position.time_us) >= (last.seq, last.time_us)
        assert batch.through is not None
        assert position.seq <= max(batch.through.seq, before.seq if before else 0)
        assert position.time_us <= batch.through.time_us
        last = position
    assert last == (batch.through if batch.events else before)


# Ends


async def test_stop_drains() -> None:
    sink, feed, stop = Calls(buffered=True), Feed(), anyio.Event()
    endless = ListSource(BATCHES, endless=True)

    async def stop_when_all_is_taken() -> None:
        while not sink.writes or sink.writes[-1][1] != LAST.seq:  # type: ignore[union-attr]
            await sink.changed.wait()
        assert sink.durable != {NAME: LAST}
        stop.set()

    with anyio.fail_after(10):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stop_when_all_is_taken())
            await pump(endless, sink, stop=stop)
    assert sink.durable == {NAME: LAST}
    assert sink.ended == ["flush", "close"]
    assert feed.stops == 0


async def test_a_stop_before_the_start_still_closes() -> None:
    sink, stop = Calls(), anyio.Event()
    stop.set()
    with anyio.fail_after(10):
        await pump(ListSource(BATCHES, endless=True), sink, stop=stop)
    assert sink.ended == ["flush", "close"]


class Stuck(Calls):
    """A sink that never finishes what `where` names."""

    def __init__(self, where: str) -> None:
        super().__init__(buffered=True)
        self.where = where

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        if self.where == "write":
            self.changed.set()
            await asyncio.sleep(3600)
        await super().write(events, through=through)

    async def flush(self) -> None:
        if self.where == "flush":
            await asyncio.sleep(3600)
        await super().flush()


@pytest.mark.parametrize("where", ["write", "flush"])
async def test_a_sink_that_is_not_done_in_time_is_told(where: str) -> None:
    sink, stop, metrics = Stuck(where), anyio.Event(), Metrics()
    seen = sink.changed

    async def stop_soon() -> None:
        await seen.wait()
        stop.set()

    with anyio.fail_after(10):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stop_soon())
            source = ListSource(BATCHES, endless=True)
            with pytest.raises(DrainTimeoutError) as caught:
                await pump(source, sink, stop=stop, drain_s=0.01, metrics=metrics)
    assert caught.value.drain_s == 0.01
    assert sink.ended[-1] == "close"
    assert sink.durable == {}
    labels = {"stage": "drain", "reason": "timeout"}
    assert metrics.registry.get_sample_value("blueflow_pipeline_dropped_total", labels) == 1


async def test_a_source_that_does_not_stop_costs_the_drain_and_no_more() -> None:
    class Deaf(ListSource):
        async def stop(self) -> None:
            await asyncio.sleep(3600)

    sink, stop = Calls(), anyio.Event()
    stop.set()
    with anyio.fail_after(10), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blueflow.pipeline, "CLOSE_S", 0.01)
        with pytest.raises(DrainTimeoutError):
            await pump(Deaf(BATCHES, endless=True), sink, stop=stop, drain_s=0.01)
    assert sink.ended == ["close"]


# Failures

WRITES = len(BATCHES)


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("call", range(1, WRITES + 1))
async def test_a_sink_down_at_any_write_loses_and_doubles_nothing(
    call: int, *, buffered: bool
) -> None:
    store, faults, metrics = MemoryStore(), Faults(call, FULL), Metrics()
    sink = Calls(faults=faults, store=store, buffered=buffered)
    with pytest.raises(OutputIOError):  # a fault that never fires proves nothing
        await pump(ListSource(BATCHES), sink, metrics=metrics)
    assert faults.fired == 1
    assert sink.ended == ["close"]
    assert len(store.events) < len(EVENTS)
    labels = {"outcome": "error"}
    assert metrics.registry.get_sample_value("blueflow_sink_commits_total", labels) == 1
    await pump(ListSource(BATCHES), MemorySink(store=store))  # the restart
    assert store.events == EVENTS


async def test_a_sink_down_in_its_flush_loses_and_doubles_nothing() -> None:
    store, faults = MemoryStore(), Faults(WRITES + 2, FULL)  # one flush anchors the live start
    with pytest.raises(OutputIOError):
        await pump(ListSource(BATCHES), MemorySink(faults, store=store, buffered=True))
    assert faults.fired == 1
    assert len(store.events) < len(EVENTS)
    await pump(ListSource(BATCHES), MemorySink(store=store))
    assert store.events == EVENTS


@pytest.mark.parametrize("with_stop", [False, True])
@pytest.mark.parametrize("error", [InvariantError("x"), ZeroDivisionError("a bug")])
async def test_a_failing_source_closes_the_sink_without_a_flush_and_its_error_comes_alone(
    error: Exception, *, with_stop: bool
) -> None:
    feed, sink = Feed(), Calls(buffered=True)
    feed.put(BATCHES[0])
    feed.put(BATCHES[1])
    feed.put(error)
    with pytest.raises(type(error)) as caught:
        await pump(feed, sink, stop=anyio.Event() if with_stop else None)
    assert caught.value is error
    assert sink.ended == ["close"]
    assert sink.durable == {NAME: BATCHES[0].through}
    assert feed.stops >= 1


@pytest.mark.usefixtures("quick_ticks")
async def test_an_error_of_a_tick_comes_alone_too() -> None:
    feed, sink = Feed(), Calls(faults=Faults(2, FULL))
    feed.put(BATCHES[0])
    with pytest.raises(OutputIOError) as caught, anyio.fail_after(10):
        await pump(feed, sink)
    assert caught.value is FULL
    assert sink.ended == ["close"]


async def test_a_cause_is_kept() -> None:
    error = OutputIOError("disk", "full")
    error.__cause__ = OSError(28, "No space left on device")
    feed = Feed()
    feed.put(error)
    with pytest.raises(OutputIOError) as caught:
        await pump(feed, Calls(), stop=anyio.Event())
    assert isinstance(caught.value.__cause__, OSError)


class Broken(Calls):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    async def resume(self) -> Mapping[str, Position]:
        if self.where == "resume":
            raise FULL
        return await super().resume()

    async def close(self) -> None:
        await super().close()
        if self.where == "close":
            raise FULL


async def test_a_sink_that_cannot_resume_is_closed_and_nothing_is_read() -> None:
    feed, sink = Feed(), Broken("resume")
    with pytest.raises(OutputIOError):
        await pump(feed, sink)
    assert (sink.ended, sink.writes) == (["close"], [])


async def test_a_stop_does_not_wait_for_a_sink_that_cannot_begin() -> None:
    class Away(Calls):
        async def resume(self) -> Mapping[str, Position]:
            await anyio.sleep_forever()
            raise InvariantError("unreachable")

    stop, feed, sink = anyio.Event(), Feed(), Away()
    asyncio.get_running_loop().call_later(0.05, stop.set)
    with anyio.fail_after(5):
        flow = await pump(feed, sink, stop=stop)
    assert (sink.ended, sink.writes, flow.events) == (["close"], [], 0)


async def test_a_sink_that_cannot_resume_says_why_also_where_a_stop_is_possible() -> None:
    with pytest.raises(OutputIOError):
        await pump(Feed(), Broken("resume"), stop=anyio.Event())


async def test_an_error_while_closing_does_not_hide_the_first() -> None:
    feed, sink = Feed(), Broken("close")
    feed.put(AWAY)
    with pytest.raises(RelayUnavailableError):
        await pump(feed, sink)
    assert sink.ended == ["flush", "close"]
    with pytest.raises(OutputIOError):  # alone, it is told
        await pump(ListSource(BATCHES), Broken("close"))


async def test_a_source_that_fails_to_stop_does_not_keep_the_sink_open() -> None:
    class Bad(ListSource):
        async def stop(self) -> None:
            raise AWAY

    sink = Calls()
    with pytest.raises(RelayUnavailableError):
        await pump(Bad(BATCHES), sink)
    assert sink.ended == ["flush", "close"]


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("with_stop", [False, True])
async def test_cancelled_anywhere_it_loses_and_doubles_nothing(
    *, buffered: bool, with_stop: bool
) -> None:
    for suspension in count(1):
        store = MemoryStore()
        sink = Calls(store=store, buffered=buffered)
        source = ListSource(BATCHES)
        stop = anyio.Event() if with_stop else None
        reached = await cancel_at(suspension, partial(pump, source, sink, stop=stop))
        assert sink.ended.count("close") == 1
        assert store.writer is None
        covered = store.positions[NAME].seq if store.positions else 0
        assert store.events == [event for event in EVENTS if event.seq <= covered]
        await pump(ListSource(BATCHES), MemorySink(store=store))
        assert store.events == EVENTS
        if not reached:
            break
    assert suspension > WRITES


# The quarantine


def rejected(seq: int, reason: str = "cbor") -> Rejected:
    return Rejected(NAME, seq - 1, seq, None, reason, "broken", b"\x00" * 10)


async def test_rejected_input_goes_to_the_quarantine_and_the_flow_goes_on(tmp_path: Path) -> None:
    metrics = Metrics()
    quarantine = Quarantine(tmp_path / "quarantine", metrics)
    mixed = [
        msgspec.structs.replace(batch, rejected=(rejected(n), rejected(n)))
        for n, batch in enumerate(BATCHES, start=1)
    ]
    mixed.insert(2, Batch((), None, 1, 10, (rejected(99),)))  # before anything has a position
    sink = Calls()
    flow = await pump(ListSource(mixed), sink, quarantine=quarantine, metrics=metrics)
    assert sink.events == EVENTS
    assert flow.rejected == quarantine.count == 2 * len(BATCHES) + 1
    lines = (tmp_path / "quarantine" / "quarantine.jsonl").read_bytes().splitlines()
    assert len(lines) == flow.rejected


@pytest.mark.parametrize("with_folder", [False, True])
async def test_a_quarantine_that_cannot_be_written_costs_its_entries_alone(
    tmp_path: Path, *, with_folder: bool
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("x")
    mixed = [msgspec.structs.replace(batch, rejected=(rejected(1),)) for batch in BATCHES]
    quarantine = Quarantine(in_the_way / "below", Metrics()) if with_folder else None
    sink = Calls()
    flow = await pump(ListSource(mixed), sink, quarantine=quarantine)
    assert sink.events == EVENTS
    assert flow.rejected == len(BATCHES)


# Metrics


async def test_what_is_counted() -> None:
    metrics = Metrics()
    await pump(ListSource(BATCHES), Calls(), metrics=metrics)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"blueflow_{name}", labels)

    kinds = Counter(type(event).__name__ for event in EVENTS)
    assert value("pipeline_events_total", kind="commit") == kinds["RepoOp"]
    assert value("pipeline_events_total", kind="sync") == kinds["Sync"]
    deletes = sum(event.op_index for event in EVENTS)
    series = [s for m in metrics.registry.collect() for s in m.samples]
    operations = [s for s in series if s.name == "blueflow_pipeline_operations_total"]
    assert sum(s.value for s in operations) == kinds["RepoOp"]
    assert sum(s.value for s in operations if s.labels["operation"] == "delete") == deletes
    assert value("sink_written_events_total") == len(EVENTS)
    assert value("sink_commits_total", outcome="ok") == len(BATCHES)
    assert value("sink_commits_total", outcome="error") == 0
    assert value("sink_durable_seq") == EVENTS[-1].seq


# The real folder


def stored(folder: Path) -> list[Any]:
    paths = sorted(folder.glob("*/hour=*/*.jsonl.zst"))
    lines = [
        line
        for path in paths
        for line in zstandard.ZstdDecompressor()
        .stream_reader(path.read_bytes())
        .read()
        .splitlines()
    ]
    return sorted(
        (msgspec.json.decode(line) for line in lines), key=lambda e: (e["seq"], e["op_index"])
    )


DUE = [msgspec.json.decode(encode_event(event)) for event in EVENTS]


def folder_sink(folder: Path, **options: Any) -> JsonlSink:
    return JsonlSink(folder, origin_source=NAME, simulated=True, **options)


async def test_cancelled_anywhere_the_folder_is_whole(tmp_path: Path) -> None:
    for suspension in count(1):
        folder = tmp_path / str(suspension)
        sink = folder_sink(folder, commit_bytes_max=2000)
        source = ListSource(BATCHES[:4])
        reached = await cancel_at(suspension, partial(pump, source, sink))
        if (thread := sink._worker._thread) is not None:
            await asyncio.to_thread(thread.join, 10)  # cancelled in close(), it closes by itself
        await pump(ListSource(BATCHES), folder_sink(folder))
        assert stored(folder) == DUE
        if not reached:
            break
    assert suspension > 4


@pytest.mark.parametrize("limit", [1, 7, len(EVENTS)])
async def test_a_limited_run_into_a_folder_goes_on(tmp_path: Path, limit: int) -> None:
    for _ in range(2):
        await pump(ListSource(BATCHES), folder_sink(tmp_path / "out"), limit=limit)
    await pump(ListSource(BATCHES), folder_sink(tmp_path / "out"))
    assert stored(tmp_path / "out") == DUE


def test_the_doubles_here_are_sinks() -> None:
    doubles: Iterable[Callable[[], object]] = (Calls, NoPosition, lambda: Broken("close"))
    for make in doubles:
        assert isinstance(make(), Sink)


async def test_a_live_start_is_a_position_before_anything_else_is_taken() -> None:
    class Watched(Calls):
        async def write(self, events: Sequence[Event], *, through: Position) -> None:
            if self.writes:
                assert self.durable == {NAME: BATCHES[0].through}
            await super().write(events, through=through)
            if len(self.writes) == 2:
                raise ZeroDivisionError("a crash")

    sink = Watched(buffered=True)
    with pytest.raises(ZeroDivisionError):
        await pump(ListSource(BATCHES), sink)
    assert sink.events == list(BATCHES[0].events)


@pytest.mark.parametrize("with_stop", [False, True])
async def test_what_came_before_a_source_failed_is_made_durable(*, with_stop: bool) -> None:
    feed, sink = Feed(), Calls(buffered=True)
    for item in (BATCHES[0], BATCHES[1], AWAY):
        feed.put(item)
    with pytest.raises(type(AWAY)) as caught:
        await pump(feed, sink, stop=anyio.Event() if with_stop else None)
    assert caught.value is AWAY
    assert sink.ended == ["flush", "close"]
    assert sink.durable == {NAME: BATCHES[1].through}
