"""A small lake without a writer: files and records as it makes them, and a reader that watches."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from blueflow.files.layout import HOUR_US
from blueflow.lake.hours import Hour
from blueflow.lake.layout import (
    fresh_key,
    hour_folder,
    hour_log,
    parse_fresh,
    parse_marker,
    place_of,
    record_key,
)
from blueflow.lake.logrecord import HourRecord, LakeFile, Marker, ShardRecord, decode, encode
from blueflow.lake.schema import ORDER, SCHEMAS
from blueflow.testing.lakestore import MemoryObjects

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from blueflow.lake.layout import Shard
    from blueflow.lake.store import Store


class Row(NamedTuple):
    """What tells a row apart, in the order of the rows of a file."""

    time_us: int
    source: str
    seq: int
    op_index: int = 0


def row(hour: int, seq: int, *, at_us: int = 0, op_index: int = 0) -> Row:
    """Return a row of an hour."""
    return Row(hour * HOUR_US + at_us, "relay.test", seq, op_index)


def table_of(dataset: str, rows: Iterable[Row]) -> Any:
    """Return the rows as a table of a dataset, with something in every column that needs it."""
    rows = list(rows)
    known = {
        "time": [one.time_us for one in rows],
        "source": [one.source for one in rows],
        "seq": [one.seq for one in rows],
        "op_index": [one.op_index for one in rows],
    }
    return pa.table(
        [
            pa.array(known.get(one.name, _filling(one, len(rows))), one.type)
            for one in SCHEMAS[dataset]
        ],
        schema=SCHEMAS[dataset],
    )


def parquet_of(dataset: str, rows: Iterable[Row]) -> bytes:
    """Return a file with these rows, sorted."""
    sink = io.BytesIO()
    pq.write_table(table_of(dataset, sorted(rows)), sink, compression="zstd")
    return sink.getvalue()


def rows_of(data: bytes) -> list[Row]:
    """Return the rows of a file, in its order."""
    table = pq.read_table(io.BytesIO(data), columns=list(ORDER))
    times = table.column("time").cast(pa.int64()).to_pylist()
    others = [table.column(name).to_pylist() for name in ORDER[1:]]
    return [Row(*values) for values in zip(times, *others, strict=True)]


@dataclass
class HandWriter:
    """Writes a shard's files and records step by step, as the real writer would."""

    store: Store
    shard: Shard
    number: int = 0
    pending: list[LakeFile] = field(default_factory=list)

    async def record(
        self, rows: Mapping[Hour, Sequence[Row]], *, watermark_us: int, made_s: float
    ) -> None:
        """Stage the files of these rows and write the record; nothing is visible yet."""
        self.number += 1
        files = [await self._stage(hour, rows[hour]) for hour in sorted(rows)]
        await self._put("commit", watermark_us, made_s, files)
        self.pending = files

    async def complete(self) -> None:
        """Make the files of the last record visible."""
        for file in self.pending:
            await self.store.complete(file.staged)
        self.pending = []

    async def publish(
        self, rows: Mapping[Hour, Sequence[Row]], *, watermark_us: int, made_s: float
    ) -> None:
        """Do both."""
        await self.record(rows, watermark_us=watermark_us, made_s=made_s)
        await self.complete()

    async def _stage(self, hour: Hour, rows: Sequence[Row]) -> LakeFile:
        key = fresh_key(self.shard, self.number, *hour)
        staged = await self.store.stage(key, parquet_of(hour.dataset, rows))
        times = [one.time_us for one in rows]
        return LakeFile(*hour, len(rows), min(times), max(times), staged)

    async def _put(
        self, kind: Any, watermark_us: int, made_s: float, files: Sequence[LakeFile]
    ) -> None:
        record = ShardRecord(
            self.number,
            kind,
            "hand",
            made_s,
            "source",
            {},
            watermark_us=watermark_us,
            files=tuple(files),
        )
        if not await self.store.put_new(record_key(self.shard, self.number), encode(record)):
            raise AssertionError("the number was taken")


class WatchedObjects(MemoryObjects):
    """A store with a reader that looks after every single change, and raises when it is misled.

    It holds: in each root no row twice; a marked hour's files are all there and have as many rows
    as the marker says; and whatever was visible once is in the joined view, once, until a record
    of its hour makes it expire.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.looks = 0
        self._rows: dict[bytes, list[Row]] = {}
        self._seen: dict[Hour, set[Row]] = {}
        self._expired: dict[Hour, int] = {}  # the version that made it expire

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, one by one for the reader."""
        await self._change()
        for key in keys:
            self.objects.pop(key, None)
            self.look()
        self.after.step()

    def _put(self, key: str, data: bytes) -> None:
        super()._put(key, data)
        self.look()

    def look(self) -> None:
        """Read everything, as readers do."""
        self.looks += 1
        for root in ("fresh", "raw"):
            counts = Counter(
                (key.split("/")[1], one) for key in self.objects for one in self._rows_at(key, root)
            )
            twice = [one for one, count in counts.items() if count > 1]
            if twice:
                raise AssertionError(f"in {root}/ twice: {twice[:3]}")
        for hour in self.hours():
            self._look_at(hour)

    def hours(self) -> set[Hour]:
        """Return every dataset's hour that has a file in either root."""
        places = map(place_of, self.objects)
        return {Hour(place[1], place[2]) for place in places if place is not None}

    def marker(self, hour: Hour) -> Marker | None:
        """Return the marker that counts."""
        folder = hour_folder("raw", *hour)
        keys = [k for k in self.objects if k.startswith(folder) and parse_marker(k[len(folder) :])]
        return decode(max(keys), Marker, self.objects[max(keys)]) if keys else None

    def joined(self, hour: Hour, *, expired: int = 0) -> list[Row]:
        """Return the rows of an hour as the joined view has them.

        Args:
            hour: whose.
            expired: leave out what this version and those before held.
        """
        marker = self.marker(hour)
        raw, fresh = hour_folder("raw", *hour), hour_folder("fresh", *hour)
        keys: list[str] = []
        gone = {key for one in self.records(hour)[:expired] for key in one.inputs}
        if marker is not None and marker.version > expired:
            keys = [raw + name for name in marker.files]
        if marker is not None:
            gone |= {fresh + name for name in marker.covers}
        keys += [
            key
            for key in self.objects
            if key.startswith(fresh) and parse_fresh(key[len(fresh) :]) and key not in gone
        ]
        return [one for key in keys for one in self._rows_at(key)]

    def records(self, hour: Hour) -> list[HourRecord]:
        """Return the log of an hour."""
        keys = sorted(key for key in self.objects if key.startswith(hour_log(*hour)))
        return [decode(key, HourRecord, self.objects[key]) for key in keys]

    def _look_at(self, hour: Hour) -> None:
        marker = self.marker(hour)
        if marker is not None:
            folder = hour_folder("raw", *hour)
            lacking = [name for name in marker.files if folder + name not in self.objects]
            if lacking:
                raise AssertionError(f"{hour} is marked and lacks {lacking}")
            held = sum(len(self._rows_at(folder + name)) for name in marker.files)
            if held != marker.rows:
                raise AssertionError(f"{hour} has {held} of {marker.rows} rows")
        now = self.joined(hour)
        if len(now) != len(set(now)):
            raise AssertionError(f"the joined view of {hour} has a row twice")
        expired = max((r.version for r in self.records(hour) if r.kind == "expired"), default=0)
        kept = set(self.joined(hour, expired=expired))
        if expired == self._expired.get(hour, 0):
            lost = self._seen.get(hour, set()).difference(kept)
            if lost:
                raise AssertionError(f"{hour} lost {sorted(lost)[:3]}")
        self._seen[hour], self._expired[hour] = kept, expired

    def _rows_at(self, key: str, root: str = "") -> list[Row]:
        if not key.startswith(root) or not key.endswith(".parquet") or place_of(key) is None:
            return []
        data = self.objects[key]
        if data not in self._rows:
            self._rows[data] = rows_of(data)
        return self._rows[data]


def _filling(column: Any, count: int) -> list[Any]:
    if column.nullable:
        return [None] * count
    return ["x" if pa.types.is_string(column.type) else 0] * count
