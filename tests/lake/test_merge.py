from __future__ import annotations

import io
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blueflow.errors import CompactionError, OutputIOError
from blueflow.lake import merge, parquet
from blueflow.lake.merge import Merge, Part
from blueflow.lake.schema import SCHEMAS
from blueflow.testing.lakefiles import Row, parquet_of, row, rows_of, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HOUR = 500


def stored(folder: Path, files: Iterable[bytes]) -> list[Path]:
    paths = []
    for number, data in enumerate(files):
        paths.append(folder / f"in-{number}.parquet")
        paths[-1].write_bytes(data)
    return paths


def merged(
    folder: Path,
    files: Iterable[bytes],
    *,
    bytes_max: int = 2**28,
    cuts: Sequence[int] | None = None,
) -> list[Part]:
    work = Merge("posts/x", "posts", stored(folder, files), folder, bytes_max=bytes_max, cuts=cuts)
    try:
        while work.step():
            pass
        return work.finish()
    finally:
        work.close()


def small(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Make row groups small, and all that is measured by them."""
    patch.setattr(merge, "_ROWS_STEP", max(1, rows // 2))
    patch.setattr(parquet, "ROW_GROUP_ROWS", rows)
    patch.setattr(merge, "_ROWS_HELD", 2 * rows)
    patch.setattr(merge, "_ROWS_SPILT", max(1, rows // 4))


def rows_in(parts: Iterable[Part]) -> list[Row]:
    return [one for part in parts for one in rows_of(part.path.read_bytes())]


@st.composite
def inputs(draw: st.DrawFn) -> list[list[Row]]:
    places = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 1))
    unique = draw(st.lists(places, unique=True, max_size=60))
    count = draw(st.integers(1, 5))
    files: list[list[Row]] = [[] for _ in range(count)]
    for at_us, seq, op_index in unique:
        files[draw(st.integers(0, count - 1))].append(
            row(HOUR, seq, at_us=at_us, op_index=op_index)
        )
    return files


@settings(deadline=None, max_examples=30)
@given(inputs(), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_the_parts_have_every_row_in_order(
    files: list[list[Row]],
    rows_max: int,
    group: int,
    in_order: bool,  # noqa: FBT001
) -> None:
    data = []
    for rows in files:
        sink = io.BytesIO()
        given_rows = sorted(rows) if in_order else rows
        pq.write_table(table_of("posts", given_rows), sink, row_group_size=group)
        data.append(sink.getvalue())
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        small(patch, rows_max)
        parts = merged(Path(folder), data, bytes_max=9000)
        check(parts, files, rows_max)


def check(parts: Sequence[Part], files: list[list[Row]], rows_max: int) -> None:
    rows = sorted(one for rows in files for one in rows)
    assert rows_in(parts) == rows
    assert sum(part.rows for part in parts) == len(rows)
    for part in parts:
        found = pq.read_metadata(part.path)
        sizes = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
        assert max(sizes) <= rows_max
        times = [one.time_us for one in rows_of(part.path.read_bytes())]
        assert (part.time_min_us, part.time_max_us) == (times[0], times[-1])
        assert part.size == part.path.stat().st_size


def test_files_that_all_reach_over_the_hour_are_not_in_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 40)
    held: list[int] = []
    real = merge._times

    def counted(table: Any) -> Any:
        held.append(table.num_rows)
        return real(table)

    monkeypatch.setattr(merge, "_times", counted)
    rows = [row(HOUR, seq, at_us=random.Random(seq).randrange(10**9)) for seq in range(1000)]
    (part,) = merged(tmp_path, [parquet_of("posts", rows[n::50]) for n in range(50)])
    assert rows_in([part]) == sorted(rows)
    assert len(list(tmp_path.glob("spill-*"))) > 5
    assert max(held) < 500


def test_many_rows_of_one_moment_are_sorted_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 8)
    rows = [row(HOUR, seq) for seq in range(400)]
    (part,) = merged(tmp_path, [parquet_of("posts", rows[n::20]) for n in range(20)])
    assert rows_in([part]) == rows


def test_no_rows_make_no_part(tmp_path: Path) -> None:
    assert merged(tmp_path, [parquet_of("posts", [])]) == []


def test_parts_are_of_like_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 2000)  # in smaller groups the footer outweighs the rows
    rows = [row(HOUR, seq, at_us=random.Random(seq).randrange(10**9)) for seq in range(60_000)]
    whole = merged(tmp_path, [parquet_of("posts", rows)])[0].size
    parts = merged(tmp_path, [parquet_of("posts", rows)], bytes_max=whole // 3)
    assert len(parts) > 2, [part.size for part in parts]
    assert max(part.size for part in parts) < 2 * min(part.size for part in parts)
    assert rows_in(parts) == sorted(rows)


def test_cuts_say_where_the_parts_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 10)
    rows = [row(HOUR, seq, at_us=seq) for seq in range(50)]
    files = [parquet_of("posts", rows[::2]), parquet_of("posts", rows[1::2])]
    parts = merged(tmp_path, files, cuts=[25, 10, 15])
    assert [part.rows for part in parts] == [25, 10, 15]
    assert rows_in(parts) == rows


def test_older_and_newer_columns_come_together(tmp_path: Path) -> None:
    older = table_of("posts", [row(HOUR, 1)]).drop_columns(["langs", "text"])
    newer = table_of("posts", [row(HOUR, 2)]).append_column("mood", pa.array(["fine"]))
    sinks = [io.BytesIO(), io.BytesIO()]
    for table, sink in zip((older, newer), sinks, strict=True):
        pq.write_table(table, sink)
    (part,) = merged(tmp_path, [sink.getvalue() for sink in sinks])
    found = pq.read_table(part.path)
    assert found.schema.names == [*SCHEMAS["posts"].names, "mood"]
    assert found.column("mood").to_pylist() == [None, "fine"]
    assert found.column("langs").null_count == 2


def broken() -> dict[str, bytes]:
    whole = parquet_of("posts", [row(HOUR, seq) for seq in range(3000)])
    other = io.BytesIO()
    pq.write_table(table_of("posts", [row(HOUR, 1)]).drop_columns(["did"]), other)
    text = io.BytesIO()
    posts = table_of("posts", [row(HOUR, 1)]).drop_columns(["seq"])
    pq.write_table(posts.append_column("seq", pa.array(["one"])), text)
    return {
        "nothing": b"",
        "no_parquet": b"text that is long enough to have a footer, but has none",
        "cut": whole[: len(whole) // 2],
        "no_head": whole[500:],
        "zeroed": whole[:4] + bytes(600) + whole[604:],
        "lacks_a_column": other.getvalue(),
        "odd_type": text.getvalue(),
    }


@pytest.mark.parametrize("name", broken())
def test_a_damaged_input_is_an_error_of_this_hour(name: str, tmp_path: Path) -> None:
    good = parquet_of("posts", [row(HOUR, 9000)])
    with pytest.raises(CompactionError, match="posts/x"):
        merged(tmp_path, [good, broken()[name]])


def test_a_row_that_is_not_written_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_order", lambda table: pa.array([2, 0]))
    with pytest.raises(CompactionError, match="3 rows read, but 2 written"):
        merged(tmp_path, [parquet_of("posts", [row(HOUR, seq) for seq in range(3)])])


def test_a_disk_that_fails_is_no_fault_of_the_input(tmp_path: Path) -> None:
    (path,) = stored(tmp_path, [parquet_of("posts", [row(HOUR, 1)])])
    work = Merge("posts/x", "posts", [path], tmp_path / "missing", bytes_max=1)
    with pytest.raises(OutputIOError):
        work.step()
    work.close()
