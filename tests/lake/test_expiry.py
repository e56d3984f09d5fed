from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from blueflow.errors import CompactionError, StoreUnavailableError
from blueflow.lake import versions
from blueflow.lake.compaction import Compactor
from blueflow.lake.expiry import Expired, expire
from blueflow.lake.hours import Hour, Limits
from blueflow.lake.layout import Shard, fresh_key, hour_folder
from blueflow.testing import lakestore
from blueflow.testing.faults import Faults, cancel_at
from blueflow.testing.lakefiles import HandWriter, WatchedObjects, row, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

OLD, NEW = 500, 600
POSTS, YOUNG = Hour("posts", OLD), Hour("posts", NEW)
SHARD = Shard("a")
WATERMARK_US = 10**18
NOW_S = (OLD + 1) * 3600.0 + 90 * 86400
DOWN = StoreUnavailableError("memory", 1.0, "down")


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(function: Callable[..., Any], *args: Any) -> Any:
        answer = function(*args)
        await anyio.lowlevel.checkpoint()
        return answer

    monkeypatch.setattr(versions, "run_sync", run)


def compactor(store: WatchedObjects) -> Compactor:
    limits = Limits(0, collect_s=0)
    return Compactor(store, lateness_s=0, instance="c", clock=lambda: NOW_S, limits=limits)


async def filled() -> tuple[WatchedObjects, HandWriter]:
    """Two versions of an old hour, one of a young one, and an old file that nobody compacted."""
    store = WatchedObjects(clock=lambda: NOW_S)
    writer = HandWriter(store, SHARD)
    for number in range(2):
        rows = {POSTS: [row(OLD, number)], YOUNG: [row(NEW, number)]}
        await writer.publish(rows, watermark_us=WATERMARK_US, made_s=NOW_S)
        await compactor(store).compact(*POSTS)
    await compactor(store).compact(*YOUNG)
    await writer.publish({POSTS: [row(OLD, 7)]}, watermark_us=WATERMARK_US, made_s=NOW_S)
    return store, writer


async def run(store: WatchedObjects, **named: Any) -> Expired:
    return await expire(store, now_s=named.pop("now_s", NOW_S), instance="e", **named)


def left_of(store: WatchedObjects, hour: Hour) -> list[str]:
    folders = tuple(hour_folder(root, *hour) for root in ("fresh", "raw"))
    return sorted(key for key in store.objects if key.startswith(folders))


async def test_an_hour_goes_when_its_time_is_over() -> None:
    store, _ = await filled()
    young = left_of(store, YOUNG)
    sizes = sum(len(store.objects[k]) for k in left_of(store, POSTS) if k.endswith(".parquet"))
    assert await run(store, now_s=NOW_S - 1) == Expired()
    dry = await run(store, dry_run=True)
    assert dry == Expired(hours=1, files=5, bytes=sizes)
    assert len(left_of(store, POSTS)) == 7
    assert len(store.records(POSTS)) == 2
    assert await run(store) == dry
    assert left_of(store, POSTS) == []
    assert left_of(store, YOUNG) == young
    record = store.records(POSTS)[-1]
    assert (record.version, record.kind) == (3, "expired")
    assert record.inputs == (fresh_key(SHARD, 3, *POSTS),)  # who recovers does not miss it
    assert await run(store) == Expired()
    assert len(store.records(POSTS)) == 3


async def test_late_rows_of_an_expired_hour_are_compacted_alone_and_expire_again() -> None:
    store, writer = await filled()
    await run(store)
    late = [row(OLD, 9)]
    await writer.publish({POSTS: late}, watermark_us=WATERMARK_US, made_s=NOW_S)
    assert await compactor(store).compact(*POSTS) == "compacted"
    marker = store.marker(POSTS)
    assert marker is not None
    assert (marker.version, marker.rows, len(marker.files), len(marker.covers)) == (4, 1, 1, 1)
    assert store.joined(POSTS) == late
    assert (await run(store)).hours == 1
    assert left_of(store, POSTS) == []


async def test_an_unfinished_version_is_finished_first() -> None:
    store, _ = await filled()
    complete = store.complete

    store.complete = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await compactor(store).compact(*POSTS)
    store.complete = complete  # type: ignore[method-assign]
    assert await run(store) == Expired(busy=["posts/1970-01-21T20"])
    assert await compactor(store).compact(*POSTS) == "finished"
    assert (await run(store)).busy == []
    assert left_of(store, POSTS) == []


@pytest.mark.parametrize("side", ["faults", "after"])
async def test_failing_anywhere_and_run_again_it_ends_the_same(side: str) -> None:
    fired = 0
    begun, _ = await filled()
    while True:
        store = begun.copy()
        faults = Faults(fired + 1, DOWN)
        setattr(store, side, faults)
        with suppress(StoreUnavailableError):
            await run(store)
        if not faults.fired:
            break
        fired += 1
        store.look()
        await run(store)
        assert left_of(store, POSTS) == []
        assert len(store.records(POSTS)) == 3
        assert len(rows_of_root(store, "raw")) == 2
    assert fired == 3  # the record, the markers, the files


async def test_cancelled_anywhere_and_run_again_it_ends_the_same() -> None:
    suspension, reached = 0, True
    begun, _ = await filled()
    while reached:
        suspension += 1
        store = begun.copy()
        reached = await cancel_at(suspension, lambda store=store: run(store))  # type: ignore[misc]
        store.look()
        await run(store)
        assert left_of(store, POSTS) == []
        assert len(store.records(POSTS)) == 3
    assert suspension > 20


async def test_compaction_after_a_crash_of_expiry_does_not_bring_rows_back() -> None:
    store, writer = await filled()
    store.faults = Faults(2, DOWN)
    with pytest.raises(StoreUnavailableError):
        await run(store)  # the record is written, nothing is removed
    store.faults = Faults()
    late = [row(OLD, 9)]
    await writer.publish({POSTS: late}, watermark_us=WATERMARK_US, made_s=NOW_S)
    assert await compactor(store).compact(*POSTS) == "compacted"
    marker = store.marker(POSTS)
    assert marker is not None
    assert marker.rows == 1
    await run(store)
    assert left_of(store, POSTS) == []
    assert [record.kind for record in store.records(POSTS)][2:] == [
        "expired",
        "compacted",
        "expired",
    ]


async def test_a_slow_compactor_promises_nothing_that_expired_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, _ = await filled()
    begun.complete, complete = fail, begun.complete  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await compactor(begun).compact(*POSTS)
    begun.complete = complete  # type: ignore[method-assign]
    met = 0
    while True:
        store, calls, reached = begun.copy(), 0, False
        # For one moment there may be a marker that is taken back; here the end counts.
        store.look = lambda: None  # type: ignore[method-assign]

        async def pause(store: WatchedObjects = store, at: int = met + 1) -> None:
            nonlocal calls, reached
            calls += 1
            if calls == at:  # somebody finishes the version, and the hour expires
                reached = True
                with suppress(StoreUnavailableError):
                    await compactor(store).compact(*POSTS)
                await run(store)

        monkeypatch.setattr(lakestore, "checkpoint", pause)
        with suppress(CompactionError):  # its inputs went
            await compactor(store).compact(*POSTS)
        if not reached:
            break
        met += 1
        marker = store.marker(POSTS)
        assert marker is None or marker.files == ()
        await run(store)
        assert left_of(store, POSTS) == []
    assert met > 10


async def fail(staged: object) -> None:
    raise DOWN


async def test_foreign_files_stay() -> None:
    store, _ = await filled()
    foreign = [hour_folder(root, *POSTS) + "notes.parquet" for root in ("fresh", "raw")]
    foreign += [hour_folder("raw", *POSTS) + "likes-19700121T20-000001-01.parquet"]
    for key in foreign:
        store.objects[key], store._modified_s[key] = b"", 0.0
        store._rows[b""] = []
    await run(store)
    assert left_of(store, POSTS) == sorted(foreign)


async def test_processed_data_goes_by_the_age_of_its_hour() -> None:
    store = WatchedObjects(clock=lambda: NOW_S)
    folder = "processed/trends/alerts/year=1970/month=01/day=21/hour=20/"
    later = folder.replace("hour=20", "hour=21")
    for key in (folder + "a.parquet", folder + "_complete-000001.json", folder + "readme"):
        await store.put_new(key, b"four")
    await store.put_new(later + "a.parquet", b"four")
    assert (await run(store)).processed_hours == 0
    done = await run(store, now_s=(OLD + 1) * 3600.0 + 365 * 86400)
    assert (done.processed_hours, done.files, done.bytes) == (1, 2, 8)
    assert sorted(store.objects) == [folder + "readme", later + "a.parquet"]


@pytest.mark.parametrize("name", ["raw_days", "processed_days"])
@pytest.mark.parametrize("days", [-1, float("nan")])
async def test_days_that_would_remove_the_future_are_refused(name: str, days: float) -> None:
    store, _ = await filled()
    before = dict(store.objects)
    with pytest.raises(ValueError, match=f"{name} is {days}"):
        await run(store, **{name: days})
    assert store.objects == before


def rows_of_root(store: WatchedObjects, root: str) -> list[Any]:
    return [
        one
        for key, data in store.objects.items()
        if key.startswith(root) and key.endswith(".parquet")
        for one in rows_of(data)
    ]
