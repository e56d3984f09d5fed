"""Paths and data sets: pure, so laws."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.events import Account, Identity, RepoOp, Sync
from blueflow.files.layout import hour_of, segment_path, source_family
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
    assert path == f"likes/hour={calendar:%Y-%m-%dT%H}/000000000001-2.jsonl.zst"


@given(st.integers(), st.integers())
def test_hours_rise_with_time(first: int, second: int) -> None:
    assert (first <= second) <= (hour_of(first) <= hour_of(second))


@pytest.mark.parametrize(
    ("name", "family"),
    [("host", "host"), ("host#2", "host"), ("host:1#12", "host:1"), ("a#b", "a#b"), ("a#", "a#")],
)
def test_an_epoch_belongs_to_its_source(name: str, family: str) -> None:
    assert source_family(name) == family


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
