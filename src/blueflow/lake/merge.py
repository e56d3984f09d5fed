"""Many sorted Parquet files into few, with bounded memory. Blocks: call it in a thread, by steps.

The row groups of all inputs are read in the order of their oldest row. What is older than the
oldest row of every group not yet read can be sorted and written. So memory holds the groups that
overlap at one time, not the hour. Where too many do, they are sorted, written to disk and read
again in smaller groups. An input that is not sorted costs time, never order.
"""

from __future__ import annotations

from contextlib import contextmanager
from heapq import heappop, heappush
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blueflow.errors import CompactionError
from blueflow.files.disk import output_error
from blueflow.lake.parquet import ROW_GROUP_ROWS, ParquetFile
from blueflow.lake.schema import ORDER, SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from pathlib import Path

_ROWS_STEP: Final = ROW_GROUP_ROWS // 2  # sorted at once
_ROWS_HELD: Final = 2 * ROW_GROUP_ROWS  # without any that can be written
_ROWS_SPILT: Final = 4096
_BEFORE_ALL: Final = -(2**63)
_SORT: Final = [(name, "ascending") for name in ORDER]


class Part(NamedTuple):
    """A file that was written.

    Attributes:
        path: where it is.
        rows: in it.
        size: bytes.
        time_min_us: the oldest event time, microseconds since 1970.
        time_max_us: the newest one.
    """

    path: Path
    rows: int
    size: int
    time_min_us: int
    time_max_us: int


class Merge:
    """Merges files of one dataset into parts; `step` until it returns False.

    A step reads and writes less than a row group, so that whoever drives it can stop soon.

    Args:
        hour: what is merged, for errors.
        dataset: whose columns the parts have; what the inputs have beyond them is kept.
        paths: the inputs.
        folder: an empty one, for the parts.
        bytes_max: of a part, roughly; what is more is divided into parts of like size.
        cuts: the rows of each part, where they are known already; else by size.

    Raises:
        CompactionError: an input is no Parquet of this dataset.
        OutputIOError: the disk failed or is full.
    """

    def __init__(
        self,
        hour: str,
        dataset: str,
        paths: Sequence[Path],
        folder: Path,
        *,
        bytes_max: int,
        cuts: Sequence[int] | None = None,
    ) -> None:
        self._hour = hour
        # A task that is cancelled does not wait for its thread; to close has to.
        self._at_work, self._closed = Lock(), False
        with self._errors(folder):
            self._units, self.schema = _units(paths, SCHEMAS[dataset])
            self.rows = sum(unit.rows for unit in self._units)
            self._parts = _Parts(folder, self.schema, self.rows, bytes_max, cuts)
        self._folder = folder
        self._tables = _merged(self._units, self.schema, folder)

    def step(self) -> bool:
        """Merge some rows more; False: that was all."""
        with self._at_work, self._errors(self._folder):
            table = None if self._closed else next(self._tables, None)
            if table is not None:
                self._parts.write(table)
        return table is not None

    def finish(self) -> list[Part]:
        """Return what was written, once it is proven that it is all that was read."""
        with self._errors(self._folder):
            parts = self._parts.finish()
            written = sum(pq.read_metadata(part.path).num_rows for part in parts)
        if not written == sum(part.rows for part in parts) == self.rows:
            raise CompactionError(self._hour, f"{self.rows} rows read, but {written} written")
        return parts

    def close(self) -> None:
        """Let go of the files, whatever was done."""
        with self._at_work:
            self._closed = True
            self._tables.close()
            self._parts.close()
        pa.default_memory_pool().release_unused()

    @contextmanager
    def _errors(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # pyarrow raises it for damaged content too, then without errno
            if error.errno is not None:
                raise output_error(folder, error) from error
            raise CompactionError(self._hour, str(error)) from error
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise CompactionError(self._hour, str(error)) from error


class _Unit(NamedTuple):
    """A row group; `start` is at or before its oldest row, `spilled` if we wrote it, sorted."""

    start: int
    path: Path
    group: int
    rows: int
    spilled: bool = False


def _units(paths: Iterable[Path], schema: Any) -> tuple[list[_Unit], Any]:
    """Return the row groups by their start, and the schema with the columns of all inputs."""
    units: list[_Unit] = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            for field in file.schema_arrow:  # a newer version's columns are not ours to drop
                if schema.get_field_index(field.name) < 0:
                    schema = schema.append(field)
            metadata = file.metadata
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group)
                units.append(_Unit(_start(found), path, group, found.num_rows))
    return sorted(units), schema


def _start(group: Any) -> int:
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == "time":
            statistics = column.statistics
            if statistics is not None and statistics.has_min_max:
                return int(statistics.min_raw)
    return _BEFORE_ALL


def _merged(units: Sequence[_Unit], schema: Any, folder: Path) -> Generator[Any, None, None]:
    """Yield small sorted tables, each behind the one before."""
    left = sorted(units)  # sorted is a heap
    held: list[Any] = []
    rows, try_at = 0, _ROWS_STEP
    unread, spills = False, 0  # whether rows are held that were not spilled before
    while left:
        unit = heappop(left)
        unread |= not unit.spilled
        held.append(_read(unit, schema))
        rows += unit.rows
        if rows < try_at and left:
            continue
        table = pa.concat_tables(held).combine_chunks()
        held.clear()  # each copy counts: it is the whole memory
        ready = pc.sum(pc.less(_times(table), left[0].start)).as_py() or 0 if left else rows
        if 2 * ready < _ROWS_STEP and left:  # sorting costs more than it would free
            if rows >= _ROWS_HELD and unread:  # so each time less is left to read
                spills += 1
                path = folder / f"spill-{spills}"
                for one in _spilled(table.take(_order(table)), path):
                    heappush(left, one)
                rows, try_at, unread = 0, _ROWS_STEP, False
            else:
                held.append(table)
                try_at = rows + _ROWS_STEP
            continue
        order = _order(table)
        for begin in range(0, ready, _ROWS_STEP):
            yield table.take(order[begin : min(begin + _ROWS_STEP, ready)])
        if left:
            held.append(table.take(order[ready:]))
            unread &= ready < rows
        rows -= ready
        try_at = rows + _ROWS_STEP
        del table, order


def _spilled(table: Any, path: Path) -> list[_Unit]:
    """Write a sorted table in small row groups, each of a short time; return these.

    So files that all reach over the whole hour do not have to be in memory together.
    """
    pq.write_table(table, path, compression="zstd", compression_level=1, row_group_size=_ROWS_SPILT)
    units, _ = _units([path], table.schema)
    return [unit._replace(spilled=True) for unit in units]


def _read(unit: _Unit, schema: Any) -> Any:
    # One thread: the writer of the same process needs the other cores more.
    with pq.ParquetFile(unit.path, page_checksum_verification=True) as file:
        table = file.read_row_group(unit.group, use_threads=False)
    if table.num_rows != unit.rows:
        raise ValueError(f"{unit.path.name} has fewer rows than it says")
    columns = []
    for field in schema:
        if table.schema.get_field_index(field.name) >= 0:
            columns.append(table.column(field.name).cast(field.type))
        elif field.nullable:
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            raise ValueError(f"{unit.path.name} has no column {field.name}")
    return pa.table(columns, schema=schema)


def _order(table: Any) -> Any:
    return pc.sort_indices(table.select(ORDER), sort_keys=_SORT)


def _times(table: Any) -> Any:
    return table.column("time").cast(pa.int64())


class _Parts:
    """Writes tables into files of like size."""

    def __init__(
        self, folder: Path, schema: Any, rows: int, bytes_max: int, cuts: Sequence[int] | None
    ) -> None:
        self._folder, self._schema = folder, schema
        self._rows_left, self._bytes_max, self._cuts = rows, bytes_max, cuts
        self._done: list[Part] = []
        self._bytes_done = self._rows_done = 0
        self._file: ParquetFile | None = None
        self._path = folder
        self._times: list[int] = []

    def write(self, table: Any) -> None:
        while table.num_rows:
            if self._file is None:
                self._path = self._folder / f"part-{len(self._done) + 1}.parquet"
                self._file, self._times = ParquetFile(self._path, self._schema), []
            count = table.num_rows
            if self._cuts is not None and len(self._done) < len(self._cuts):
                count = min(count, self._cuts[len(self._done)] - self._file.rows)
            self._append(self._file, table.slice(0, count))
            table = table.slice(count)
            if self._is_full(self._file):
                self._end(self._file)

    def finish(self) -> list[Part]:
        if self._file is not None:
            self._end(self._file)
        return self._done

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, file: ParquetFile, table: Any) -> None:
        file.write(table)
        self._rows_left -= table.num_rows
        times = pc.min_max(_times(table)).as_py()
        self._times += [times["min"], times["max"]]

    def _is_full(self, file: ParquetFile) -> bool:
        """Tell whether this part has its share of what it and the rest will take."""
        if self._cuts is not None:
            return len(self._done) < len(self._cuts) and file.rows == self._cuts[len(self._done)]
        per_row = (self._bytes_done + file.size) / (self._rows_done + file.rows)
        expected = file.size + self._rows_left * per_row
        shares = -(-expected // self._bytes_max)
        return bool(shares > 1 and file.size >= expected / shares)

    def _end(self, file: ParquetFile) -> None:
        size = file.close()
        self._file = None
        self._done.append(Part(self._path, file.rows, size, min(self._times), max(self._times)))
        self._bytes_done += size
        self._rows_done += file.rows
