from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.kafka.topicnames import TopicNames
from blueflow.records import DATASETS


def test_by_kind_each_data_set_has_a_topic() -> None:
    names = TopicNames()
    assert names.of_dataset == {name: f"bluesky.{name}" for name in DATASETS}
    assert names.events == [f"bluesky.{name}" for name in DATASETS]
    assert (names.cursor, names.dlq) == ("bluesky.cursor", "bluesky.dlq")


def test_single_all_have_one() -> None:
    names = TopicNames("x-", "single")
    assert set(names.of_dataset) == set(DATASETS)
    assert set(names.of_dataset.values()) == {"x-events"}
    assert names.events == ["x-events"]
    assert (names.cursor, names.dlq) == ("x-cursor", "x-dlq")


@pytest.mark.parametrize("route", ["by-kind", "single"])
@given(prefix=st.from_regex(r"[A-Za-z0-9._-]{0,128}", fullmatch=True))
def test_no_name_is_taken_twice_and_all_have_the_prefix(route: str, prefix: str) -> None:
    names = TopicNames(prefix, route)
    every = [*names.events, names.cursor, names.dlq]
    assert len(set(every)) == len(every)
    assert all(name.startswith(prefix) and len(name) <= 249 for name in every)


NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,6}", fullmatch=True)


@given(st.tuples(NAMES | st.just("bluesky."), NAMES), st.tuples(NAMES | st.just("bluesky."), NAMES))
def test_pipelines_of_different_topics_do_not_fence_each_other(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    ids = {TopicNames(prefix).transactional_id(pipeline) for prefix, pipeline in (one, other)}
    assert len(ids) == len({one, other})
    routes = {TopicNames(one[0], route).transactional_id(one[1]) for route in ("by-kind", "single")}
    assert len(routes) == 1  # they have one topic of cursors
