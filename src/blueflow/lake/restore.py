"""From the lake's rows back to events and wire JSON: nothing that an event says is lost in a row.

A row is a mapping of column names to values, as `rows_of` gives them. Columns that an event does
not need (the hot ones, partitions) may be there or not.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pyarrow as pa

from blueflow.events import Account, Identity, Operation, RepoOp, Sync, encode_event
from blueflow.lake.schema import INT64

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from blueflow.events import Event

_BATCH_ROWS: Final = 4_096
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_NEEDED: Final = frozenset(
    {
        "source", "seq", "op_index", "did", "time", "rev", "operation", "collection", "rkey", "cid",
        "record_json", "kind", "time_text", "handle", "active", "status", "blocks",
    }
)  # fmt: skip


def rows_of(table: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with the columns that an event needs.

    `time` is a number, microseconds since 1970: a relay's time may be beyond what Python's times
    reach.

    Args:
        table: an Arrow table of any dataset.
    """
    chosen = table.select([name for name in table.column_names if name in _NEEDED])
    place = chosen.column_names.index("time")
    numbers = chosen.column("time").cast(pa.timestamp("us", chosen.schema.field(place).type.tz))
    chosen = chosen.set_column(place, "time", numbers.cast(INT64))
    for batch in chosen.to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch.to_pylist()


def event_of(row: Mapping[str, Any]) -> Event:
    """Return the event that a row was made from.

    Raises:
        msgspec.MsgspecError: its record has a number that no Python number can hold.
    """
    source, seq, op_index, did = row["source"], row["seq"], row["op_index"], row["did"]
    time_us = _microseconds(row["time"])
    match row.get("kind"):
        case None:
            record = row["record_json"]
            return RepoOp(
                source, seq, op_index, did, time_us, row["rev"], row["operation"],
                row["collection"], row["rkey"], row["cid"],
                None if record is None else msgspec.json.decode(record),
            )  # fmt: skip
        case "identity":
            return Identity(source, seq, did, time_us, row["time_text"], row["handle"], op_index)
        case "account":
            active, status = row["active"], row["status"]
            return Account(source, seq, did, time_us, row["time_text"], active, status, op_index)
        case _:
            rev, blocks = row["rev"], row["blocks"]
            return Sync(source, seq, did, time_us, row["time_text"], rev, blocks, op_index)


def wire_of(row: Mapping[str, Any]) -> bytes:
    """Return the event that a row was made from as wire JSON, without a newline.

    The record's text is the one that came; around it are the bytes that `encode_event` gives.
    """
    if row.get("kind") is not None:
        return encode_event(event_of(row))
    record = row["record_json"]
    commit = _Commit(
        row["rev"],
        row["operation"],
        row["collection"],
        row["rkey"],
        msgspec.UNSET if record is None else msgspec.Raw(record),
        row["cid"],
    )
    time_us = _microseconds(row["time"])
    return _encode(
        _Line(row["did"], time_us, "commit", row["source"], row["seq"], row["op_index"], commit)
    )


class _Commit(msgspec.Struct, gc=False, omit_defaults=True):
    rev: str
    operation: Operation
    collection: str
    rkey: str
    record: msgspec.Raw | msgspec.UnsetType
    cid: str | None = None


class _Line(msgspec.Struct, gc=False):
    did: str
    time_us: int
    kind: str
    source: str
    seq: int
    op_index: int
    commit: _Commit


_encode = msgspec.json.Encoder().encode


def _microseconds(time: int | datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND if isinstance(time, datetime) else time
