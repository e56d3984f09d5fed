from __future__ import annotations

import gc
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from tests.lake.folderstore import FolderStore
from tests.lake.lakes import H16, WrittenLake, account, at, post

import blueflow
from blueflow.errors import CommitLogError, MissingExtraError, MissingLibraryError, NoLakeError
from blueflow.lake import duck
from blueflow.lake.reading import Lake
from blueflow.lake.schema import SCHEMAS
from blueflow.lake.span import Span, moment_us
from blueflow.records import DATASETS

OLD = pa.schema([field for field in SCHEMAS["posts"] if field.name != "quote_uri"])


@pytest.fixture
def written(tmp_path: Path) -> WrittenLake:
    """Hour 0 (16 h) marked and swept, hour 1 marked with late rows beside it, hour 2 fresh."""
    lake = WrittenLake(tmp_path / "lake")
    lake.publish("posts", [post(at(0, m), m, rkey=str(m)) for m in (10, 50)], schema=OLD)
    lake.publish("posts", [post(at(1, m), 60 + m, rkey=str(60 + m)) for m in (10, 50)])
    for hour in (H16, H16 + 1):
        for dataset in DATASETS:
            lake.compact(dataset, hour)
    lake.sweep("posts", H16)
    lake.publish("posts", [post(at(1, 30), 95, rkey="95"), post(at(2, 5), 130, rkey="130")])
    lake.publish("accounts", [account(at(2, 6), 200, active=True)])
    return lake


@pytest.fixture
def lake(written: WrittenLake) -> Any:
    with Lake(FolderStore(written.folder)) as lake:
        yield lake


def seqs(rows: Any) -> list[int]:
    table = rows.to_table() if isinstance(rows, pads.Dataset) else rows
    return sorted(table["seq"].to_pylist())


def test_files_are_those_of_both_roots_joined_at_the_markers(lake: Lake) -> None:
    found = [(one.root, f"{one.hour:%H}") for one in lake.files("posts")]
    assert found == [("raw", "16"), ("raw", "17"), ("fresh", "17"), ("fresh", "18")]
    for one in lake.files("posts"):
        assert Path(one.path).stat().st_size == one.size
        assert one.path.endswith(one.key)
    assert [f"{one.hour:%H}" for one in lake.files("posts", "2026-07-04T17", "2026-07-04T18")] == [
        *("17", "17")
    ]
    assert lake.files("posts", date(2027, 1, 1)) == []
    assert len(lake.files("posts", date(2026, 7, 4), date(2026, 7, 5))) == 4
    assert len(lake.files("posts", "2026-06-01", "2026-09-01")) == 4


def test_a_scan_has_every_row_once_and_the_declared_columns(lake: Lake) -> None:
    rows = lake.scan("posts")
    assert isinstance(rows, pads.Dataset)
    assert rows.schema == SCHEMAS["posts"]
    assert seqs(rows) == [10, 50, 70, 95, 110, 130]
    assert rows.to_table()["quote_uri"].null_count == 6


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("2026-07-04T16:50", "2026-07-04T17:30", [50, 70]),
        (datetime(2026, 7, 4, 16, 50, 0, 1, tzinfo=UTC), None, [70, 95, 110, 130]),
        (None, "2026-07-04 17:10:00.000001", [10, 50, 70]),
        ("2026-07-04T19:05+02:00", "2026-07-04T17:30:00Z", [70]),
        (None, datetime(2026, 7, 4, 18, 50, tzinfo=timezone(timedelta(hours=2))), [10]),
        ("2026-07-04T18", "2026-07-04T18", []),
    ],
)
def test_rows_are_cut_exactly_for_every_reader(
    lake: Lake, start: Any, end: Any, expected: list[int]
) -> None:
    rows = lake.scan("posts", start, end)
    assert seqs(rows) == expected
    assert rows.count_rows() == len(expected)
    assert seqs(pads.Scanner.from_dataset(rows, columns=["seq"]).to_table()) == expected
    of_two = pads.field("seq") >= 70
    assert seqs(rows.to_table(filter=of_two)) == [seq for seq in expected if seq >= 70]
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        in_sql = connection.execute("SELECT seq FROM rows WHERE op_index = 0 ORDER BY 1").fetchall()
    assert [seq for (seq,) in in_sql] == expected
    in_polars = pl.scan_pyarrow_dataset(rows).select("seq").collect()
    assert sorted(in_polars["seq"].to_list()) == expected
    viewed = lake.duckdb("SELECT seq FROM posts ORDER BY seq", start, end).fetchall()
    assert [seq for (seq,) in viewed] == expected
    assert seqs(lake.polars("posts", start, end).collect().to_arrow()) == expected


def test_columns_can_be_chosen_and_time_comes_along(lake: Lake) -> None:
    rows = lake.scan("posts", "2026-07-04T18", columns=["text", "did"])
    assert rows.schema.names == ["text", "did", "time"]
    assert rows.to_table().to_pylist()[0]["text"] == "post 130"
    with pytest.raises(ValueError, match="no column 'txt'; there are source, seq"):
        lake.scan("posts", columns=["txt"])


def test_a_view_of_each_dataset_is_there_even_without_files(lake: Lake) -> None:
    connection = lake.duckdb_connection()
    for dataset in DATASETS:
        relation = connection.sql(f"SELECT * FROM {dataset}")  # noqa: S608
        assert relation.columns == SCHEMAS[dataset].names
    assert lake.duckdb("SELECT count(*) FROM likes").fetchall() == [(0,)]
    assert lake.polars("likes").collect().columns == SCHEMAS["likes"].names
    assert lake.scan("likes").count_rows() == 0
    found = lake.duckdb("SELECT seq FROM posts WHERE seq > ? ORDER BY 1", params=[100]).fetchall()
    assert found == [(110,), (130,)]
    typed = lake.duckdb("SELECT * FROM posts").pl().schema
    assert typed == lake.polars("posts").collect_schema()


def test_a_sweep_between_two_lists_loses_and_doubles_nothing(written: WrittenLake) -> None:
    """The keeper compacts and removes the fresh files of an hour while they are listed."""

    def keeper(prefix: str) -> None:
        if prefix.startswith("raw/posts") and not store.closed:
            written.compact("posts", H16 + 2)
            written.sweep("posts", H16 + 2)
            store.closed = 1

    store = FolderStore(written.folder, keeper)
    with Lake(store) as lake:
        assert seqs(lake.scan("posts")) == [10, 50, 70, 95, 110, 130]
        assert [one.root for one in lake.files("posts")][-1] == "raw"


def test_an_hour_that_expires_while_it_is_listed_is_left_out(written: WrittenLake) -> None:
    """Its marker is listed, and gone when it is read."""
    seen: list[str] = []

    def keeper(prefix: str) -> None:
        seen.append(prefix)

    store = FolderStore(written.folder, keeper)
    get = store.get

    async def expired_first(key: str) -> bytes | None:
        if "_complete" in key and "hour=16" in key:
            written.expire("posts", H16)
        return await get(key)

    store.get = expired_first  # type: ignore[method-assign]
    with Lake(store) as lake:
        assert seqs(lake.scan("posts")) == [70, 95, 110, 130]
    assert len(seen) == 4


def test_a_file_that_the_keeper_removes_after_the_list_is_looked_for_again(
    written: WrittenLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_files, runs = duck.add_files, []

    def swept_first(*arguments: Any) -> None:
        runs.append(1)
        if len(runs) == 1:
            written.compact("posts", H16 + 2)
            written.sweep("posts", H16 + 2)
        add_files(*arguments)

    monkeypatch.setattr(duck, "add_files", swept_first)
    with Lake(FolderStore(written.folder)) as lake:
        assert lake.duckdb("SELECT count(*) FROM posts").fetchall() == [(6,)]
    assert len(runs) == 2


def test_a_marker_that_names_a_file_that_is_gone_is_an_error(written: WrittenLake) -> None:
    next((written.folder / "raw/posts").rglob("*T16-*.parquet")).unlink()
    with (
        Lake(FolderStore(written.folder)) as lake,
        pytest.raises(
            CommitLogError, match=r"T16-000001-01\.parquet is damaged: a marker names it"
        ),
    ):
        lake.files("posts")


def test_foreign_files_are_not_read(written: WrittenLake, lake: Lake) -> None:
    folder = Path(lake.files("posts")[-1].path).parent
    (folder / "mine.parquet").write_bytes(b"no parquet")
    (written.folder / "raw/posts/readme.txt").write_text("hello")
    assert seqs(lake.scan("posts")) == [10, 50, 70, 95, 110, 130]


def test_stats_count_each_row_once_and_show_a_table(lake: Lake) -> None:
    stats = lake.stats()
    posts = stats["posts"]
    assert (posts.rows, posts.files, posts.hours, posts.marked_hours) == (6, 4, 3, 2)
    assert posts.bytes == sum(one.size for one in lake.files("posts"))
    assert (posts.first_hour, posts.last_hour) == (
        datetime(2026, 7, 4, 16, tzinfo=UTC),
        datetime(2026, 7, 4, 18, tzinfo=UTC),
    )
    assert (stats["likes"].rows, stats["likes"].marked_hours) == (0, 2)
    assert [one.dataset for one in stats] == list(DATASETS)
    lines = repr(stats).splitlines()
    assert lines[2].split() == [
        *("posts", "6", f"{posts.bytes:,}", "4", "3", "2026-07-04T16", "2026-07-04T18", "2", "0")
    ]
    assert stats._repr_html_().count("<tr>") == 7
    assert lake.stats("2026-07-04T18")["posts"].rows == 1
    with pytest.raises(KeyError):
        stats["post"]


def test_a_lake_shows_itself_and_that_it_is_simulated(tmp_path: Path) -> None:
    WrittenLake(tmp_path, simulated=True)
    with Lake(FolderStore(tmp_path)) as lake:
        assert lake.simulated
        assert repr(lake) == f"<Lake {tmp_path}, simulated data>"
        assert "simulated" in lake._repr_html_()
        assert "simulated" in repr(lake.stats())


def test_a_folder_without_a_lake_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoLakeError, match="holds no lake"):
        Lake(FolderStore(tmp_path))


@pytest.mark.parametrize("name", ["post", "", "_blueflow"])
def test_a_dataset_that_does_not_exist_names_those_that_do(lake: Lake, name: str) -> None:
    for method in (lake.files, lake.scan, lake.polars):
        with pytest.raises(ValueError, match="there are posts, likes"):
            method(name)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (datetime(2026, 7, 4), ValueError),  # noqa: DTZ001 - what is refused
        ("yesterday", ValueError),
        ("2026-13-04", ValueError),
        (17, TypeError),
    ],
)
def test_a_time_that_is_none_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        moment_us(value)


def test_an_end_before_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match="before the start"):
        Span.of("2026-07-04", "2026-07-03")


async def test_it_works_while_an_event_loop_runs(written: WrittenLake) -> None:
    with Lake(FolderStore(written.folder)) as lake:
        assert len(lake.files("posts")) == 4
        assert lake.scan("posts", live=True).count_rows() == 6


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if "blueflow-lake" in one.name]


@pytest.mark.parametrize("how", ["close", "forget", "with", "refused"])
def test_the_thread_ends_with_the_lake(written: WrittenLake, tmp_path: Path, how: str) -> None:
    store = FolderStore(tmp_path if how == "refused" else written.folder)
    if how == "refused":
        with pytest.raises(NoLakeError):
            Lake(store)
    elif how == "with":
        with Lake(store) as lake:
            assert threads() == ["blueflow-lake"]
    else:
        lake = Lake(store)
        assert threads() == ["blueflow-lake"]
        if how == "close":
            lake.close()
            lake.close()
    lake = None  # type: ignore[assignment]
    gc.collect()
    assert threads() == []
    assert store.closed == 1


def test_a_script_that_forgets_to_close_ends_by_itself(written: WrittenLake) -> None:
    code = (
        "from tests.lake.folderstore import FolderStore\n"
        "from blueflow.lake.reading import Lake\n"
        "from pathlib import Path\n"
        f"lake = Lake(FolderStore(Path({str(written.folder)!r})))\n"
        "print(lake.scan('posts').count_rows())\n"
    )
    root = Path(__file__).parents[2]
    path = f"{Path(blueflow.__file__).parents[1]}:{root}"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=25,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("6\n", "")


@pytest.mark.parametrize(("library", "call"), [("duckdb", "duckdb"), ("polars", "polars")])
def test_a_library_that_is_missing_is_named(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, library: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "blueflow.lake.frames", raising=False)
    with pytest.raises(MissingLibraryError, match=f'needs "{library}"'):
        getattr(lake, call)("posts")


@pytest.mark.parametrize("name", blueflow.lake.__all__)
def test_every_public_name_of_the_room_resolves(name: str) -> None:
    value = getattr(blueflow.lake, name)
    assert value.__module__.startswith("blueflow.lake.")
    assert name in dir(blueflow.lake)


def test_what_is_not_there_and_what_is_not_installed_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(AttributeError, match=r"'blueflow\.lake' has no attribute 'opne'"):
        blueflow.lake.opne  # noqa: B018
    monkeypatch.delitem(vars(blueflow.lake), "DatasetStats", raising=False)
    for name in [one for one in sys.modules if one.startswith(("blueflow.lake.", "pyarrow"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'lakes need "blueflow\[lake\]"'):
        blueflow.lake.DatasetStats  # noqa: B018


def test_a_closed_lake_says_so(lake: Lake) -> None:
    rows = lake.scan("posts")
    lake.close()
    assert rows.count_rows() == 6
    with pytest.raises(RuntimeError, match="this lake is closed"):
        lake.files("posts")
