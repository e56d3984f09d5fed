from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.errors import InvariantError
from blueflow.lake.hours import Hour, HourFiles, Limits, cumulative_marker, plan
from blueflow.lake.layout import Shard, end_us, fresh_key, hour_name, raw_key
from blueflow.lake.logrecord import HourRecord, LakeFile, Marker, Repair, ShardRecord, Staged
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Mapping

NOW_S = 502 * 3600.0
LIMITS = Limits(lateness_us=100, idle_s=50.0, collect_s=10.0, keep_s=30.0)
HOURS = (500, 501)
SHARDS = tuple(Shard(p, i, n) for p in "pq" for n in (1, 2) for i in range(n))


def key(number: int, dataset: str, hour: int) -> str:
    return fresh_key(SHARDS[0], number, dataset, hour)


def file(key: str, dataset: str, hour: int, rows: int = 1, size: int = 1) -> LakeFile:
    return LakeFile(dataset, hour, rows, 0, 0, Staged(key, "u", (), size, ""))


def shard_record(
    watermark_us: int,
    *,
    kind: str = "commit",
    made_s: float = NOW_S,
    files: tuple[LakeFile, ...] = (),
    repair: Repair | None = None,
) -> ShardRecord:
    return ShardRecord(
        3,
        kind,  # type: ignore[arg-type]
        "i",
        made_s,
        "source",
        {},
        watermark_us=watermark_us,
        files=files,
        repair=repair,
    )


def marker(hour: Hour, covers: tuple[str, ...] = (), made_s: float = NOW_S) -> Marker:
    names = tuple(one.rpartition("/")[2] for one in covers)
    return Marker(hour.dataset, hour_name(hour.hour), 1, made_s, 0, 0, (), names)


LATE = end_us(501) + 100
POSTS = Hour("posts", 500)
POST = key(1, *POSTS)
ALL = tuple(Hour(dataset, 500) for dataset in DATASETS)


def test_an_hour_with_a_file_is_due_in_every_dataset() -> None:
    found = {POSTS: HourFiles({POST: NOW_S})}
    made = plan({SHARDS[0]: shard_record(end_us(500) + 100)}, found, LIMITS, now_s=NOW_S)
    assert (made.due, made.unmarked, made.waiting, made.sweep) == (ALL, 6, {}, ())
    made = plan({SHARDS[0]: shard_record(end_us(500) + 99)}, found, LIMITS, now_s=NOW_S)
    assert (made.due, made.unmarked) == ((), 0)
    assert made.waiting == dict.fromkeys(ALL, "open")


def test_an_hour_far_ahead_is_not_waited_for() -> None:
    """A wrong time was told: nobody would ever close it."""
    last = {SHARDS[0]: shard_record(end_us(499))}
    for hour, why in ((502, "open"), (526, "open"), (527, None), (500_000, None)):
        one = Hour("posts", hour)
        made = plan(last, {one: HourFiles({key(1, *one): NOW_S})}, LIMITS, now_s=NOW_S)
        assert made.waiting.get(one) == why
        assert (one in made.due) == (why is None)
    fast = {SHARDS[0]: shard_record(end_us(600))}  # simulated time, far ahead of the clock
    one = Hour("posts", 602)
    made = plan(fast, {one: HourFiles({key(1, *one): NOW_S})}, LIMITS, now_s=NOW_S)
    assert made.waiting[one] == "open"


def test_idle_and_sealed_logs_hold_up_nothing() -> None:
    found = {POSTS: HourFiles({POST: NOW_S})}
    last = {
        SHARDS[0]: shard_record(LATE),
        Shard("q"): shard_record(0, kind="seal"),
        Shard("r"): shard_record(0, made_s=NOW_S - 50),
    }
    assert plan(last, found, LIMITS, now_s=NOW_S).due == ALL
    last[Shard("s")] = shard_record(0, made_s=NOW_S - 49)
    assert plan(last, found, LIMITS, now_s=NOW_S).due == ()


def test_all_shards_of_a_division_must_have_begun() -> None:
    found = {POSTS: HourFiles({POST: NOW_S})}
    last = {Shard("p", 0, 2): shard_record(LATE)}
    assert set(plan(last, found, LIMITS, now_s=NOW_S).waiting.values()) == {"missing_log"}
    last[Shard("p", 1, 2)] = shard_record(0, made_s=0)  # it began, and is idle
    assert plan(last, found, LIMITS, now_s=NOW_S).due == ALL
    last[Shard("p", 1, 2)] = shard_record(0, kind="seal")
    assert set(plan(last, found, LIMITS, now_s=NOW_S).waiting.values()) == {"missing_log"}


def test_a_repair_and_an_invisible_file_hold_up_their_datasets_hour_only() -> None:
    likes, reposts = Hour("likes", 500), Hour("reposts", 500)
    found = {POSTS: HourFiles({POST: NOW_S})}
    lost = file(key(2, *likes), *likes)
    record = shard_record(
        LATE,
        files=(file(POST, *POSTS), file(key(3, *reposts), *reposts)),
        repair=Repair((lost,), {}, {}),
    )
    made = plan({SHARDS[0]: record}, found, LIMITS, now_s=NOW_S)
    assert made.waiting == {likes: "repair", reposts: "invisible_file"}
    assert set(made.due) == set(ALL) - {likes, reposts}


def test_a_file_that_was_compacted_and_removed_is_not_invisible() -> None:
    found = {POSTS: HourFiles({key(9, *POSTS): 0.0}, marker(POSTS, (POST,)))}
    record = shard_record(LATE, files=(file(POST, *POSTS),))
    assert POSTS in plan({SHARDS[0]: record}, found, LIMITS, now_s=NOW_S).due


def test_late_files_wait_for_others() -> None:
    new = key(9, *POSTS)
    for age_s, due in ((9.0, False), (10.0, True)):
        found = {hour: HourFiles({}, marker(hour)) for hour in ALL}
        found[POSTS] = HourFiles({POST: 0.0, new: NOW_S - age_s}, marker(POSTS, (POST,)))
        made = plan({SHARDS[0]: shard_record(LATE)}, found, LIMITS, now_s=NOW_S)
        assert (made.due == (POSTS,)) == due
        assert (made.waiting == {POSTS: "collecting"}) == (not due)
        assert made.unmarked == 0


def test_what_a_marker_covers_goes_after_its_time_once_all_datasets_have_theirs() -> None:
    new = key(9, *POSTS)
    found = {hour: HourFiles({}, marker(hour, (), 0.0)) for hour in ALL}
    found[POSTS] = HourFiles({POST: 0.0, new: NOW_S}, marker(POSTS, (POST,), NOW_S - 30))
    assert plan({}, found, LIMITS, now_s=NOW_S).sweep == (POST,)
    assert plan({}, found, LIMITS, now_s=NOW_S - 0.1).sweep == ()
    del found[ALL[-1]]
    assert plan({}, found, LIMITS, now_s=NOW_S).sweep == ()


# --- against brute force --------------------------------------------------------------------


@st.composite
def records_of_shards(draw: st.DrawFn) -> dict[Shard, ShardRecord]:
    def files() -> tuple[LakeFile, ...]:
        places = st.tuples(st.integers(1, 4), st.sampled_from(DATASETS[:2]), st.sampled_from(HOURS))
        return tuple(file(key(*p), p[1], p[2]) for p in draw(st.lists(places, max_size=2)))

    return {
        shard: shard_record(
            draw(st.sampled_from((0, end_us(500) + 99, end_us(500) + 100, LATE))),
            kind=draw(st.sampled_from(("commit", "claim", "seal"))),
            made_s=draw(st.sampled_from((NOW_S, NOW_S - 50, NOW_S - 49))),
            files=files(),
            repair=draw(st.sampled_from((None, Repair(files(), {}, {})))),
        )
        for shard in draw(st.sets(st.sampled_from(SHARDS)))
    }


@st.composite
def hours_files(draw: st.DrawFn) -> dict[Hour, HourFiles]:
    found = {}
    for hour in (Hour(dataset, hour) for dataset in DATASETS[:2] for hour in HOURS):
        numbers = st.sets(st.integers(1, 4))
        made_s = st.sampled_from((NOW_S, NOW_S - 29, NOW_S - 30))
        stored_s = st.sampled_from((NOW_S, NOW_S - 9, NOW_S - 10))
        found[hour] = HourFiles(
            {key(n, *hour): draw(stored_s) for n in draw(numbers)},
            marker(hour, tuple(key(n, *hour) for n in sorted(draw(numbers))), draw(made_s))
            if draw(st.booleans())
            else None,
        )
    if draw(st.booleans()):
        for dataset in DATASETS[2:]:
            found |= {Hour(dataset, h): HourFiles({}, marker(Hour(dataset, h))) for h in HOURS}
    return found


def oracle_why(  # noqa: C901, PLR0911 - one plain rule after the other
    last: Mapping[Shard, ShardRecord], found: Mapping[Hour, HourFiles], hour: Hour
) -> str | None:
    """Say it again in other words, one hour at a time; `"done"`: nothing is to be done."""
    files = found.get(hour, HourFiles())
    if not any(h.hour == hour.hour and f.fresh for h, f in found.items()):
        return "done"
    names = {one: one.rpartition("/")[2] for one in files.fresh}
    new = [k for k in files.fresh if files.marker is None or names[k] not in files.marker.covers]
    if files.marker is not None and not new:
        return "done"
    active = {s: r for s, r in last.items() if r.kind != "seal" and NOW_S - r.made_s < 50}
    if min((r.watermark_us for r in active.values()), default=LATE) < end_us(hour.hour) + 100:
        return "open"
    for s in active:
        for i in range(s.total):
            sibling = last.get(Shard(s.pipeline, i, s.total))
            if sibling is None or sibling.kind == "seal":
                return "missing_log"
    for r in active.values():
        if r.repair and any((f.dataset, f.hour) == hour for f in r.repair.files):
            return "repair"
    covers = files.marker.covers if files.marker else ()
    for r in active.values():
        for f in r.files:
            gone = f.key not in files.fresh and f.key.rpartition("/")[2] not in covers
            if (f.dataset, f.hour) == hour and gone:
                return "invisible_file"
    if files.marker is not None and all(NOW_S - files.fresh[k] < 10 for k in new):
        return "collecting"
    return None


@given(records_of_shards(), hours_files())
def test_the_plan_is_what_brute_force_says(
    last: dict[Shard, ShardRecord], found: dict[Hour, HourFiles]
) -> None:
    made = plan(last, found, LIMITS, now_s=NOW_S)
    for hour in (Hour(dataset, hour) for dataset in DATASETS for hour in HOURS):
        why = oracle_why(last, found, hour)
        assert (hour in made.due) == (why is None)
        assert made.waiting.get(hour, "done" if hour not in made.due else None) == why
    assert len(set(made.due)) == len(made.due)
    ages = [found.get(h, HourFiles()).marker is not None for h in made.due]
    assert ages == sorted(ages)
    assert made.unmarked == ages.count(False)
    for key_, hour in ((k, h) for h, f in found.items() for k in f.fresh):
        one = found[hour].marker
        every = all(found.get(Hour(d, hour.hour), HourFiles()).marker for d in DATASETS)
        covered = one is not None and key_.rpartition("/")[2] in one.covers
        old = one is not None and NOW_S - one.made_s >= 30
        assert (key_ in made.sweep) == (every and covered and old)


# --- the marker -----------------------------------------------------------------------------


def hour_record(version: int, rows: int = 0, size: int = 0, *, expired: bool = False) -> HourRecord:
    if expired:
        return HourRecord(version, "expired", "i", 0.0, (key(version, *POSTS),))
    return HourRecord(
        version,
        "compacted",
        "i",
        0.0,
        (key(version, *POSTS),),
        (file(raw_key(*POSTS, version, 1), *POSTS, 10, 5),),
        rows=rows,
        bytes=size,
    )


def test_a_marker_adds_up_what_came_since_the_hour_expired() -> None:
    records = [hour_record(1, 10, 5), hour_record(2, 20, 10)]
    made = cumulative_marker(*POSTS, records, made_s=7.0)
    assert made == Marker(
        "posts",
        hour_name(500),
        2,
        7.0,
        20,
        10,
        ("posts-19700121T20-000001-01.parquet", "posts-19700121T20-000002-01.parquet"),
        ("p-0-of-1-000000000001.parquet", "p-0-of-1-000000000002.parquet"),
    )
    records.append(hour_record(3, expired=True))
    assert cumulative_marker(*POSTS, records, made_s=7.0) is None
    records.append(hour_record(4, 10, 5))
    made = cumulative_marker(*POSTS, records, made_s=7.0)
    assert made is not None
    assert (made.version, made.rows, made.covers) == (4, 10, ("p-0-of-1-000000000004.parquet",))
    assert cumulative_marker(*POSTS, [], made_s=7.0) is None


@pytest.mark.parametrize("records", [[hour_record(2, 10, 5)], [hour_record(1, 11, 5)]])
def test_records_that_do_not_add_up_break_a_promise(records: list[HourRecord]) -> None:
    with pytest.raises(InvariantError):
        cumulative_marker(*POSTS, records, made_s=0.0)
