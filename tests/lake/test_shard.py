"""The log of a shard: whatever dies, whoever else writes, each row is visible once."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from blueflow.errors import (
    CommitLogError,
    InvariantError,
    LakeFencedError,
    OtherSourceError,
    StoreLoginError,
    StoreUnavailableError,
)
from blueflow.lake.evidence import Evidence
from blueflow.lake.findings import findings
from blueflow.lake.layout import Shard, fresh_key, hour_key, record_key
from blueflow.lake.logrecord import HourRecord, Input, ShardRecord, encode
from blueflow.lake.shard import Made, ShardLog
from blueflow.lake.shardlogs import last_record, records
from blueflow.testing.faults import Faults
from blueflow.testing.lakestore import MemoryObjects

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from blueflow.lake.store import Object

HOUR = 495_000
NOW_S = HOUR * 3600.0
SHARD = Shard("default")
DOWN = StoreUnavailableError("memory:lake", 0, "it is a test")


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def log_of(
    store: MemoryObjects, name: str, shard: Shard = SHARD, clock: Clock | None = None
) -> ShardLog:
    return ShardLog(store, shard, reads="kafka", instance=name, clock=clock or Clock())


def made_of(rows: range, dataset: str = "posts") -> Made:
    data = json.dumps(list(rows)).encode()
    return Made(dataset, HOUR, len(rows), rows.start, rows.stop, data)


def visible(store: MemoryObjects) -> Counter[int]:
    """Count how often each row is in a file that a glob finds."""
    found: Counter[int] = Counter()
    for key, data in store.objects.items():
        if key.endswith(".parquet"):
            found.update(json.loads(data))
    return found


def repairs(log: ShardLog) -> bool:
    """Whether anything has to be made anew."""
    return log.last.repair is not None


async def publish(log: ShardLog, rows: range, *, name: str = "topic/0") -> ShardRecord:
    """Publish rows in two files."""
    middle = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    made = [made_of(part, data) for part, data in zip(middle, ("posts", "likes"), strict=True)]
    return await log.publish(
        made,
        {name: Input(rows.stop)},
        since={name: Input(rows.start)},
        watermark_us=rows.stop,
    )


async def test_a_new_shard_begins_without_positions() -> None:
    store = MemoryObjects()
    log = log_of(store, "a")
    assert await log.claim() == {}
    assert log.last.number == 1
    assert log.last.kind == "claim"


async def test_what_is_published_is_visible_and_the_next_process_goes_on_behind_it() -> None:
    store = MemoryObjects()
    first = log_of(store, "a")
    await first.claim()
    record = await publish(first, range(10))
    assert record.number == 2
    assert visible(store) == Counter(range(10))
    assert not store.pending
    second = log_of(store, "b")
    assert await second.claim() == {"topic/0": Input(10)}
    assert second.last.rows == 10
    assert second.last.watermark_us == 10


async def test_a_process_that_was_taken_over_publishes_nothing_and_leaves_nothing() -> None:
    store = MemoryObjects()
    first, second = log_of(store, "first"), log_of(store, "second")
    await first.claim()
    await publish(first, range(10))
    await second.claim()
    with pytest.raises(LakeFencedError, match="second took over default/0-of-1"):
        await publish(first, range(10, 20))
    assert visible(store) == Counter(range(10))
    assert not store.pending
    await publish(second, range(10, 30))
    assert visible(store) == Counter(range(30))


async def test_an_answer_that_is_lost_is_no_second_publication() -> None:
    """The record was written, the answer did not come: asked again, it is there and ours."""
    store = MemoryObjects()
    log = log_of(store, "a")
    await log.claim()
    store.after = Faults(3, DOWN)  # two files, then the record
    with pytest.raises(StoreUnavailableError):
        await publish(log, range(10))
    assert store.after.fired
    assert visible(store) == Counter()
    again = log_of(store, "b")
    assert await again.claim() == {"topic/0": Input(10)}
    assert visible(store) == Counter(range(10))


@pytest.mark.parametrize("when", ["faults", "after"])
async def test_failing_at_any_step_it_loses_and_doubles_nothing(when: str) -> None:
    for step in range(1, 100):
        store, clock = MemoryObjects(), Clock()
        faults = Faults(step, DOWN)
        setattr(store, when, faults)
        for life in range(4):
            log = log_of(store, f"life {life}", clock=clock)
            try:
                begin = (await log.claim()).get("topic/0", Input(0)).next
                for start in range(begin, 40, 10):
                    await publish(log, range(start, start + 10))
                    assert max(visible(store).values()) == 1
            except StoreUnavailableError:
                continue
            break
        assert visible(store) == Counter(range(40))
        if not faults.fired:
            assert step > 10
            return
    pytest.fail("the steps do not end")


async def test_what_was_stored_and_not_published_is_forgotten() -> None:
    store = MemoryObjects()
    first, other = log_of(store, "a"), log_of(store, "other", Shard("other"))
    await first.claim()
    await other.claim()
    store.faults = Faults(3, DOWN)  # two files, and then the record
    with pytest.raises(StoreUnavailableError):
        await publish(first, range(10))
    theirs = await store.stage(fresh_key(Shard("other"), 2, "posts", HOUR), b"1")
    assert len(store.pending) == 3
    assert await log_of(store, "b").claim() == {}
    assert set(store.pending) == {theirs.upload_id}


async def test_an_upload_that_is_gone_is_made_anew_before_anything_else() -> None:
    store = MemoryObjects()
    first = log_of(store, "a")
    await first.claim()
    await publish(first, range(10))
    store.faults = Faults(4, DOWN)  # two files, the record, and then the first completion
    with pytest.raises(StoreUnavailableError):
        await publish(first, range(10, 20))
    store.pending.clear()  # the store keeps unfinished uploads for a day
    second = log_of(store, "b")
    assert await second.claim() == {"topic/0": Input(20)}
    repair = second.last.repair
    assert repair is not None
    assert repair.since == {"topic/0": Input(10)}
    with pytest.raises(InvariantError):
        await publish(second, range(20, 30))
    third = log_of(store, "c")  # it dies before it has made them
    await third.claim()
    assert third.last.repair == repair
    made = [
        made_of(range(10, 15) if file.dataset == "posts" else range(15, 20), file.dataset)
        for file in repair.files
    ]
    await third.publish(made, {}, since={}, watermark_us=0, replaces=repair.files)
    assert not repairs(third)
    assert third.last.rows == 20
    assert visible(store) == Counter(range(20))
    assert {file.key for file in repair.files} <= set(store.objects)
    await publish(third, range(20, 30))
    assert visible(store) == Counter(range(30))


async def test_files_that_are_made_anew_and_lost_again_are_made_once_more() -> None:
    store = MemoryObjects()
    first = log_of(store, "a")
    await first.claim()
    store.faults = Faults(4, DOWN)
    with pytest.raises(StoreUnavailableError):
        await publish(first, range(10))
    store.pending.clear()
    second = log_of(store, "b")
    await second.claim()
    repair = second.last.repair
    assert repair is not None
    rows = {"posts": range(5), "likes": range(5, 10)}
    made = [made_of(rows[file.dataset], file.dataset) for file in repair.files]
    store.faults = Faults(len(made) + 2, DOWN)  # the files, the record, and then a completion
    with pytest.raises(StoreUnavailableError):
        await second.publish(made, {}, since={}, watermark_us=0, replaces=repair.files)
    assert store.faults.fired
    store.pending.clear()
    third = log_of(store, "c")
    await third.claim()
    assert third.last.repair is not None
    assert third.last.repair.since == {"topic/0": Input(0)}
    assert third.last.repair.until == {"topic/0": Input(10)}
    assert third.last.rows == 10


async def test_an_upload_that_goes_while_it_is_completed_is_stored_again() -> None:
    store = MemoryObjects()
    log = log_of(store, "a")
    await log.claim()
    put_new = store.put_new

    async def put_and_forget(key: str, data: bytes) -> bool:
        done = await put_new(key, data)
        store.pending.clear()
        return done

    store.put_new = put_and_forget  # type: ignore[method-assign]
    await publish(log, range(10))
    assert visible(store) == Counter(range(10))


async def test_a_file_that_was_compacted_and_removed_is_not_missing() -> None:
    store = MemoryObjects()
    first = log_of(store, "a")
    await first.claim()
    record = await publish(first, range(10))
    keys = [file.key for file in record.files]
    for file in record.files:
        hour = HourRecord(1, "compacted", "keeper", NOW_S, (file.key,))
        await store.put_new(hour_key(file.dataset, file.hour, 1), encode(hour))
    await store.delete(keys)
    second = log_of(store, "b")
    await second.claim()
    assert not repairs(second)


async def test_another_number_of_shards_ends_the_logs_before_and_takes_their_positions() -> None:
    store = MemoryObjects()
    one = log_of(store, "one")
    await one.claim()
    await publish(one, range(10), name="topic/0")
    await publish(one, range(10, 20), name="topic/1")
    halves = [log_of(store, f"half {at}", Shard("default", at, 2)) for at in range(2)]
    for half in halves:
        assert await half.claim() == {"topic/0": Input(10), "topic/1": Input(20)}
    with pytest.raises(LakeFencedError, match="another number of shards"):
        await publish(one, range(20, 30), name="topic/0")
    await publish(halves[0], range(20, 30), name="topic/0")
    again = log_of(store, "again")
    assert await again.claim() == {"topic/0": Input(30), "topic/1": Input(20)}
    for half in halves:
        with pytest.raises(LakeFencedError):
            await publish(half, range(50, 60), name="topic/1")
    assert visible(store) == Counter(range(30))


async def test_an_input_of_another_kind_is_refused() -> None:
    store = MemoryObjects()
    await log_of(store, "a").claim()
    other = ShardLog(store, SHARD, reads="source", instance="b", clock=Clock())
    with pytest.raises(OtherSourceError, match="what Kafka topics hold"):
        await other.claim()


async def test_a_damaged_record_stops_before_anything_is_written() -> None:
    store = MemoryObjects()
    log = log_of(store, "a")
    await log.claim()
    await publish(log, range(10))
    key = record_key(SHARD, 2)
    store.objects[key] = store.objects[key].replace(b'"next":10', b'"next":11')
    before = dict(store.objects)
    with pytest.raises(CommitLogError, match="does not match its checksum"):
        await log_of(store, "b").claim()
    assert store.objects == before


async def test_a_log_whose_newest_record_was_removed_is_refused() -> None:
    """Its number would be used again, and the file under it overwritten."""
    store = MemoryObjects()
    log = log_of(store, "a")
    await log.claim()
    await publish(log, range(10))
    await publish(log, range(10, 20))
    del store.objects[record_key(SHARD, 3)]
    with pytest.raises(CommitLogError, match="record 3, and the last is 2"):
        await log_of(store, "b").claim()
    assert visible(store) == Counter(range(20))


async def test_a_log_that_goes_on_while_it_is_taken_over_is_no_damage() -> None:
    store = MemoryObjects()
    first = log_of(store, "a")
    await first.claim()
    await publish(first, range(10))
    look, rest = store.list, iter(range(10, 40, 10))

    async def publish_and_look(prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        if limit is None and prefix.startswith("fresh/") and (start := next(rest, None)):
            await publish(first, range(start, start + 10))
        return await look(prefix, limit=limit)

    store.list = publish_and_look  # type: ignore[method-assign]
    second = log_of(store, "b")
    assert await second.claim() == {"topic/0": Input(40)}
    assert visible(store) == Counter(range(40))


async def test_old_records_are_removed_also_by_who_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blueflow.lake.shard.RECORDS_KEPT", 5)
    monkeypatch.setattr("blueflow.lake.findings.RECORDS_KEPT", 5)
    store = MemoryObjects()
    kept = b""
    for life in range(4):
        log = log_of(store, f"{life}")
        await log.claim()
        kept = kept or store.objects[record_key(SHARD, 1)]
        for number in range(4):
            await publish(log, range((life * 4 + number) * 10, (life * 4 + number + 1) * 10))
        assert len(await store.list(SHARD.log)) <= 5 + 1
    numbers = [record.number async for record in records(store, SHARD)]
    assert numbers == [20, 19, 18, 17, 16]
    await store.put_new(record_key(SHARD, 1), kept)  # as one that nobody has removed
    evidence = Evidence()
    evidence.logs[SHARD] = {record.number: record async for record in records(store, SHARD)}
    assert sorted(evidence.logs[SHARD]) == [1, 16, 17, 18, 19, 20]
    missing = [one for one in findings(evidence, now_s=NOW_S) if one.where.startswith(SHARD.log)]
    assert missing == []


async def test_that_old_records_cannot_be_removed_ends_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("blueflow.lake.shard.RECORDS_KEPT", 1)
    store = MemoryObjects()
    log = log_of(store, "a")
    await log.claim()

    async def refuse(_: object) -> None:
        raise StoreLoginError("memory", "no right to delete")

    store.delete = refuse  # type: ignore[assignment]
    for number in range(4):
        await publish(log, range(number * 10, number * 10 + 10))
    assert visible(store) == Counter(range(40))
    assert caplog.text.count("old records of a log cannot be removed") == 1


async def test_who_must_not_read_this_pipeline_changes_nothing() -> None:
    store = MemoryObjects()
    log = log_of(store, "a")
    await log.claim()
    await publish(log, range(10))

    def refuse(inputs: Mapping[str, Input]) -> None:
        assert inputs == {"topic/0": Input(10)}
        raise OtherSourceError("memory", "this", "that")

    with pytest.raises(OtherSourceError):
        await log_of(store, "b").claim(refuse)
    await publish(log, range(10, 20))  # whoever works goes on
    assert visible(store) == Counter(range(20))


async def test_a_claim_knows_what_the_logs_it_sealed_know() -> None:
    """An older log must not seem to know better later: a topic was made anew meanwhile."""
    store, clock = MemoryObjects(), Clock()
    old, new = Input(10, 0, "old topic"), Input(3, 0, "new topic", 1)
    log = log_of(store, "a", clock=clock)
    await log.claim()
    await log.publish([], {"topic/0": old}, since={}, watermark_us=0)
    parts = [log_of(store, f"b{n}", Shard(SHARD.pipeline, n, 2), clock) for n in range(2)]
    for part in parts:
        await part.claim()
    await parts[0].publish([], {"topic/0": new}, since={"topic/0": old}, watermark_us=0)
    assert (await log_of(store, "c", clock=clock).claim())["topic/0"] == new
    assert (await log_of(store, "d", clock=clock).claim())["topic/0"] == new  # c published nothing


class ShardMachine(RuleBasedStateMachine):
    """Processes that begin, publish, die anywhere and go on as zombies, over one store."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.clock = MemoryObjects(), Clock()
        self.writers: list[tuple[ShardLog, int]] = []
        self.count = 0

    async def _begin(self, log: ShardLog) -> None:
        begin = (await log.claim()).get("topic/0", Input(0)).next
        if log.last.repair is not None:
            await self._repair(log)
        self.writers.append((log, begin))

    async def _repair(self, log: ShardLog) -> None:
        repair = log.last.repair
        assert repair is not None
        since, until = repair.since["topic/0"].next, repair.until["topic/0"].next
        middle = since + (until - since) // 2
        parts = {"posts": range(since, middle), "likes": range(middle, until)}
        made = [made_of(parts[file.dataset], file.dataset) for file in repair.files]
        await log.publish(made, {}, since={}, watermark_us=0, replaces=repair.files)

    def _do(self, call: Callable[[], Coroutine[None, None, None]]) -> None:
        try:
            anyio.run(call)
        except (StoreUnavailableError, LakeFencedError):
            self.store.faults, self.store.after = Faults(), Faults()

    @rule(fail=st.integers(0, 12), late=st.booleans())
    def begin(self, fail: int, *, late: bool) -> None:
        self._plan(fail, late=late)
        self.count += 1
        log = log_of(self.store, f"process {self.count}", clock=self.clock)
        self._do(partial(self._begin, log))

    @rule(
        which=st.integers(0, 20),
        rows=st.integers(2, 6),
        fail=st.integers(0, 12),
        late=st.booleans(),
    )
    def publish(self, which: int, rows: int, fail: int, *, late: bool) -> None:
        if not self.writers:
            return
        log, begin = self.writers.pop(which % len(self.writers))

        async def step() -> None:
            await publish(log, range(begin, begin + rows))
            self.writers.append((log, begin + rows))

        self._plan(fail, late=late)
        self._do(step)

    @rule()
    def uploads_expire(self) -> None:
        self.store.pending.clear()

    def _plan(self, fail: int, *, late: bool) -> None:
        plan = Faults(fail, DOWN) if fail else Faults()
        self.store.faults, self.store.after = (Faults(), plan) if late else (plan, Faults())

    @invariant()
    def no_row_is_there_twice(self) -> None:
        assert all(count == 1 for count in visible(self.store).values())

    def teardown(self) -> None:
        self.store.faults = self.store.after = Faults()

        async def end() -> int:
            log = log_of(self.store, "the last", clock=self.clock)
            await self._begin(log)
            newest = await last_record(self.store, SHARD)
            assert newest is not None
            return newest.inputs.get("topic/0", Input(0)).next

        through = anyio.run(end)
        assert visible(self.store) == Counter(range(through))


TestShardMachine = ShardMachine.TestCase
TestShardMachine.settings = settings(stateful_step_count=25, deadline=None)
