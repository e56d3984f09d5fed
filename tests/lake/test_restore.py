"""Nothing that an event says is lost in a row."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lake.lakeevents import (
    EVENT,
    made_up_events,
    recorded_events,
    recorded_lines,
)

from blueflow.events import RepoOp, decode_line, encode_event
from blueflow.lake.parquet import encode
from blueflow.lake.restore import event_of, rows_of, wire_of
from blueflow.lake.rows import RowBuffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event


def rows_in_files(buffer: RowBuffer) -> list[dict[str, Any]]:
    """Return the rows of what a buffer holds, as read back from Parquet."""
    tables = [pq.read_table(BytesIO(encode(one.table()))) for one in buffer.take().values()]
    return [row for table in tables for row in rows_of(table)]


def key(event: Event) -> tuple[int, str, int, int, bytes]:
    """Return what gives events an order, also those that share an identity."""
    return event.time_us, event.source, event.seq, event.op_index, encode_event(event)


def check(events: Sequence[Event]) -> None:
    buffer = RowBuffer()
    assert buffer.add_events(events) == []
    assert buffer.rows == len(events)
    rows = rows_in_files(buffer)
    assert sorted(map(event_of, rows), key=key) == sorted(events, key=key)
    assert sorted(map(wire_of, rows)) == sorted(map(encode_event, events))

    assert buffer.add_lines(map(encode_event, events)) == []
    assert rows_in_files(buffer) == rows


@pytest.mark.parametrize("events", [made_up_events, recorded_events])
def test_events_come_back_as_they_were(events: Any) -> None:
    check(events())


@given(st.lists(EVENT, max_size=4))
def test_any_event_comes_back_as_it_was(events: list[Event]) -> None:
    check(events)


def test_recorded_lines_come_back_as_they_were() -> None:
    lines = recorded_lines()
    buffer = RowBuffer()
    assert buffer.add_lines(lines) == []
    rows = rows_in_files(buffer)
    assert sorted(json.dumps(json.loads(wire_of(row)), sort_keys=True) for row in rows) == sorted(
        json.dumps({"op_index": 0} | json.loads(line), sort_keys=True) for line in lines
    )
    texts = b"\n".join(lines)
    for row in rows:
        if row.get("record_json") is not None:
            assert row["record_json"].encode() in texts, "the record is kept to the byte"


def test_the_text_of_a_record_is_kept_to_the_byte() -> None:
    record = b'{ "b" : 1.50e3,"a":"\\u00e9\\/ \xc3\xa9",\t"a":[ ] }'
    line = b'{"did":"d","time_us":1,"kind":"commit","source":"s","seq":1,"commit":{"rev":"r",'
    line += b'"operation":"create","collection":"c","rkey":"k","record":' + record + b"}}"
    buffer = RowBuffer()
    assert buffer.add_lines([line]) == []
    (row,) = rows_in_files(buffer)
    assert row["record_json"].encode() == record
    assert record in wire_of(row)
    assert event_of(row) == decode_line(line, "", 0)


def test_a_time_may_be_one_of_pythons() -> None:
    event = RepoOp("s", 1, 0, "d", 1_783_180_800_000_001, "r", "delete", "c", "k")
    buffer = RowBuffer()
    buffer.add_events([event])
    (row,) = rows_in_files(buffer)
    row["time"] = datetime(2026, 7, 4, 16, 0, 0, 1, tzinfo=UTC)
    assert event_of(row) == event
    assert wire_of(row) == encode_event(event)
