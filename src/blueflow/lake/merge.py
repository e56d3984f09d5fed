"""Many sorted Parquet files into few, with bounded memory. Blocks: call it in a thread, by steps.

The row groups of all inputs are read in the order of their oldest row. What is older than the
oldest row of every group not yet read can be sorted and written. So memory holds the groups that
overlap at one time, not the hour, and an input that is not sorted costs memory, never order.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blueflow.errors import CompactionError
from blueflow.files.disk import output_error
from blueflow.lake.schema import ORDER, SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from pathlib import Path

ROWS_MAX: Final = 122_880  # of a row group; DuckDB's own unit of parallel work
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

    A step reads and writes about one row group, so that whoever drives it can stop soon.

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
        with self._errors(folder):
            self._units, self.schema = _units(paths, SCHEMAS[dataset])
            self.rows = sum(unit.rows for unit in self._units)
            self._parts = _Parts(folder, self.schema, self.rows, bytes_max, cuts)
        self._folder = folder
        self._tables = _regrouped(_merged(self._units, self.schema))

    def step(self) -> bool:
        """Merge about one row group more; False: that was all."""
        with self._errors(self._folder):
            table = next(self._tables, None)
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
    """A row group of an input; `start` is at or before its oldest row."""

    start: int
    path: Path
    group: int
    rows: int


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


def _merged(units: Sequence[_Unit], schema: Any) -> Iterator[Any]:
    """Yield sorted tables, each behind the one before."""
    held: list[Any] = []
    rows, try_at = 0, ROWS_MAX
    for unit, after in zip(units, [*units[1:], None], strict=True):
        held.append(_read(unit, schema))
        rows += unit.rows
        if after is None:
            yield from _sorted(pa.concat_tables(held))
        elif rows >= try_at:
            table = pa.concat_tables(held)
            old = pc.less(_times(table), after.start)
            held = [table]
            if 2 * (pc.sum(old).as_py() or 0) >= ROWS_MAX:  # else dividing costs more than it frees
                held = [table.filter(pc.invert(old))]
                yield from _sorted(table.filter(old))
            rows = held[0].num_rows
            try_at = rows + ROWS_MAX


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


def _sorted(table: Any) -> Iterator[Any]:
    """Yield a table's rows in order, in tables of about a row group: sorting makes copies."""
    ends: list[int] = []
    if table.num_rows > 2 * ROWS_MAX:
        times = _times(table)
        ends = pc.unique(times.take(pc.sort_indices(times))[ROWS_MAX::ROWS_MAX]).to_pylist()
    for end in ends:
        before = pc.less(_times(table), end)
        yield from _in_order(table.filter(before))
        table = table.filter(pc.invert(before))
    yield from _in_order(table)


def _in_order(table: Any) -> Iterator[Any]:
    if table.num_rows:
        table = table.combine_chunks()
        yield table.take(pc.sort_indices(table.select(ORDER), sort_keys=_SORT))


def _times(table: Any) -> Any:
    return table.column("time").cast(pa.int64())


def _regrouped(tables: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the same rows in tables of a row group each; the last one may be smaller."""
    held: list[Any] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        if rows >= ROWS_MAX:
            whole = pa.concat_tables(held)
            ends = range(ROWS_MAX, rows + 1, ROWS_MAX)
            yield from (whole.slice(end - ROWS_MAX, ROWS_MAX) for end in ends)
            held, rows = [whole.slice(ends[-1])], rows - ends[-1]
    if rows:
        yield pa.concat_tables(held)


class _Parts:
    """Writes tables into files of like size."""

    def __init__(
        self, folder: Path, schema: Any, rows: int, bytes_max: int, cuts: Sequence[int] | None
    ) -> None:
        self._folder, self._schema = folder, schema
        self._rows_left, self._bytes_max, self._cuts = rows, bytes_max, cuts
        self._done: list[Part] = []
        self._bytes_done = self._rows_done = 0
        self._writer: Any = None
        self._sink: Any = None
        self._rows = 0
        self._times: list[int] = []

    def write(self, table: Any) -> None:
        while table.num_rows:
            if self._writer is None:
                self._begin()
            count = table.num_rows
            if self._cuts is not None and len(self._done) < len(self._cuts):
                count = min(count, self._cuts[len(self._done)] - self._rows)
            self._append(table.slice(0, count))
            table = table.slice(count)
            if self._is_full():
                self._end()

    def finish(self) -> list[Part]:
        if self._writer is not None:
            self._end()
        return self._done

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None

    def _begin(self) -> None:
        self._path = self._folder / f"part-{len(self._done) + 1}.parquet"
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            sorting_columns=pq.SortingColumn.from_ordering(self._schema, _SORT),
            write_page_checksum=True,
        )
        self._rows, self._times = 0, []

    def _append(self, table: Any) -> None:
        self._writer.write_table(table, row_group_size=ROWS_MAX)
        self._rows += table.num_rows
        self._rows_left -= table.num_rows
        times = pc.min_max(_times(table)).as_py()
        self._times += [times["min"], times["max"]]

    def _is_full(self) -> bool:
        """Tell whether this part has its share of what it and the rest will take."""
        if self._cuts is not None:
            return len(self._done) < len(self._cuts) and self._rows == self._cuts[len(self._done)]
        size = self._sink.tell()
        per_row = (self._bytes_done + size) / (self._rows_done + self._rows)
        expected = size + self._rows_left * per_row
        shares = -(-expected // self._bytes_max)
        return bool(shares > 1 and size >= expected / shares)

    def _end(self) -> None:
        self.close()
        size = self._path.stat().st_size
        part = Part(self._path, self._rows, size, min(self._times), max(self._times))
        self._done.append(part)
        self._bytes_done += size
        self._rows_done += part.rows
