"""The page of the lake's columns is what the code makes, and files of two ages read as one."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from blueflow.lake.schema import COLUMNS, DATASET_KEY, ORDER, SCHEMAS, VERSION_KEY, main, render
from blueflow.records import DATASETS

PAGE = Path(__file__).parents[2] / "docs" / "lake-schema.md"
TIME = datetime(2026, 7, 4, 16, tzinfo=UTC)


def test_the_page_is_what_the_code_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = "python -m blueflow.lake.schema > docs/lake-schema.md"
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out == render(), told


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["posts"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_has_the_columns_that_it_is_sorted_by(dataset: str) -> None:
    schema = SCHEMAS[dataset]
    assert [column.name for column in COLUMNS[dataset]] == schema.names
    assert len(set(schema.names)) == len(schema.names)
    assert set(ORDER) <= set(schema.names)
    assert schema.metadata[DATASET_KEY] == dataset.encode()
    assert schema.metadata[VERSION_KEY] == b"1"
    assert not {"year", "month", "day", "hour"} & set(schema.names), "they come from the path"


# The columns of version 1. A version may add nullable ones; what stands here stays.
FIRST = {
    "posts": "source seq op_index did time rev operation collection rkey cid created_at "
    "created_at_text text langs reply_parent reply_root hashtags links mentions embed_type "
    "quote_uri record_json",
    "likes": "source seq op_index did time rev operation collection rkey cid created_at "
    "created_at_text subject_uri subject_cid subject_did via_uri record_json",
    "reposts": "source seq op_index did time rev operation collection rkey cid created_at "
    "created_at_text subject_uri subject_cid subject_did via_uri record_json",
    "follows": "source seq op_index did time rev operation collection rkey cid created_at "
    "created_at_text subject record_json",
    "other": "source seq op_index did time rev operation collection rkey cid created_at "
    "created_at_text record_json",
    "accounts": "source seq op_index did time kind time_text handle active status rev blocks",
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_column_is_ever_taken_away_and_new_ones_may_be_null(dataset: str) -> None:
    first = FIRST[dataset].split()
    assert set(first) <= set(SCHEMAS[dataset].names)
    for column in COLUMNS[dataset]:
        assert column.name in first or column.nullable, column.name


@pytest.mark.parametrize("dataset", DATASETS)
def test_files_of_an_older_and_a_newer_schema_read_together(dataset: str, tmp_path: Path) -> None:
    newer = SCHEMAS[dataset]
    last = newer.names[-1]
    older = newer.remove(newer.get_field_index(last))
    row = {
        field.name: _value(field.type)
        for field in newer
        if not field.nullable or field.name == last
    }
    pq.write_table(pa.Table.from_pylist([row], schema=older), tmp_path / "1.parquet")
    pq.write_table(pa.Table.from_pylist([row], schema=newer), tmp_path / "2.parquet")
    glob = str(tmp_path / "*.parquet")
    expected = [None, row[last]]

    table = ds.dataset(tmp_path, schema=newer).to_table()
    assert sorted(table[last].to_pylist(), key=str) == sorted(expected, key=str)

    with duckdb.connect() as connection:
        found = connection.read_parquet(glob, union_by_name=True, filename=True)
        assert [value for (value,) in found.order("filename").project(last).fetchall()] == expected

    frame = pl.scan_parquet(
        [tmp_path / name for name in ("2.parquet", "1.parquet")], missing_columns="insert"
    )
    assert frame.collect()[last].to_list() == expected[::-1]


def _value(kind: pa.DataType) -> object:
    if pa.types.is_timestamp(kind):
        return TIME
    if pa.types.is_integer(kind):
        return 7
    return b"car" if pa.types.is_binary(kind) else "text"
