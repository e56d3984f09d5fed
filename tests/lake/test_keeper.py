from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from blueflow.errors import (
    InvariantError,
    StoreUnavailableError,
    UploadGoneError,
)
from blueflow.lake import merge, parquet, versions
from blueflow.lake.compaction import Compactor
from blueflow.lake.expiry import expire
from blueflow.lake.hours import Hour, Limits
from blueflow.lake.janitor import abort_orphans
from blueflow.lake.keeper import Keeper
from blueflow.lake.layout import Shard, fresh_key, hour_folder, marker_key, raw_key
from blueflow.metrics import Metrics
from blueflow.records import DATASETS
from blueflow.testing.faults import Faults
from blueflow.testing.lakefiles import HandWriter, Row, WatchedObjects, row

if TYPE_CHECKING:
    from collections.abc import Callable

HOUR = 500
POSTS, LIKES = Hour("posts", HOUR), Hour("likes", HOUR)
END_S = (HOUR + 1) * 3600.0
SHARD = Shard("a")
DAY_S = 86_400.0
DOWN = StoreUnavailableError("memory", 1.0, "down")


async def run_inline(function: Callable[..., Any], *args: Any) -> Any:
    answer = function(*args)
    await anyio.lowlevel.checkpoint()
    return answer


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "run_sync", run_inline)


class World:
    """A lake, its clock, and a keeper that may be killed and started again."""

    def __init__(self) -> None:
        self.now_s = END_S + 300
        self.metrics = Metrics()
        self.store = WatchedObjects(clock=lambda: self.now_s)
        self.writer = HandWriter(self.store, SHARD)

    def keeper(self, **named: Any) -> Keeper:
        def clock() -> float:
            return self.now_s

        limits = named.pop("limits", Limits(0, collect_s=0))
        compactor = Compactor(
            self.store,
            lateness_s=60,
            instance="k",
            metrics=self.metrics.lake,
            clock=clock,
            limits=limits,
            file_bytes_max=1,
        )
        named.setdefault("every_s", 0)
        return Keeper(self.store, compactor, metrics=self.metrics.lake, clock=clock, **named)

    async def publish(self, rows: dict[Hour, list[Row]]) -> None:
        await self.writer.publish(rows, watermark_us=int((END_S + 60) * 1e6), made_s=self.now_s)

    def gauge(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"blueflow_lake_{name}")


async def test_a_turn_compacts_then_sweeps_when_the_time_is_over() -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)], LIKES: [row(HOUR, 1)]})
    keeper = world.keeper()
    await keeper.turn()
    assert world.gauge("compaction_backlog_hours") == 0
    assert {dataset for dataset in DATASETS if world.store.marker(Hour(dataset, HOUR))} == set(
        DATASETS
    )
    world.now_s += 26 * 3600 - 1
    await keeper.turn()
    assert fresh_key(SHARD, 1, *POSTS) in world.store.objects
    world.now_s += 1
    await keeper.turn()
    assert not any(key.startswith("fresh/") for key in world.store.objects)
    assert world.gauge("swept_files_total") == 2
    await keeper.turn()
    assert world.gauge("swept_files_total") == 2


async def test_late_files_start_the_time_of_a_marker_anew() -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)]})
    await world.keeper().turn()
    world.now_s += 25 * 3600
    await world.publish({POSTS: [row(HOUR, 2)]})
    await world.keeper().turn()
    world.now_s += 2 * 3600
    await world.keeper().turn()
    assert sum(key.startswith("fresh/") for key in world.store.objects) == 2
    world.now_s += 24 * 3600
    await world.keeper().turn()
    assert not any(key.startswith("fresh/") for key in world.store.objects)
    assert world.store.joined(POSTS) == [row(HOUR, 1), row(HOUR, 2)]


async def test_uploads_that_no_log_names_are_given_up_in_time() -> None:
    world = World()
    store = world.store
    orphan = await store.stage(fresh_key(SHARD, 9, *POSTS), b"x")
    foreign = await store.stage("fresh/posts/mine", b"x")
    undecided = await store.stage(raw_key(*POSTS, 1, 1), b"x")
    await world.writer.record({POSTS: [row(HOUR, 1)]}, watermark_us=0, made_s=world.now_s)
    named = world.writer.pending[0].staged
    world.now_s += DAY_S
    await world.keeper().turn()
    assert len(store.pending) == 4
    assert world.gauge("invisible_uploads") == 3
    world.now_s += 1
    await world.keeper().turn()
    assert set(store.pending) == {foreign.upload_id, named.upload_id}
    assert {orphan.upload_id, undecided.upload_id}.isdisjoint(store.pending)
    assert world.gauge("invisible_uploads") == 1


async def test_uploads_of_a_version_that_is_finished_go_at_once() -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)]})
    first = await world.store.stage(raw_key(*POSTS, 1, 1), b"x")
    later = await world.store.stage(raw_key(*POSTS, 2, 1), b"x")
    await world.keeper().turn()
    assert set(world.store.pending) == {later.upload_id}
    del world.store.objects[marker_key(*POSTS, 1)]  # not finished any more
    again = await world.store.stage(first.key, b"x")
    await abort_orphans(world.store, upload_s=DAY_S, now_s=world.now_s)
    assert set(world.store.pending) == {later.upload_id, again.upload_id}


async def test_uploads_that_a_record_names_stay_until_it_is_finished() -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)]})
    complete = world.store.complete

    async def fail(staged: object) -> None:
        raise DOWN

    world.store.complete = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await world.keeper().turn()
    world.store.complete = complete  # type: ignore[method-assign]
    world.now_s += 9 * DAY_S
    await abort_orphans(world.store, upload_s=DAY_S, now_s=world.now_s)
    assert len(world.store.pending) == 1
    await world.keeper().turn()
    assert world.store.pending == {}
    assert world.store.joined(POSTS) == [row(HOUR, 1)]


async def test_an_hour_that_fails_is_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)], LIKES: [row(HOUR, 1)]})
    world.store.objects[fresh_key(SHARD, 1, *POSTS)] = b"damaged"
    world.store._rows[b"damaged"] = []
    world.store._seen.clear()
    with caplog.at_level(logging.WARNING):
        await world.keeper().turn()
    (remark,) = caplog.records
    assert remark.hour == "posts/1970-01-21T20"  # type: ignore[attr-defined]
    assert "BF-248" in remark.error  # type: ignore[attr-defined]
    assert world.store.marker(LIKES) is not None
    assert world.gauge("compaction_backlog_hours") == 1
    assert world.metrics.lake.compactions["error"].total == 1


async def test_two_keepers_share_the_hours_and_one_gives_up_uploads() -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)]})
    await world.store.stage(raw_key(*POSTS, 1, 1), b"x")
    first = await world.keeper(share=(1, 2)).turn()
    assert len(world.store.pending) == 1
    second = await world.keeper(share=(0, 2)).turn()
    assert world.store.pending == {}
    assert len(first.done) + len(second.done) == 6


async def test_the_loop_goes_on_after_errors_and_ends_when_cancelled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    await world.publish({POSTS: [row(HOUR, 1)]})
    world.store.faults = Faults(2, DOWN)
    keeper = world.keeper(every_s=30)
    waits: list[float] = []

    async def sleep(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 3:
            await anyio.sleep_forever()

    monkeypatch.setattr("blueflow.lake.keeper.anyio.sleep", sleep)
    task = asyncio.create_task(keeper.run())
    while len(waits) < 3:
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert waits[0] >= 30 >= waits[1]
    assert [remark.message for remark in caplog.records] == [
        "The keeper of the lake failed; it tries again."
    ]
    assert world.store.marker(POSTS) is not None


async def test_a_broken_promise_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    keeper = world.keeper()

    async def turn() -> None:
        raise InvariantError("it holds")

    monkeypatch.setattr(keeper, "turn", turn)
    with pytest.raises(InvariantError):
        await keeper.run()


# --- everything that happens to a lake, in any order ---------------------------------------------

WATERMARK_US = int((END_S + 3660) * 1e6)
HOURS = tuple(Hour(dataset, HOUR + n) for n in (0, 1) for dataset in ("posts", "likes"))


class LakeMachine(RuleBasedStateMachine):
    """The reader that watches looks after every change; the end has to be tidy and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(versions, "run_sync", run_inline)
        self.patch.setattr(merge, "_ROWS_STEP", 2)
        self.patch.setattr(parquet, "ROW_GROUP_ROWS", 2)
        self.world = World()
        self.world.now_s += 2 * 3600
        self.seq = 0
        self.published: dict[Hour, set[Row]] = {hour: set() for hour in HOURS}
        self.expired = False

    @initialize()
    def begin(self) -> None:
        self.write({HOURS[0]: 3, HOURS[1]: 1}, visible=True)

    def do(self, work: Callable[[], Any]) -> Any:
        return self.runner.run(work())

    def faulted(self, work: Callable[[], Any], call: int, *, after: bool) -> None:
        """Kill what runs at a change of the store."""
        faults = Faults(call, DOWN) if call else Faults()
        store = self.world.store
        if after:
            store.after = faults
        else:
            store.faults = faults
        with suppress(StoreUnavailableError):
            self.do(work)
        store.faults, store.after = Faults(), Faults()

    @precondition(lambda self: not self.world.writer.pending)
    @rule(
        counts=st.dictionaries(st.sampled_from(HOURS), st.integers(1, 3), min_size=1),
        visible=st.booleans(),
    )
    def write(self, counts: dict[Hour, int], *, visible: bool) -> None:
        rows: dict[Hour, list[Row]] = {}
        for hour, count in counts.items():
            rows[hour] = [row(hour.hour, self.seq + n, at_us=n % 2) for n in range(count)]
            self.seq += count
            self.published[hour].update(rows[hour])
        writer, now_s = self.world.writer, self.world.now_s
        self.do(lambda: writer.record(rows, watermark_us=WATERMARK_US, made_s=now_s))
        if visible:
            self.complete()

    @precondition(lambda self: self.world.writer.pending)
    @rule()
    def complete(self) -> None:
        """Complete what the last record names; what the store forgot is made anew, or was taken."""
        writer, store = self.world.writer, self.world.store
        for file in writer.pending:
            try:
                self.do(partial(store.complete, file.staged))
            except UploadGoneError:
                hour = Hour(file.dataset, file.hour)
                named = {key for one in store.records(hour) for key in one.inputs}
                if file.key not in named:
                    raise
        writer.pending = []

    @rule(call=st.integers(0, 25), after=st.booleans())
    def keep(self, call: int, *, after: bool) -> None:
        self.faulted(lambda: self.world.keeper().turn(), call, after=after)

    @rule(hour=st.sampled_from(HOURS), call=st.integers(0, 9), after=st.booleans())
    def compact(self, hour: Hour, call: int, *, after: bool) -> None:
        compactor = self.world.keeper()._compactor
        self.faulted(lambda: compactor.compact(*hour), call, after=after)

    @rule(call=st.integers(1, 12))
    def race(self, call: int) -> None:
        """Two keepers at once, and a store that fails one of them."""

        async def both() -> None:
            one, two = self.world.keeper().turn(), self.world.keeper().turn()
            for outcome in await asyncio.gather(one, two, return_exceptions=True):
                if isinstance(outcome, BaseException) and outcome is not DOWN:
                    raise outcome

        self.faulted(both, call, after=False)

    @rule()
    def forget_uploads(self) -> None:
        """The store purges what compactors staged; the writer repairs its own, elsewhere tested."""
        pending = self.world.store.pending
        for upload_id, (upload, _) in list(pending.items()):
            if upload.key.startswith("raw/"):
                del pending[upload_id]

    @rule(hours=st.sampled_from((1, 13, 27)))
    def wait(self, hours: int) -> None:
        self.world.now_s += hours * 3600

    @rule(call=st.integers(0, 6), after=st.booleans())
    def expire(self, call: int, *, after: bool) -> None:
        """Expire the first hour only."""
        world = self.world
        self.expired = True
        now_s = END_S + 30 * DAY_S
        self.faulted(
            lambda: expire(world.store, now_s=now_s, instance="e", raw_days=30), call, after=after
        )

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.patch.undo()
            self.runner.close()

    def settle(self) -> None:
        world = self.world
        if world.writer.pending:
            self.complete()
        for _ in range(8):
            world.now_s += 27 * 3600
            self.do(lambda: world.writer.publish({}, watermark_us=WATERMARK_US, made_s=world.now_s))
            done = self.do(lambda: world.keeper().turn())
            assert done.failed == {}
        store = world.store
        store.look()
        leftovers = [key for key in store.objects if key.startswith("fresh/")]
        if self.expired:
            self.do(lambda: expire(store, now_s=END_S + 30 * DAY_S, instance="e", raw_days=30))
            leftovers = [key for key in store.objects if key.startswith("fresh/")]
            first = tuple(hour_folder("raw", dataset, HOUR) for dataset in DATASETS)
            assert not [key for key in store.objects if key.startswith(first)]
        assert leftovers == []
        assert store.pending == {}
        for hour in HOURS[2 if self.expired else 0 :]:
            assert sorted(store.joined(hour)) == sorted(self.published[hour])


LakeMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestLake = LakeMachine.TestCase
