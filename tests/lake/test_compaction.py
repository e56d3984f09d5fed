from __future__ import annotations

import asyncio
import errno
import io
import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blueflow.errors import (
    CommitLogError,
    CompactionError,
    InvariantError,
    OutputIOError,
    StoreUnavailableError,
    UploadGoneError,
)
from blueflow.lake import merge, parquet, versions
from blueflow.lake.compaction import Compactor, is_ours
from blueflow.lake.hours import Hour, Limits
from blueflow.lake.janitor import abort_orphans
from blueflow.lake.layout import Shard, fresh_key, hour_folder, hour_key, marker_key, raw_key
from blueflow.lake.logrecord import encode
from blueflow.metrics import Metrics
from blueflow.records import DATASETS
from blueflow.testing import lakestore
from blueflow.testing.faults import Faults, cancel_at
from blueflow.testing.lakefiles import HandWriter, Row, WatchedObjects, row, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOUR = 500
POSTS, LIKES = Hour("posts", HOUR), Hour("likes", HOUR)
END_US = (HOUR + 1) * 3_600_000_000
NOW_S = END_US / 1e6 + 300
SHARD = Shard("a")
ROWS = [row(HOUR, seq, at_us=seq % 7) for seq in range(12)]
DOWN = StoreUnavailableError("memory", 1.0, "down")


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Without threads what runs is the same every time; parts are small, so that there are some."""
    if "threads" not in request.node.name:
        monkeypatch.setattr(versions, "run_sync", run_inline)
    monkeypatch.setattr(merge, "_ROWS_STEP", 4)
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(parquet, "_BLOOM_FILTERS", False)  # most of the time of files so small


async def run_inline(function: Callable[..., Any], *args: Any) -> Any:
    answer = function(*args)
    await anyio.lowlevel.checkpoint()
    return answer


def compactor(store: WatchedObjects, name: str = "c", **named: Any) -> Compactor:
    named.setdefault("file_bytes_max", 1)
    named.setdefault("limits", Limits(0, collect_s=0))
    return Compactor(store, lateness_s=60, instance=name, clock=lambda: NOW_S, **named)


async def filled(store: WatchedObjects) -> HandWriter:
    """Publish three files of posts and one of likes, and close the hour."""
    writer = HandWriter(store, SHARD)
    for part in range(3):
        rows: dict[Hour, list[Row]] = {POSTS: ROWS[part::3]}
        if part == 0:
            rows[LIKES] = ROWS[:2]
        await writer.publish(rows, watermark_us=END_US + 60_000_000, made_s=NOW_S - 200)
    return writer


def store_of(**named: Any) -> WatchedObjects:
    return WatchedObjects(clock=lambda: NOW_S - 100, **named)


def raw_rows(store: WatchedObjects, hour: Hour) -> list[Row]:
    folder = hour_folder("raw", *hour)
    keys = sorted(k for k in store.objects if k.startswith(folder) and k.endswith(".parquet"))
    return [one for key in keys for one in rows_of(store.objects[key])]


async def settle(store: WatchedObjects, hours: tuple[Hour, ...] = (POSTS, LIKES)) -> None:
    """Do what the next keepers do, until nothing is left."""
    for hour in hours:
        for _ in range(9):
            if await compactor(store, "next").compact(*hour) == "nothing":
                break
        else:
            raise AssertionError("it never ends")


async def check_settled(store: WatchedObjects) -> None:
    store.look()
    assert raw_rows(store, POSTS) == sorted(ROWS)
    for hour, rows in ((POSTS, ROWS), (LIKES, ROWS[:2])):
        marker = store.marker(hour)
        assert marker is not None
        assert (marker.rows, sorted(store.joined(hour))) == (len(rows), sorted(rows))
        folder = hour_folder("fresh", *hour)
        covered = [key[len(folder) :] for key in store.objects if key.startswith(folder)]
        assert sorted(marker.covers) == sorted(covered)
    await abort_orphans(store, upload_s=86400, now_s=NOW_S + 90_000)
    assert store.pending == {}


async def test_a_closed_hour_becomes_few_sorted_files_and_a_marker(tmp_path: Path) -> None:
    store, metrics = store_of(), Metrics()
    await filled(store)
    one = compactor(store, metrics=metrics.lake, folder=tmp_path)
    assert await one.compact(*POSTS) == "compacted"
    assert await one.compact(*POSTS) == "nothing"
    (record,) = store.records(POSTS)
    assert record.through == {"a/0-of-1": 3}
    assert record.inputs == tuple(fresh_key(SHARD, number, *POSTS) for number in (1, 2, 3))
    assert [file.key for file in record.outputs] == [
        raw_key(*POSTS, 1, part) for part in range(1, len(record.outputs) + 1)
    ]
    assert len(record.outputs) > 1
    assert (record.rows, record.bytes) == (12, sum(f.staged.size for f in record.outputs))
    await settle(store)
    await check_settled(store)
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - nothing else runs
    assert metrics.lake.compactions["ok"].total == 1


async def test_a_dataset_without_rows_gets_a_marker_without_files() -> None:
    store = store_of()
    await filled(store)
    done = await compactor(store).compact_due(NOW_S)
    assert done.done == {Hour(dataset, HOUR): "compacted" for dataset in DATASETS}
    assert (done.plan.unmarked, done.failed) == (6, {})
    marker = store.marker(Hour("follows", HOUR))
    assert marker is not None
    assert (marker.rows, marker.bytes, marker.files, marker.covers) == (0, 0, (), ())
    assert (await compactor(store).compact_due(NOW_S)).done == {}
    await check_settled(store)


async def test_late_rows_make_a_version_of_their_own() -> None:
    store = store_of()
    writer = await filled(store)
    await compactor(store).compact_due(NOW_S)
    before = {key: data for key, data in store.objects.items() if key.startswith("raw/")}
    late = [row(HOUR, seq) for seq in (100, 101)]
    await writer.publish({POSTS: late}, watermark_us=END_US + 60_000_000, made_s=NOW_S)
    done = await compactor(store).compact_due(NOW_S)
    assert done.done == {POSTS: "compacted"}
    marker = store.marker(POSTS)
    assert marker is not None
    assert (marker.version, marker.rows, len(marker.covers)) == (2, 14, 4)
    assert sorted(raw_rows(store, POSTS)) == sorted(ROWS + late)
    assert before.items() <= store.objects.items()
    assert [file.key for file in store.records(POSTS)[1].outputs] == [raw_key(*POSTS, 2, 1)]


async def test_an_hour_waits_for_a_file_that_a_log_names() -> None:
    store = store_of()
    writer = await filled(store)
    await writer.record({POSTS: [row(HOUR, 100)]}, watermark_us=END_US + 60_000_000, made_s=NOW_S)
    assert await compactor(store).compact(*POSTS) == "waits"
    assert await compactor(store).compact(*LIKES) == "compacted"
    assert POSTS in (await compactor(store).compact_due(NOW_S)).plan.waiting
    await writer.complete()
    assert await compactor(store).compact(*POSTS) == "compacted"


async def test_foreign_files_are_left_alone() -> None:
    store = store_of()
    await filled(store)
    foreign = [f"fresh/posts/{name}" for name in ("readme", "year=2026/x.parquet", "year=x/y")]
    foreign += [hour_folder("fresh", *POSTS) + name for name in ("notes.parquet", "_complete")]
    foreign += [hour_folder("raw", *POSTS) + "other.parquet", hour_key(*POSTS, 1) + ".bak"]
    foreign += [hour_folder("raw", *POSTS) + "_complete-1.json"]
    data = next(d for k, d in store.objects.items() if k.startswith(hour_folder("fresh", *POSTS)))
    for key in foreign:
        store.objects[key], store._modified_s[key] = b"", 0.0
    store.objects[foreign[3]] = data
    # The reader that watches counts what others put there; it is not asked here.
    store.look = lambda: None  # type: ignore[method-assign]
    await compactor(store).compact_due(NOW_S)
    assert raw_rows_of_ours(store) == sorted(ROWS)
    assert all(key in store.objects for key in foreign)


def raw_rows_of_ours(store: WatchedObjects) -> list[Row]:
    marker = store.marker(POSTS)
    assert marker is not None
    names = [hour_folder("raw", *POSTS) + name for name in marker.files]
    return [one for name in names for one in rows_of(store.objects[name])]


# --- whatever fails, wherever ----------------------------------------------------------------


@pytest.mark.parametrize("side", ["faults", "after"])
async def test_a_store_that_fails_at_any_change_loses_and_doubles_nothing(side: str) -> None:
    fired = 0
    begun = store_of()
    await filled(begun)
    while True:
        store = begun.copy()
        faults = Faults(fired + 1, DOWN)
        setattr(store, side, faults)
        with suppress(StoreUnavailableError):
            await compactor(store, "first").compact(*POSTS)
        if not faults.fired:
            break
        fired += 1
        store.look()
        await settle(store)
        await check_settled(store)
    assert fired >= 7  # stage and complete of two files and more, the record, the marker


async def test_cancelled_anywhere_it_loses_and_doubles_nothing() -> None:
    suspension, reached = 0, True
    begun = store_of()
    await filled(begun)
    while reached:
        suspension += 1
        store = begun.copy()
        work = compactor(store, "first")
        reached = await cancel_at(suspension, lambda work=work: work.compact(*POSTS))  # type: ignore[misc]
        store.look()
        await settle(store)
        await check_settled(store)
    assert suspension > 20


async def crashed_after_the_record(store: WatchedObjects) -> None:
    await filled(store)
    complete = store.complete

    async def fail(staged: object) -> None:
        raise DOWN

    store.complete = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await compactor(store, "first").compact(*POSTS)
    store.complete = complete  # type: ignore[method-assign]
    assert store.marker(POSTS) is None
    assert len(store.records(POSTS)[0].outputs) > 2


async def test_whoever_comes_next_finishes_a_version() -> None:
    store = store_of()
    await crashed_after_the_record(store)
    assert await compactor(store, "next").compact(*POSTS) == "finished"
    assert [record.instance for record in store.records(POSTS)] == ["first"]
    await settle(store)
    await check_settled(store)


async def test_when_the_answer_to_the_record_is_lost_its_uploads_are_kept() -> None:
    store = store_of()
    await filled(store)
    put_new = store.put_new

    async def answer_lost(key: str, data: bytes) -> bool:
        await put_new(key, data)
        raise DOWN

    store.put_new = answer_lost  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await compactor(store, "first").compact(*POSTS)
    store.put_new = put_new  # type: ignore[method-assign]
    assert len(store.pending) == len(store.records(POSTS)[0].outputs)
    assert await compactor(store, "next").compact(*POSTS) == "finished"
    await settle(store)
    await check_settled(store)


@pytest.mark.parametrize("completed", [0, 1, 2])
async def test_uploads_that_expired_are_made_anew_from_the_same_rows(completed: int) -> None:
    store = store_of()
    await crashed_after_the_record(store)
    outputs = store.records(POSTS)[0].outputs
    for file in outputs[:completed]:
        await store.complete(file.staged)
    store.pending.clear()
    assert await compactor(store, "next", file_bytes_max=2**20).compact(*POSTS) == "finished"
    for file in outputs:
        assert len(rows_of(store.objects[file.key])) == file.rows
    await settle(store)
    await check_settled(store)


@pytest.mark.parametrize("side", ["faults", "after"])
async def test_a_store_that_fails_while_uploads_are_made_anew(side: str) -> None:
    fired = 0
    begun = store_of()
    await crashed_after_the_record(begun)
    begun.pending.clear()
    while True:
        store = begun.copy()
        faults = Faults(fired + 1, DOWN)
        setattr(store, side, faults)
        with suppress(StoreUnavailableError):
            await compactor(store, "second").compact(*POSTS)
        if not faults.fired:
            break
        fired += 1
        await settle(store)
        await check_settled(store)
    assert fired >= 5


async def test_without_its_inputs_an_unfinished_version_is_an_error() -> None:
    store = store_of()
    await crashed_after_the_record(store)
    store.pending.clear()
    del store.objects[fresh_key(SHARD, 2, *POSTS)]
    with pytest.raises(CompactionError, match="is not there"):
        await compactor(store, "next").compact(*POSTS)
    assert store.marker(POSTS) is None


async def test_an_input_that_others_changed_is_an_error() -> None:
    store = store_of()
    await crashed_after_the_record(store)
    store.pending.clear()
    key = fresh_key(SHARD, 2, *POSTS)
    store.objects[key] = store.objects[fresh_key(SHARD, 1, *LIKES)]
    store.look = lambda: None  # type: ignore[method-assign]
    with pytest.raises(CompactionError):
        await compactor(store, "next").compact(*POSTS)
    assert store.marker(POSTS) is None


# --- several compactors ------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32), crash=st.integers(0, 80), lost=st.booleans())
def test_compactors_that_race_lose_and_double_nothing(
    seed: int,
    crash: int,
    lost: bool,  # noqa: FBT001
) -> None:
    async def race() -> None:
        store = store_of()
        if lost:
            await crashed_after_the_record(store)
            store.pending.clear()
        else:
            await filled(store)
        chance = random.Random(seed)

        async def pause() -> None:
            for _ in range(chance.choice((1, 1, 2, 5, 20))):
                await asyncio.sleep(0)

        async def work(name: str) -> None:
            for _ in range(3):
                await compactor(store, name).compact(*POSTS)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lakestore, "checkpoint", pause)
            patch.setattr(versions, "run_sync", run_inline)
            first = cancel_at(crash, lambda: work("first")) if crash else work("first")
            await asyncio.gather(first, work("second"), work("third"))
            assert raw_rows(store, POSTS) == sorted(ROWS)
            await settle(store)
            await check_settled(store)
            assert len(store.records(POSTS)) == 1

    asyncio.run(race())


async def test_who_loses_the_race_gives_up_its_uploads() -> None:
    store = store_of()
    await filled(store)

    slow = compactor(store, "slow")
    put_new = store.put_new

    async def put_late(key: str, data: bytes) -> bool:
        store.put_new = put_new  # type: ignore[method-assign]
        assert await compactor(store, "quick").compact(*POSTS) == "compacted"
        return await put_new(key, data)

    store.put_new = put_late  # type: ignore[method-assign]
    assert await slow.compact(*POSTS) == "lost"
    assert [record.instance for record in store.records(POSTS)] == ["quick"]
    assert store.pending == {}
    await settle(store)
    await check_settled(store)


async def test_who_loses_the_race_while_it_uploads_has_lost() -> None:
    """The quicker one finishes the hour, and the janitor gives up what nobody needs."""
    store = store_of()
    await filled(store)
    stage = store.stage

    async def stage_late(key: str, content: Any) -> Any:
        store.stage = stage  # type: ignore[method-assign]
        assert await compactor(store, "quick").compact(*POSTS) == "compacted"
        raise UploadGoneError("memory", key)

    store.stage = stage_late  # type: ignore[method-assign]
    assert await compactor(store, "slow").compact(*POSTS) == "lost"
    assert [record.instance for record in store.records(POSTS)] == ["quick"]
    await settle(store)
    await check_settled(store)


async def test_an_upload_that_is_gone_with_nobody_quicker_is_an_error() -> None:
    store = store_of()
    await filled(store)

    async def stage_gone(key: str, content: Any) -> Any:
        raise UploadGoneError("memory", key)

    store.stage = stage_gone  # type: ignore[method-assign]
    with pytest.raises(UploadGoneError):
        await compactor(store).compact(*POSTS)
    assert store.records(POSTS) == []


# --- errors of one hour, and of all ------------------------------------------------------------


async def test_an_hour_that_fails_stops_no_other_and_is_tried_more_seldom() -> None:
    store, metrics = store_of(), Metrics()
    await filled(store)
    store.objects[fresh_key(SHARD, 2, *POSTS)] = b"damaged"
    store._rows[b"damaged"] = []  # the reader that watches is not what is tested here
    one = compactor(store, metrics=metrics.lake)
    store._seen.clear()
    done = await one.compact_due(NOW_S)
    assert list(done.failed) == [POSTS]
    assert isinstance(done.failed[POSTS], CompactionError)
    assert len(done.done) == 5
    assert metrics.lake.compactions["error"].total == 1
    assert (await one.compact_due(NOW_S + 1)).failed == {}
    assert list((await one.compact_due(NOW_S + 60)).failed) == [POSTS]
    assert (await one.compact_due(NOW_S + 61)).failed == {}
    assert store.pending == {}


async def test_a_store_that_is_away_ends_the_round() -> None:
    store = store_of()
    await filled(store)
    store.faults = Faults(1, DOWN)
    with pytest.raises(StoreUnavailableError):
        await compactor(store).compact_due(NOW_S)


async def test_a_hung_store_is_an_error_of_the_hour() -> None:
    store = store_of()
    await filled(store)
    store.get = lambda key: anyio.sleep_forever()  # type: ignore[method-assign]
    one = compactor(store, limits=Limits(0, work_s=0.01))
    with pytest.raises(CompactionError, match=r"not done in 0.01 s"):
        await one.compact(*POSTS, last={})


async def test_a_temporary_folder_that_is_missing_is_the_disks_error(tmp_path: Path) -> None:
    store = store_of()
    await filled(store)
    with pytest.raises(OutputIOError):
        await compactor(store, folder=tmp_path / "missing").compact(*POSTS)


async def test_a_disk_that_is_full_costs_one_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of()
    fired: list[Any] = []
    await filled(store)

    async def without_room(function: Callable[..., Any], *args: Any) -> Any:
        if getattr(function, "__name__", "") == "write_bytes" and not fired:
            fired.append(function)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return await run_inline(function, *args)

    monkeypatch.setattr(versions, "run_sync", without_room)
    one = compactor(store)
    done = await one.compact_due(NOW_S)
    assert [str(error) for error in done.failed.values() if "No space left" in str(error)]
    assert (len(done.failed), len(done.done)) == (1, 5)
    (hour,) = done.failed
    assert (await one.compact_due(NOW_S + 60)).done[hour] == "compacted"
    await check_settled(store)


async def test_a_log_with_a_gap_or_wrong_sums_is_not_added_to() -> None:
    store = store_of()
    await filled(store)
    await settle(store)
    (record,) = store.records(POSTS)
    key = hour_key(*POSTS, 3)
    store.objects[key], store._modified_s[key] = encode(record), 0.0
    with pytest.raises(CommitLogError, match="missing"):
        await compactor(store).compact(*POSTS)
    del store.objects[key]
    store.objects[hour_key(*POSTS, 2)] = encode(record)
    store._modified_s[hour_key(*POSTS, 2)] = 0.0
    with pytest.raises(CommitLogError, match="version 1"):
        await compactor(store).compact(*POSTS)
    del store.objects[hour_key(*POSTS, 2)]
    del store.objects[marker_key(*POSTS, 1)]
    store.objects[hour_key(*POSTS, 1)] = encode(
        type(record)(1, "compacted", "x", 0.0, record.inputs, record.outputs, {}, 1, 1)
    )
    with pytest.raises(InvariantError):
        await compactor(store).compact(*POSTS)


def test_the_work_is_shared() -> None:
    hours = [Hour(dataset, hour) for dataset in DATASETS for hour in range(100)]
    for total in (1, 2, 3):
        shares = [[h for h in hours if is_ours(h, i, total)] for i in range(total)]
        assert sorted(h for share in shares for h in share) == sorted(hours)
        assert min(map(len, shares)) > 100


async def test_two_that_share_do_everything_once() -> None:
    store = store_of()
    await filled(store)
    one = await compactor(store).compact_due(NOW_S, ordinal=0, total=2)
    two = await compactor(store).compact_due(NOW_S, ordinal=1, total=2)
    assert one.done.keys() | two.done.keys() == {Hour(dataset, HOUR) for dataset in DATASETS}
    assert not one.done.keys() & two.done.keys()


async def test_threads_do_the_same() -> None:
    store = store_of()
    await filled(store)
    await compactor(store).compact(*POSTS)
    await settle(store)
    await check_settled(store)
    key = raw_key(*POSTS, 1, 1)
    found = pq.read_metadata(io.BytesIO(store.objects[key]))
    assert found.row_group(0).column(0).compression == "ZSTD"
