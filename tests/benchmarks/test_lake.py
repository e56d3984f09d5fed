from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
import pytest

pytest.importorskip("duckdb")
pytest.importorskip("polars")

import pyarrow.parquet as pq

import lake

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 1_500


@pytest.fixture(scope="module")
def lines() -> dict[str, list[bytes]]:
    return lake.make_lines(ROWS)


def test_lines_are_by_topic_and_repeatable(lines: dict[str, list[bytes]]) -> None:
    assert lines == lake.make_lines(ROWS)
    assert sum(map(len, lines.values())) == ROWS
    assert len(lines["likes"]) > len(lines["posts"]) > len(lines["follows"]) > 0


def test_lines_that_are_made_of_others_have_other_names(lines: dict[str, list[bytes]]) -> None:
    line = lines["likes"][0]
    other = lake._renamed(line, 3)
    names = [set(re.findall(rb"did:plc:[a-z2-7]{24}|bafyrei\w+", one)) for one in (line, other)]
    assert len(names[0]) == len(names[1]) > 2
    assert not names[0] & names[1]
    old, new = msgspec.json.decode(line), msgspec.json.decode(other)
    assert new["seq"] == old["seq"] + 3_000_000
    assert new["commit"]["collection"] == old["commit"]["collection"]
    assert len(line) == pytest.approx(len(other), abs=2)


def test_all_sides_write_the_same_rows_and_are_measured(
    lines: dict[str, list[bytes]], tmp_path: Path
) -> None:
    lake.check_agreement(lines, tmp_path)
    cases = lake.measure_writing(lake.Topics(lines, tmp_path), tmp_path, rounds=1)
    assert [case["case"] for case in cases if "json" in case["case"]] == [
        "json_to_parquet_vs_pyarrow",
        "json_to_parquet_vs_polars",
        "json_to_parquet_vs_duckdb",
    ]
    assert all(case["ratio"] > 0 for case in cases)


def test_a_side_that_is_wrong_scores_nothing(
    lines: dict[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(topics: lake.Topics, folder: Path) -> None:
        lake.by_pyarrow(topics, folder)
        path = folder / "likes.parquet"
        table = pq.read_table(path)
        pq.write_table(table.set_column(3, "did", table["rkey"]), path)

    monkeypatch.setattr(lake, "ours", forgetful)
    with pytest.raises(AssertionError, match="did"):
        lake.check_agreement(lines, tmp_path)


def test_one_file_and_many_give_the_same_answers(
    lines: dict[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lake, "SMALL_FILES", 20)
    case = lake.measure_reading(lines["posts"], tmp_path, rounds=1)
    assert case["case"] == "compacted_vs_small_files"
    assert case["ratio"] > 0
