"""What authors claim as the time: read leniently, and never an error."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.lake.createdat import parse_all, parse_us
from blueflow.lake.schema import TIME

MOMENT = datetime(2026, 7, 4, 16, 5, 6, tzinfo=UTC)
READ = {
    "2026-07-04T16:05:06Z": MOMENT,
    "2026-07-04T16:05:06.5Z": MOMENT.replace(microsecond=500_000),
    "2026-07-04T16:05:06.123Z": MOMENT.replace(microsecond=123_000),
    "2026-07-04T16:05:06.123456Z": MOMENT.replace(microsecond=123_456),
    "2026-07-04T16:05:06.123456789Z": MOMENT.replace(microsecond=123_456),
    "2026-07-04T16:05:06+00:00": MOMENT,
    "2026-07-04T18:05:06+02:00": MOMENT,
    "2026-07-04T12:35:06.000-03:30": MOMENT,
    "2026-07-04t16:05:06z": MOMENT,
    "2026-07-04 16:05:06Z": MOMENT,
    "2026-07-04T16:05:06": MOMENT,
    " 2026-07-04T16:05:06Z\n": MOMENT,
    "2026-07-04": MOMENT.replace(hour=0, minute=0, second=0),
    "0001-01-01T00:00:00Z": datetime.min.replace(tzinfo=UTC),
    "9999-12-31T23:59:59.999999Z": datetime.max.replace(tzinfo=UTC),
}
NOT_READ = [
    "",
    "yesterday",
    "0000-01-01T00:00:00Z",
    "0000-12-31T23:00:00-02:00",
    "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01",
    "10000-01-01T00:00:00Z",
    "+010000-01-01T00:00:00Z",
    "-000001-01-01T00:00:00Z",
    "2026-02-31T00:00:00Z",
    "2026-07-04T16:05:60Z",
    "2026-07-04T25:00:00Z",
    "1783180800",
    "2026-07-04T16:05:06\x00Z",
    "2026-07-04T16:05:06Z" + " " * 100,
    "٢٠٢٦-07-04T16:05:06Z",
]


@pytest.mark.parametrize(("text", "time"), READ.items())
def test_times_are_read(text: str, time: datetime) -> None:
    assert parse_all(pa.array([text, None])).to_pylist() == [time, None]


@pytest.mark.parametrize("text", NOT_READ)
def test_what_is_no_time_is_null(text: str) -> None:
    assert parse_us(text) is None
    assert parse_all(pa.array([text])).to_pylist() == [None]


def test_one_odd_time_does_not_touch_its_neighbours() -> None:
    texts = [*READ, *NOT_READ, None]
    times = parse_all(pa.array(texts))
    assert times.type == TIME
    assert times.to_pylist() == [*READ.values(), *(None for _ in NOT_READ), None]


@given(st.lists(st.none() | st.text(max_size=30) | st.datetimes().map(datetime.isoformat)))
def test_a_column_is_read_as_its_values_are(texts: list[str | None]) -> None:
    expected = [None if text is None else parse_us(text) for text in texts]
    column = parse_all(pa.array(texts, pa.string()))
    assert column.cast(pa.int64()).to_pylist() == expected


@given(st.lists(st.sampled_from([*READ, *NOT_READ]), max_size=5))
def test_neighbours_of_any_kind(texts: list[str]) -> None:
    column = parse_all(pa.array(texts, pa.string()))
    assert column.cast(pa.int64()).to_pylist() == list(map(parse_us, texts))
