"""Rows in, commits out: when it commits, what it keeps, and files that have to be made anew."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from blueflow.errors import (
    CommitLogError,
    InputLostError,
    InvariantError,
    SettingError,
    StoreUnavailableError,
)
from blueflow.events import Position, encode_event
from blueflow.lake.layout import Shard, place_of
from blueflow.lake.logrecord import Description, Input, Lost, encode
from blueflow.lake.shard import ShardLog
from blueflow.lake.shardlogs import last_record
from blueflow.lake.shardwriter import Again, ShardWriter
from blueflow.lake.writer import LakeWriter
from blueflow.metrics import Metrics
from blueflow.testing.faults import Faults
from blueflow.testing.lakestore import MemoryObjects
from blueflow.testing.samples import HOUR_US, T0_US, contract_events

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event
    from blueflow.lake.logrecord import Reads

SOURCE = "writer.example"
TOPIC = "bluesky.posts/0"
DOWN = StoreUnavailableError("memory:lake", 0, "it is a test")
EVENTS = contract_events(SOURCE, 30, step_us=HOUR_US // 10)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def writer_of(
    store: MemoryObjects,
    *,
    reads: Reads = "source",
    interval_s: float = 60,
    bytes_max: int = 1 << 26,
    accept_loss: bool = False,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
) -> ShardWriter:
    log = ShardLog(store, Shard("default"), reads=reads, instance="test", clock=lambda: 1e9)
    return ShardWriter(
        log,
        (metrics or Metrics()).lake,
        commit_interval_s=interval_s,
        commit_bytes_max=bytes_max,
        lateness_s=300,
        accept_loss=accept_loss,
        clock=clock or Clock(),
    )


def visible(store: MemoryObjects) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for key, data in store.objects.items():
        if place_of(key):
            table = pq.read_table(io.BytesIO(data), columns=["seq", "op_index"])
            found.update(
                zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
            )
    return found


def ids(events: Sequence[Event]) -> Counter[tuple[int, int]]:
    return Counter((event.seq, event.op_index) for event in events)


def between(after: int, through: int) -> list[Event]:
    return [event for event in EVENTS if after < event.seq <= through]


async def take(writer: ShardWriter, after: int, through: int) -> None:
    await writer.room()
    writer.add_events(SOURCE, between(after, through), Input(through, T0_US))
    await writer.commit_if_due()


async def test_it_commits_by_age() -> None:
    store, clock = MemoryObjects(), Clock()
    writer = writer_of(store, clock=clock)
    await writer.begin()
    await take(writer, 0, 5)
    clock.now_s += 59
    await take(writer, 5, 6)
    assert visible(store) == Counter()
    clock.now_s += 1
    await take(writer, 6, 7)
    await writer.room()
    await writer.flush()
    assert visible(store) == ids(between(0, 7))
    assert writer.committed == {SOURCE: Input(7, T0_US)}
    await writer.close()


async def test_it_commits_by_size() -> None:
    store = MemoryObjects()
    writer = writer_of(store, bytes_max=1)
    await writer.begin()
    for seq in range(5):
        await take(writer, seq, seq + 1)
    await writer.flush()
    last = await last_record(store, Shard("default"))
    assert last is not None
    assert last.number >= 4
    assert visible(store) == ids(between(0, 5))
    await writer.close()


async def test_it_commits_when_an_hour_closes() -> None:
    store = MemoryObjects()
    writer = writer_of(store)
    await writer.begin()
    hour_us = T0_US // HOUR_US * HOUR_US
    writer.expect_nothing_before(hour_us + 10)
    await take(writer, 0, 5)
    writer.expect_nothing_before(hour_us + HOUR_US + 299_000_000)
    await writer.commit_if_due()
    assert not writer.committed
    writer.expect_nothing_before(hour_us + HOUR_US + 300_000_000)
    await writer.commit_if_due()
    await writer.flush()
    last = await last_record(store, Shard("default"))
    assert last is not None
    assert last.watermark_us == hour_us + HOUR_US + 300_000_000
    await writer.close()


async def test_a_commit_under_way_does_not_promise_what_the_next_one_brings() -> None:
    """Its record would else close an hour whose rows are still on their way."""
    store = MemoryObjects()
    writer = writer_of(store, bytes_max=1)
    await writer.begin()
    writer.expect_nothing_before(T0_US)
    await take(writer, 0, 5)  # begins a commit
    await take(writer, 5, 6)
    writer.expect_nothing_before(T0_US + 10 * HOUR_US)
    await writer.room()
    first = await last_record(store, Shard("default"))
    assert first is not None
    assert first.inputs == {SOURCE: Input(5, T0_US)}
    assert first.watermark_us == T0_US
    await writer.flush()
    second = await last_record(store, Shard("default"))
    assert second is not None
    assert second.watermark_us == T0_US + 10 * HOUR_US
    await writer.close()


async def test_a_position_that_goes_back_is_refused() -> None:
    writer = writer_of(MemoryObjects())
    await writer.begin()
    await take(writer, 0, 5)
    with pytest.raises(InvariantError, match="never goes back from 5"):
        writer.add_events(SOURCE, [], Input(4))
    await writer.close()


async def test_after_its_end_it_takes_nothing() -> None:
    writer = writer_of(MemoryObjects())
    await writer.begin()
    await writer.close()
    with pytest.raises(InvariantError):
        await writer.room()


async def test_a_commit_that_failed_is_told_to_whoever_calls_next() -> None:
    store = MemoryObjects()
    metrics = Metrics()
    writer = writer_of(store, metrics=metrics)
    await writer.begin()
    store.faults = Faults(1, DOWN)
    await take(writer, 0, 5)
    for call in (writer.flush, writer.flush, writer.room, writer.commit_if_due):
        with pytest.raises(StoreUnavailableError):
            await call()
    assert metrics.lake.commits["error"].total == 1
    await writer.close()


async def test_what_is_lost_is_noted_in_the_next_record() -> None:
    store, metrics = MemoryObjects(), Metrics()
    writer = writer_of(store, reads="kafka", metrics=metrics)
    await writer.begin()
    lines = [encode_event(event) for event in EVENTS[:3]]
    writer.add_lines(TOPIC, lines, [0, 1, 2], Input(3))
    await writer.flush()
    lost = Lost(TOPIC, 3, 10, "retention")
    writer.skip(lost, Input(10))
    await writer.flush()
    last = await last_record(store, Shard("default"))
    assert last is not None
    assert last.lost == (lost,)
    assert last.inputs == {TOPIC: Input(10)}
    assert metrics.lake.lost.total == 7
    await writer.close()


async def test_lines_that_are_no_events_are_told_and_the_others_kept() -> None:
    store = MemoryObjects()
    writer = writer_of(store, reads="kafka")
    await writer.begin()
    lines = [encode_event(EVENTS[0]), b"nonsense", encode_event(EVENTS[1])]
    rejected = writer.add_lines(TOPIC, lines, [5, 6, 9], Input(10))
    assert [one.index for one in rejected] == [1]
    await writer.flush()
    assert visible(store) == ids(EVENTS[:2])
    await writer.close()


async def lose_files(store: MemoryObjects, writer: ShardWriter | LakeWriter) -> None:
    """Commit, but let the uploads be gone before they are files."""
    complete = store.complete

    async def fail(_: object) -> None:
        raise DOWN

    store.complete = fail  # type: ignore[assignment]
    with pytest.raises(StoreUnavailableError):
        await writer.flush()
    await writer.close()
    store.complete = complete  # type: ignore[method-assign]
    assert store.pending
    store.pending.clear()


async def gone_after(store: MemoryObjects, *, reads: Reads = "source") -> None:
    """Leave a lake whose last record names files that are nowhere."""
    writer = writer_of(store, reads=reads)
    await writer.begin()
    if reads == "source":
        await take(writer, 0, 10)
        await writer.flush()
        await take(writer, 10, 20)
    else:
        lines = [encode_event(event) for event in EVENTS]
        writer.add_lines(TOPIC, lines[:10], range(10), Input(10))
        await writer.flush()
        writer.add_lines(TOPIC, lines[10:20], range(10, 20), Input(20))
    await lose_files(store, writer)


async def test_files_that_are_gone_are_made_anew_from_the_source() -> None:
    store, metrics = MemoryObjects(), Metrics()
    await gone_after(store)
    writer = writer_of(store, metrics=metrics)
    assert await writer.begin() == {SOURCE: Input(20, T0_US)}
    since, until = Input(10, T0_US), Input(20, T0_US)
    assert writer.again == {SOURCE: Again(since, since, until)}
    await take(writer, 10, 15)
    await take(writer, 15, 25)  # across the end of what has to be read again
    await writer.flush()
    assert not writer.again
    assert visible(store) == ids(between(0, 25))
    assert metrics.lake.repaired_files.total > 1
    await writer.close()


async def test_files_that_are_gone_are_made_anew_from_a_partition() -> None:
    store = MemoryObjects()
    await gone_after(store, reads="kafka")
    writer = writer_of(store, reads="kafka")
    await writer.begin()
    assert writer.again == {TOPIC: Again(Input(10), Input(10), Input(20))}
    lines = [encode_event(event) for event in EVENTS]
    writer.add_lines(TOPIC, lines[10:25], range(10, 25), Input(25))
    await writer.flush()
    assert visible(store) == ids(EVENTS[:25])
    await writer.close()


async def test_nothing_is_committed_before_what_is_gone_is_read_again() -> None:
    store = MemoryObjects()
    await gone_after(store)
    writer = writer_of(store)
    await writer.begin()
    before = dict(store.objects)
    await take(writer, 10, 15)
    await writer.flush()
    assert store.objects == before
    assert writer.again
    await writer.close()
    again = writer_of(store)  # stopped in the middle, it begins anew
    await again.begin()
    await take(again, 10, 20)
    await again.flush()
    assert visible(store) == ids(between(0, 20))
    await again.close()


async def test_rows_that_the_source_no_longer_has_are_told() -> None:
    store = MemoryObjects()
    await gone_after(store)
    before = visible(store)
    writer = writer_of(store)
    await writer.begin()
    await writer.room()
    writer.add_events(SOURCE, between(13, 20), Input(20, T0_US))
    with pytest.raises(InputLostError, match="the input no longer has"):
        await writer.flush()
    assert visible(store) == before
    await writer.close()
    accepting = writer_of(store, accept_loss=True)
    await accepting.begin()
    accepting.add_events(SOURCE, between(13, 20), Input(20, T0_US))
    await accepting.flush()
    assert visible(store) == ids([*between(0, 10), *between(13, 20)])
    last = await last_record(store, Shard("default"))
    assert last is not None
    assert last.lost
    await accepting.close()


async def test_the_sink_resumes_before_what_is_gone() -> None:
    """Its source sends the range once more, and the sink takes it for what it is."""
    store = MemoryObjects()
    await gone_after(store)
    sink = LakeWriter("memory", origin_source=SOURCE, store=store, compaction=False)
    with pytest.raises(CommitLogError, match=r"no _blueflow/lake\.json"):
        await sink.resume()
    await sink.close()
    store.objects["_blueflow/lake.json"] = encode(Description(simulated=False, made_s=0))
    sink = LakeWriter("memory", origin_source=SOURCE, store=store, compaction=False)
    assert await sink.resume() == {SOURCE: Position(SOURCE, 10, T0_US)}
    assert sink.durable == {SOURCE: Position(SOURCE, 10, T0_US)}
    await sink.write(between(10, 22), through=Position(SOURCE, 22, T0_US))
    await sink.flush()
    assert sink.durable == {SOURCE: Position(SOURCE, 22, T0_US)}
    assert visible(store) == ids(between(0, 22))
    await sink.close()


NEWER = f"{SOURCE}#2"


async def gone_in_two_epochs(store: MemoryObjects) -> None:
    """Commit 1 to 10; then lose the files of 11 to 20 and of what the relay counts anew."""
    store.objects["_blueflow/lake.json"] = encode(Description(simulated=False, made_s=0))
    sink = LakeWriter("memory", origin_source=SOURCE, store=store, compaction=False)
    await sink.resume()
    await sink.write(between(0, 10), through=Position(SOURCE, 10, T0_US))
    await sink.flush()
    await sink.write(between(10, 20), through=Position(SOURCE, 20, T0_US))
    anew = contract_events(NEWER, 5)
    await sink.write(anew, through=Position(NEWER, 5, T0_US))
    await lose_files(store, sink)


async def test_what_an_older_epoch_had_is_named_as_lost() -> None:
    """Nobody sends it any more."""
    store = MemoryObjects()
    await gone_in_two_epochs(store)
    before = visible(store)
    sink = LakeWriter("memory", origin_source=SOURCE, store=store, compaction=False)
    with pytest.raises(InputLostError, match="begun anew") as raised:
        await sink.resume()
    await sink.close()
    assert (raised.value.name, raised.value.first, raised.value.end) == (SOURCE, 11, 21)
    assert visible(store) == before


async def test_what_an_older_epoch_had_is_done_without_if_that_is_accepted() -> None:
    store = MemoryObjects()
    await gone_in_two_epochs(store)
    metrics = Metrics()
    sink = LakeWriter(
        "memory",
        origin_source=SOURCE,
        store=store,
        compaction=False,
        accept_loss=True,
        metrics=metrics,
    )
    positions = await sink.resume()
    assert positions[SOURCE] == Position(SOURCE, 20, T0_US)
    assert positions[NEWER].seq == 0
    await sink.write(contract_events(NEWER, 8), through=Position(NEWER, 8, T0_US))
    await sink.flush()
    assert visible(store) == ids([*between(0, 10), *contract_events(NEWER, 8)])
    assert metrics.lake.lost.total == len(between(10, 20))
    await sink.close()


@pytest.mark.parametrize("name", ["", "with/slash", "x" * 65, "a b"])
def test_a_name_that_no_shard_can_have_is_refused_with_the_argument(name: str) -> None:
    with pytest.raises(SettingError, match=r"pipeline \(from LakeWriter\)") as raised:
        LakeWriter("memory", origin_source=SOURCE, pipeline=name, store=MemoryObjects())
    assert "64" in str(raised.value)
