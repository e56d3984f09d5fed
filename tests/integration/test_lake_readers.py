"""Plain readers by plain globs, and a Lake, over a folder and over a real S3 server."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import duckdb
import polars as pl
import pyarrow.dataset as pads
import pytest
from pyarrow.fs import LocalFileSystem, S3FileSystem
from tests.groups import SERVERS
from tests.lake.lakes import H16, WrittenLake, account, at, post
from tests.leaving import leave_out
from tests.s3 import new_bucket, options_of

import blueflow
from blueflow.errors import BucketError, NoLakeError, StoreLoginError
from blueflow.lake import duck
from blueflow.lake.access import duckdb_secret, storage_options
from blueflow.lake.s3 import S3Store
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blueflow.lake.reading import Lake
    from blueflow.lake.s3client import S3Options
    from blueflow.testing.services.s3 import SeaweedServer

BUCKET = new_bucket()
FRESH, RAW = {2, 3, 4, 5, 6}, {1, 2, 3}  # what is in each root

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group(SERVERS)]


class Place(NamedTuple):
    """Where the same lake lies."""

    url: str
    glob: str  # what is in front of `<root>/posts/`
    s3: S3Options | None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenLake:
    """Hour 0 marked and swept, hour 1 marked and still in fresh, hour 2 fresh."""
    lake = WrittenLake(tmp_path_factory.mktemp("lakes") / "lake")
    lake.publish("posts", [post(at(0), 1, rkey="1"), post(at(1), 2, rkey="2")])
    lake.publish("posts", [post(at(1, 5), 3, rkey="3")])
    for hour in (H16, H16 + 1):
        for dataset in DATASETS:
            lake.compact(dataset, hour)
    lake.sweep("posts", H16)
    lake.publish("posts", [post(at(1, 9), 4, rkey="4"), post(at(2), 5, rkey="5")])
    lake.publish("posts", [post(at(2, 1), 6, rkey="5", operation="delete")])
    lake.publish("accounts", [account(at(2, 2), 7, active=True)])
    return lake


@pytest.fixture(scope="module")
def bucket(seaweed: SeaweedServer, written: WrittenLake) -> S3Options:
    """How to reach the lake in `some/where` of a bucket."""
    options = options_of(seaweed)

    async def upload() -> None:
        store = S3Store(f"s3://{BUCKET}/some/where", options)
        await store.open(create=True)
        for path in sorted(written.folder.rglob("*")):
            if path.is_file():
                key = path.relative_to(written.folder).as_posix()
                assert await store.put_new(key, path.read_bytes())
        await store.close()

    anyio.run(upload)
    return options


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, written: WrittenLake) -> Place:
    if request.param == "folder":
        return Place(str(written.folder), f"{written.folder}/", None)
    url = f"s3://{BUCKET}/some/where"
    return Place(url, f"{url}/", request.getfixturevalue("bucket"))


@contextmanager
def opened(place: Place) -> Iterator[Lake]:
    with blueflow.lake.open(place.url, s3=place.s3) as lake:
        yield lake


@contextmanager
def duckdb_for(place: Place) -> Iterator[Any]:
    with duckdb.connect() as connection:
        if place.s3 is not None and not duck.reads_s3(connection, duckdb_secret(place.s3)):
            leave_out(
                f"no httpfs for DuckDB {version('duckdb')}: pip install duckdb-extension-httpfs"
            )
        yield connection


@pytest.mark.parametrize(("root", "seqs"), [("fresh", FRESH), ("raw", RAW)])
def test_duckdb_reads_a_root_by_a_glob(place: Place, root: str, seqs: set[int]) -> None:
    with duckdb_for(place) as connection:
        rows = connection.execute(
            f"SELECT seq, hour FROM read_parquet('{place.glob}{root}/posts/**/*.parquet', "  # noqa: S608
            "hive_partitioning = true, union_by_name = true)"
        ).fetchall()
    assert sorted(seq for seq, _ in rows) == sorted(seqs)
    assert {int(hour) for _, hour in rows} == ({16, 17} if root == "raw" else {17, 18})


@pytest.mark.parametrize(("root", "seqs"), [("fresh", FRESH), ("raw", RAW)])
def test_polars_reads_a_root_by_a_glob(place: Place, root: str, seqs: set[int]) -> None:
    options = storage_options(place.s3) if place.s3 else None
    frame = pl.scan_parquet(
        f"{place.glob}{root}/posts/**/*.parquet",
        hive_partitioning=True,
        missing_columns="insert",
        storage_options=options,
    )
    assert sorted(frame.select("seq").collect()["seq"]) == sorted(seqs)
    assert frame.filter(pl.col("hour") == 17).select(pl.len()).collect().item() == (
        2 if root == "raw" else 3
    )


@pytest.mark.parametrize(("root", "seqs"), [("fresh", FRESH), ("raw", RAW)])
def test_pyarrow_reads_a_root_by_its_folder(place: Place, root: str, seqs: set[int]) -> None:
    filesystem: Any = LocalFileSystem()
    if place.s3 is not None:
        filesystem = S3FileSystem(
            endpoint_override=str(place.s3.endpoint).removeprefix("http://"),
            scheme="http",
            access_key=place.s3.access_key,
            secret_key=place.s3.secret_key,
        )
    folder = f"{place.glob}{root}/posts".removeprefix("s3://")
    rows = pads.dataset(folder, partitioning="hive", filesystem=filesystem)
    assert sorted(rows.to_table()["seq"].to_pylist()) == sorted(seqs)


@pytest.mark.parametrize("natively", [True, False])
def test_a_lake_joins_both_roots(
    place: Place, monkeypatch: pytest.MonkeyPatch, *, natively: bool
) -> None:
    if not natively:  # as without httpfs
        monkeypatch.setattr(duck, "reads_s3", lambda *_: False)
    with opened(place) as lake:
        assert sorted(lake.scan("posts").to_table()["seq"].to_pylist()) == [1, 2, 3, 4, 5, 6]
        assert lake.scan("posts", live=True).to_table()["seq"].to_pylist() == [1, 2, 3, 4]
        sql = "SELECT seq FROM posts ORDER BY seq"
        assert [seq for (seq,) in lake.duckdb(sql).fetchall()] == [1, 2, 3, 4, 5, 6]
        left = lake.duckdb(sql, "2026-07-04T17", "2026-07-04T18", live=True).fetchall()
        assert [seq for (seq,) in left] == [2, 3, 4]
        assert sorted(lake.polars("posts").collect()["seq"]) == [1, 2, 3, 4, 5, 6]
        assert lake.polars("posts", live=True).collect().height == 4
        assert lake.stats()["posts"].rows == 6
        assert [one for one in lake.verify(deep=True) if one.severity == "error"] == []
        paths = [one.path for one in lake.files("posts")]
        assert all(path.startswith(place.glob) for path in paths)
        assert len(paths) == 5


def test_httpfs_is_used_where_it_is(bucket: S3Options) -> None:
    with duckdb.connect() as connection:
        assert duck.reads_s3(connection, duckdb_secret(bucket)) == (
            find_spec("duckdb_extension_httpfs") is not None
        )


def test_the_environment_says_how_to_reach_it(
    bucket: S3Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIO_ENDPOINT", str(bucket.endpoint).removeprefix("http://"))
    monkeypatch.setenv("MINIO_ACCESS_KEY", str(bucket.access_key))
    monkeypatch.setenv("MINIO_SECRET_KEY", str(bucket.secret_key))
    with blueflow.lake.open(f"s3://{BUCKET}/some/where") as lake:
        assert lake.scan("posts").count_rows() == 6
    with pytest.raises(NoLakeError):
        blueflow.lake.open(f"s3://{BUCKET}/else/where")
    with pytest.raises(BucketError):
        blueflow.lake.open("s3://no-such-bucket")
    wrong = replace(bucket, secret_key="wrong")  # noqa: S106
    with pytest.raises(StoreLoginError):
        blueflow.lake.open(f"s3://{BUCKET}/some/where", s3=wrong)


def test_a_folder_may_be_named_in_many_ways(
    written: WrittenLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written.folder.parent)
    for url in ("lake", "./lake/", f"file://{written.folder}", Path("lake").absolute()):
        with blueflow.lake.open(url) as lake:
            assert lake.duckdb("SELECT count(*) FROM posts").fetchall() == [(6,)]
