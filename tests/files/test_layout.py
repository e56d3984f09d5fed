"""Paths and data sets: pure, so laws."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.events import Account, Identity, RepoOp, Sync, family
from blueflow.files.layout import (
    HOUR_US,
    commit_of,
    hour_of,
    hours_of,
    newest_hours,
    segment_path,
)
from blueflow.records import DATASETS, dataset_of

if TYPE_CHECKING:
    from blueflow.events import Event

NOW_US = 1_783_180_800_000_000


@given(st.integers(-(2**64), 2**64))
def test_any_time_has_a_sane_path(time_us: int) -> None:
    path = segment_path("posts", hour_of(time_us), 7, 1)
    assert re.fullmatch(r"posts/hour=\d{4}-\d\d-\d\dT\d\d/000000000007\.jsonl\.zst", path)


@given(st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31, 23, 59, 59)))  # noqa: DTZ001
def test_the_hour_is_that_of_the_calendar(moment: datetime) -> None:
    time_us = round((moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    path = segment_path("likes", hour_of(time_us * 1_000_000), 1, 2)
    calendar = datetime.fromtimestamp(time_us, UTC)
    assert path == f"likes/hour={calendar:%Y-%m-%dT%H}/000000000001.p0002.jsonl.zst"


@given(st.tuples(st.integers(1, 10**6), st.integers(1, 9999)), st.data())
def test_names_are_in_the_order_of_commits_and_parts(
    one: tuple[int, int], data: st.DataObject
) -> None:
    other = data.draw(st.tuples(st.sampled_from([one[0], one[0] + 1]), st.integers(1, 9999)))
    paths = [segment_path("posts", 7, *which) for which in (one, other)]
    assert (paths[0] < paths[1]) == (one < other)
    assert commit_of(paths[0].rpartition("/")[2]) == one[0]


@given(st.integers(), st.integers())
def test_hours_rise_with_time(first: int, second: int) -> None:
    assert (first <= second) <= (hour_of(first) <= hour_of(second))


times = st.integers(-(2**40), 2**52)


@given(st.lists(times), st.integers(0, 2**52), st.integers(1, 2**52))
def test_after_the_first_batch_hours_stay_near_the_stream(
    times_us: list[int], before_us: int, through_us: int
) -> None:
    hours = hours_of(times_us, before_us=through_us, through_us=through_us)
    first, last = hour_of(through_us - 48 * HOUR_US), hour_of(through_us + HOUR_US)
    assert all(first <= hour <= last for hour in hours)
    jump = hours_of(times_us, before_us=before_us, through_us=through_us)
    assert max(jump, default=0) <= hour_of(max(before_us, through_us) + HOUR_US)


@given(st.lists(times), times)
def test_without_a_reference_every_time_has_its_own_hour(
    times_us: list[int], before_us: int
) -> None:
    hours = hours_of(times_us, before_us=before_us, through_us=0)
    assert hours == [hour_of(time_us) for time_us in times_us]


@pytest.mark.parametrize("before_us", [0, NOW_US - 1])
def test_a_jump_forward_leaves_both_sides_their_hours(before_us: int) -> None:
    later_us = NOW_US + 200 * 24 * HOUR_US
    times_us = [NOW_US, NOW_US - HOUR_US, NOW_US + 1, later_us, later_us - HOUR_US]
    hours = hours_of(times_us, before_us=before_us, through_us=later_us)
    assert hours == [hour_of(time_us) for time_us in times_us]


@pytest.mark.parametrize(
    ("offset_us", "kept"),
    [
        (-48 * HOUR_US, True),
        (-48 * HOUR_US - 1, False),
        (HOUR_US, True),
        (HOUR_US + 1, False),
        (-(2**70), False),
        (2**70, False),
    ],
)
def test_an_hour_is_kept_from_two_days_before_to_one_hour_after(
    offset_us: int, *, kept: bool
) -> None:
    time_us = NOW_US + offset_us
    (hour,) = hours_of([time_us], before_us=NOW_US, through_us=NOW_US)
    assert hour == hour_of(time_us if kept else NOW_US)


@given(st.integers(0, 10**6), st.integers(1, 10**12 - 1), st.integers(1, 50))
def test_a_segment_tells_its_commit(hour: int, number: int, part: int) -> None:
    assert commit_of(segment_path("posts", hour, number, part).rpartition("/")[2]) == number


def test_a_name_that_is_not_ours_has_no_commit() -> None:
    names = ["notes.txt", "000000000009.jsonl", "x000000000009.jsonl.zst"]
    assert [commit_of(name) for name in names] == [0, 0, 0]


def test_only_the_newest_hours_are_looked_at() -> None:
    names = [f"hour=2026-07-{day:02}T{hour:02}" for day in range(1, 31) for hour in range(24)]
    assert newest_hours(["hour=other.zip", "notes", *reversed(names)]) == names[-64:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("host", "host"), ("host#2", "host"), ("host:1#12", "host:1"), ("a#b", "a#b"), ("a#", "a#")],
)
def test_an_epoch_belongs_to_its_source(name: str, expected: str) -> None:
    assert family(name) == expected


@pytest.mark.parametrize(
    ("collection", "dataset"),
    [
        ("app.bsky.feed.post", "posts"),
        ("app.bsky.feed.like", "likes"),
        ("app.bsky.feed.repost", "reposts"),
        ("app.bsky.graph.follow", "follows"),
        ("app.bsky.feed.postgate", "other"),
        ("app.bsky.graph.block", "other"),
        ("", "other"),
    ],
)
def test_a_collection_has_a_data_set(collection: str, dataset: str) -> None:
    event = RepoOp("s", 1, 0, "did:a", NOW_US, "r", "delete", collection, "k")
    assert dataset_of(event) == dataset
    assert dataset in DATASETS


def test_account_events_have_one_data_set() -> None:
    events: list[Event] = [
        Identity("s", 1, "did:a", NOW_US, "t"),
        Account("s", 1, "did:a", NOW_US, "t", active=True),
        Sync("s", 1, "did:a", NOW_US, "t", "r", b""),
    ]
    assert {dataset_of(event) for event in events} == {"accounts"}
