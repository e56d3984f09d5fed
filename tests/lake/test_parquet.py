"""The lake's files: what the three usual readers make of them, and how they are laid out."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from tests.lake.lakeevents import made_up_events, recorded_events

from blueflow.files.layout import hour_of
from blueflow.lake.parquet import ROW_GROUP_ROWS, ParquetFile, encode
from blueflow.lake.rows import RowBuffer
from blueflow.lake.schema import DATASET_KEY, ORDER, SCHEMAS, VERSION_KEY
from blueflow.records import DATASETS
from blueflow.testing.samples import T0_US, contract_events

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.events import Event


def tables() -> dict[str, pa.Table]:
    """Return the most of each dataset that one hour has."""
    buffer = RowBuffer()
    events: list[Event] = [*made_up_events(), *recorded_events()]
    buffer.add_events(events)
    most = sorted(buffer.take().values(), key=lambda group: group.rows)
    return {group.dataset: group.table() for group in most}


TABLES = tables()


@pytest.mark.parametrize("dataset", DATASETS)
def test_readers_see_the_same_values_and_the_right_types(dataset: str, tmp_path: Path) -> None:
    table = TABLES[dataset]
    path = tmp_path / "1.parquet"
    path.write_bytes(encode(table))
    assert pq.read_table(path).equals(table)
    assert ds.dataset(path).to_table().equals(table)

    frame = pl.read_parquet(path)
    assert frame.to_arrow().cast(table.schema).equals(table)
    assert frame.schema["time"] == pl.Datetime("us", "UTC")

    with duckdb.connect() as connection:
        connection.execute("set timezone = 'UTC'")
        relation = connection.read_parquet(str(path))
        types = dict(zip(relation.columns, map(str, relation.types), strict=True))
        assert relation.to_arrow_table().cast(table.schema).equals(table)
    assert types["time"] == "TIMESTAMP WITH TIME ZONE"
    assert types["seq"] == "BIGINT"
    assert types["op_index"] == "INTEGER"
    if dataset == "posts":
        assert types["langs"] == types["hashtags"] == "VARCHAR[]"
        assert types["created_at"] == "TIMESTAMP WITH TIME ZONE"
    if dataset == "accounts":
        assert types["active"] == "BOOLEAN"
        assert types["blocks"] == "BLOB"


@pytest.mark.parametrize("dataset", DATASETS)
def test_equal_tables_give_equal_bytes(dataset: str) -> None:
    table = TABLES[dataset]
    content = encode(table)
    chunks = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert encode(chunks) == content == encode(pq.read_table(BytesIO(content)))


def test_a_file_says_what_it_is() -> None:
    file = pq.ParquetFile(BytesIO(encode(TABLES["likes"])))
    metadata = file.metadata
    assert metadata.metadata[DATASET_KEY] == b"likes"
    assert metadata.metadata[VERSION_KEY] == b"1"
    group = metadata.row_group(0)
    names = [group.column(one.column_index).path_in_schema for one in group.sorting_columns]
    assert tuple(names) == ORDER
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["time"].statistics.has_min_max
    assert "RLE_DICTIONARY" in columns["did"].encodings
    assert "DELTA_BINARY_PACKED" in columns["seq"].encodings
    assert columns["time"].has_column_index


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_empty_file(dataset: str, tmp_path: Path) -> None:
    empty = SCHEMAS[dataset].empty_table()
    assert pq.read_table(BytesIO(encode(empty))).equals(empty)
    with ParquetFile(tmp_path / "1.parquet", SCHEMAS[dataset]):
        pass
    assert pq.read_table(tmp_path / "1.parquet").equals(empty)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_file_written_table_by_table(dataset: str, tmp_path: Path) -> None:
    table = TABLES[dataset]
    path = tmp_path / "1.parquet"
    with ParquetFile(path, table.schema) as file:
        for start in range(0, table.num_rows, 3):
            file.write(table.slice(start, 3))
        assert file.rows == table.num_rows
    assert file.close() == file.size == path.stat().st_size
    read = pq.ParquetFile(path)
    assert read.read().equals(table)
    assert read.metadata.num_row_groups == 1
    assert read.metadata.metadata[DATASET_KEY] == dataset.encode()
    with duckdb.connect() as connection:
        (did,) = table["did"].unique().to_pylist()[:1]
        found = connection.read_parquet(str(path)).filter(
            duckdb.ColumnExpression("did") == duckdb.ConstantExpression(did)
        )
        assert len(found.fetchall()) == table["did"].to_pylist().count(did)


def test_row_groups_are_full_whatever_the_tables(tmp_path: Path) -> None:
    buffer = RowBuffer()
    buffer.add_events(contract_events("s", 4_000))
    table = buffer.groups["posts", hour_of(T0_US)].table()
    whole = pa.concat_tables([table] * (2 * ROW_GROUP_ROWS // table.num_rows + 2))
    path = tmp_path / "1.parquet"
    sizes: list[int] = []
    with ParquetFile(path, table.schema) as file:
        for start in range(0, whole.num_rows, 50_000):
            file.write(whole.slice(start, 50_000))
            sizes.append(file.size)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] < file.size
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [ROW_GROUP_ROWS] * 2 + [whole.num_rows - 2 * ROW_GROUP_ROWS]
    assert pq.read_table(path).equals(whole)


def test_the_disk_is_full(tmp_path: Path) -> None:
    """The error gets out, and closing again changes nothing."""

    def write() -> Any:
        with ParquetFile(tmp_path.joinpath("/dev/full"), SCHEMAS["posts"]) as file:
            file.write(TABLES["posts"])

    with pytest.raises(OSError, match="No space"):
        write()
