"""Lakes that are written by hand, as small as a test needs, and a folder to read them from."""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from blueflow.lake.layout import (
    DESCRIPTION,
    FRESH,
    RAW,
    Shard,
    fresh_key,
    hour_folder,
    hour_key,
    hour_name,
    marker_key,
    parse_hour,
    raw_key,
    record_key,
)
from blueflow.lake.logrecord import (
    Description,
    HourRecord,
    Input,
    LakeFile,
    Marker,
    ShardRecord,
    Staged,
    encode,
)
from blueflow.lake.schema import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

SHARD = Shard("test")
HOUR_US = 3_600_000_000
MINUTE_US = 60_000_000
H16 = parse_hour("2026-07-04T16") or 0
NOW_S = (H16 + 30) * 3600.0


class WrittenLake:
    """Writes the objects of a lake one by one, through `put`, and remembers its logs.

    Args:
        folder: where it is; the tests also reach into it to break things.
    """

    def __init__(self, folder: Path, *, simulated: bool = False) -> None:
        self.folder = folder
        self.number = self.rows = self.bytes = 0
        self.published: list[LakeFile] = []
        self.versions: dict[tuple[str, int], list[HourRecord]] = {}
        self.put(DESCRIPTION, encode(Description(simulated, 0)))
        self.record("claim")

    def put(self, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def publish(
        self, dataset: str, rows: Sequence[Mapping[str, Any]], *, schema: Any = None
    ) -> list[str]:
        """Write one record with a file for each hour of `rows`; return their keys."""
        by_hour: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            by_hour.setdefault(row["time"] // HOUR_US, []).append(row)
        files = [
            self.file(fresh_key(SHARD, self.number + 1, dataset, hour), dataset, hour, some, schema)
            for hour, some in sorted(by_hour.items())
        ]
        self.record("commit", files)
        self.published += files
        return [file.key for file in files]

    def record(self, kind: Any, files: Iterable[LakeFile] = ()) -> None:
        files = tuple(files)
        self.number += 1
        self.rows += sum(file.rows for file in files)
        self.bytes += sum(file.staged.size for file in files)
        self.put(
            record_key(SHARD, self.number),
            encode(
                ShardRecord(
                    self.number,
                    kind,
                    "test-instance",
                    NOW_S,
                    "source",
                    {"relay": Input(self.number)},
                    files=files,
                    rows=self.rows,
                    bytes=self.bytes,
                )
            ),
        )

    def compact(self, dataset: str, hour: int, *, merge: bool = True) -> None:
        """Write the next version of an hour; the files of `fresh/` stay."""
        before = self.versions.setdefault((dataset, hour), [])
        done = {key for record in before for key in record.inputs}
        inputs = [
            file
            for file in self.published
            if (file.dataset, file.hour) == (dataset, hour) and file.key not in done
        ]
        version = len(before) + 1
        outputs = []
        if inputs and merge:
            tables = [pq.read_table(self.folder / file.key, partitioning=None) for file in inputs]
            table = pa.concat_tables(tables, promote_options="default")
            rows = [row | {"time": _us(row["time"])} for row in table.to_pylist()]
            outputs = [self.file(raw_key(dataset, hour, version, 1), dataset, hour, rows, None)]
        record = HourRecord(
            version,
            "compacted",
            "test-keeper",
            NOW_S,
            tuple(file.key for file in inputs),
            tuple(outputs),
            {str(SHARD): self.number},
            rows=sum(file.rows for one in (*before,) for file in one.outputs)
            + sum(file.rows for file in outputs),
            bytes=sum(file.staged.size for one in before for file in one.outputs)
            + sum(file.staged.size for file in outputs),
        )
        before.append(record)
        self.put(hour_key(dataset, hour, version), encode(record))
        self.mark(dataset, hour)

    def mark(self, dataset: str, hour: int) -> None:
        records = self.versions[dataset, hour]
        last = records[-1]
        marker = Marker(
            dataset,
            hour_name(hour),
            last.version,
            NOW_S,
            last.rows,
            last.bytes,
            tuple(_name(file.key) for record in records for file in record.outputs),
            tuple(_name(key) for record in records for key in record.inputs),
        )
        self.put(marker_key(dataset, hour, last.version), encode(marker))

    def sweep(self, dataset: str, hour: int) -> None:
        """Remove what the keeper removes 26 h after the marker."""
        for record in self.versions[dataset, hour]:
            for key in record.inputs:
                (self.folder / key).unlink(missing_ok=True)

    def expire(self, dataset: str, hour: int) -> None:
        before = self.versions.setdefault((dataset, hour), [])
        done = {key for one in before for key in one.inputs}
        here = [one.key for one in self.published if (one.dataset, one.hour) == (dataset, hour)]
        new = tuple(key for key in here if key not in done)
        record = HourRecord(len(before) + 1, "expired", "test-keeper", NOW_S, new)
        self.put(hour_key(dataset, hour, record.version), encode(record))
        for root in (RAW, FRESH):
            for path in (self.folder / hour_folder(root, dataset, hour)).glob("*"):
                path.unlink()

    def file(
        self, key: str, dataset: str, hour: int, rows: Sequence[Mapping[str, Any]], schema: Any
    ) -> LakeFile:
        data = parquet(dataset, rows, schema)
        self.put(key, data)
        times = [row["time"] for row in rows]
        staged = Staged(key, "upload", ("1",), len(data), sha256(data).hexdigest())
        return LakeFile(dataset, hour, len(rows), min(times), max(times), staged)


def post(
    time_us: int,
    seq: int,
    *,
    did: str = "did:plc:a",
    rkey: str = "1",
    operation: str = "create",
    **more: Any,
) -> dict[str, Any]:
    """Return the row of an operation on a post; its rev is its seq."""
    deleted = operation == "delete"
    row = {
        "source": "relay",
        "seq": seq,
        "op_index": 0,
        "did": did,
        "time": time_us,
        "rev": f"{seq:013d}",
        "operation": operation,
        "collection": "app.bsky.feed.post",
        "rkey": rkey,
        "cid": None if deleted else "cid",
        "text": None if deleted else f"post {seq}",
        "langs": None if deleted else ["en"],
        "record_json": None if deleted else "{}",
    }
    return row | more


def account(
    time_us: int, seq: int, *, active: bool, status: str | None = None, did: str = "did:plc:a"
) -> dict[str, Any]:
    """Return the row of an account event."""
    return {
        "source": "relay",
        "seq": seq,
        "op_index": 0,
        "did": did,
        "time": time_us,
        "kind": "account",
        "time_text": "then",
        "active": active,
        "status": status,
    }


def parquet(dataset: str, rows: Sequence[Mapping[str, Any]], schema: Any = None) -> bytes:
    schema = schema or SCHEMAS[dataset]
    columns = {
        field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in schema
    }
    content = BytesIO()
    pq.write_table(pa.table(columns, schema), content, compression="zstd")
    return content.getvalue()


def at(hour: int, minute: float = 0) -> int:
    """Return a time in an hour after 16 h of the day, in microseconds."""
    return (H16 + hour) * HOUR_US + int(minute * MINUTE_US)


def _us(value: Any) -> int:
    return int(pa.scalar(value, pa.timestamp("us", "UTC")).value)


def _name(key: str) -> str:
    return key.rpartition("/")[2]
