"""Each kind of damage is found, named where it is, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.lake.folderstore import FolderStore
from tests.lake.lakes import H16, NOW_S, SHARD, WrittenLake, at, parquet, post

from blueflow.lake.layout import (
    DESCRIPTION,
    hour_folder,
    hour_key,
    hour_log,
    marker_key,
    raw_key,
    record_key,
)
from blueflow.lake.logrecord import (
    HourRecord,
    Input,
    Lost,
    Marker,
    Repair,
    ShardRecord,
    decode,
    encode,
)
from blueflow.lake.store import PendingUpload
from blueflow.lake.verify import verify
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from blueflow.lake.findings import Finding

LATE = H16 + 1  # the hour with two versions


@pytest.fixture
def lake(tmp_path: Path) -> WrittenLake:
    """Hour 0 swept, hour 1 with late rows and its fresh files, hour 2 fresh; nothing wrong."""
    lake = WrittenLake(tmp_path / "lake")
    lake.publish("posts", [post(at(0), 1), post(at(1), 2, rkey="2")])
    for hour in (H16, LATE):
        for dataset in DATASETS:
            lake.compact(dataset, hour)
    lake.sweep("posts", H16)
    lake.publish("posts", [post(at(1), 3, rkey="3")])
    lake.compact("posts", LATE)
    lake.publish("posts", [post(at(2), 4, rkey="4"), post(at(2), 5, rkey="5")])
    lake.record("commit")
    return lake


async def found(lake: WrittenLake, *, deep: bool = True, **store: Any) -> list[Finding]:
    before = {path: path.read_bytes() for path in lake.folder.rglob("*") if path.is_file()}
    opened = FolderStore(lake.folder)
    opened.unfinished = store.get("unfinished", [])
    result = await verify(opened, deep=deep, now_s=NOW_S)
    after = {path: path.read_bytes() for path in lake.folder.rglob("*") if path.is_file()}
    assert before == after
    return result


async def only(lake: WrittenLake, **store: Any) -> Finding:
    (finding,) = await found(lake, **store)
    assert finding.remedy
    assert finding.where in str(finding)
    return finding


@pytest.mark.parametrize("deep", [False, True])
async def test_a_whole_lake_has_no_findings(lake: WrittenLake, *, deep: bool) -> None:
    assert await found(lake, deep=deep) == []


def change(lake: WrittenLake, key: str, type_: Any, /, **fields: Any) -> None:
    """Change what a record says, with a seal that fits."""
    path = lake.folder / key
    record = decode(key, type_, path.read_bytes())
    path.write_bytes(encode(msgspec.structs.replace(record, **fields)))


def fresh_of(lake: WrittenLake, hour: int) -> str:
    return next(file.key for file in lake.published if file.hour == hour)


FRESH_2 = "fresh/posts/year=2026/month=07/day=04/hour=18/test-0-of-1-000000000004.parquet"
RAW_1 = raw_key("posts", LATE, 1, 1)
RECORD_3 = record_key(SHARD, 3)
MARKER_2 = marker_key("posts", LATE, 2)


def shorter(lake: WrittenLake, key: str) -> None:
    path = lake.folder / key
    path.write_bytes(path.read_bytes()[:-10])


def flipped(lake: WrittenLake, key: str) -> None:
    path = lake.folder / key
    data = bytearray(path.read_bytes())
    data[20] ^= 255
    path.write_bytes(bytes(data))


def swapped(lake: WrittenLake) -> None:
    """Put a valid file of as many bytes, but of fewer rows, in the place of another."""
    path = lake.folder / FRESH_2
    size = path.stat().st_size
    small = parquet("posts", [post(at(2), 4)])
    change_size = size - len(small)
    assert change_size > 0
    path.write_bytes(small[:4] + bytes(change_size) + small[4:])


def without_record_5(lake: WrittenLake) -> None:
    lake.record("commit")
    (lake.folder / record_key(SHARD, 5)).unlink()


def without_version_1(lake: WrittenLake) -> None:
    lake.compact("likes", LATE)
    (lake.folder / hour_key("likes", LATE, 1)).unlink()


DAMAGE: dict[str, tuple[Callable[[WrittenLake], None], str, str]] = {
    "a fresh file is deleted": (
        lambda lake: (lake.folder / FRESH_2).unlink(),
        FRESH_2,
        "it is published, and it is not there",
    ),
    "a fresh file is cut off": (lambda lake: shorter(lake, FRESH_2), FRESH_2, "bytes instead of"),
    "a fresh file has other content": (lambda lake: flipped(lake, FRESH_2), FRESH_2, "checksum"),
    "a raw file is deleted": (
        lambda lake: (lake.folder / RAW_1).unlink(),
        RAW_1,
        "a marker names it, and it is not there",
    ),
    "a raw file is cut off": (lambda lake: shorter(lake, RAW_1), RAW_1, "bytes instead of"),
    "a raw file has other content": (lambda lake: flipped(lake, RAW_1), RAW_1, "checksum"),
    "a fresh file has fewer rows": (swapped, FRESH_2, "it has 1 rows instead of 2"),
    "a record is missing": (
        without_record_5,
        record_key(SHARD, 5),
        "this record is missing, and later ones are there",
    ),
    "a record is corrupt": (
        lambda lake: flipped(lake, record_key(SHARD, 5)),
        record_key(SHARD, 5),
        "",
    ),
    "a record has another number": (
        lambda lake: change(lake, record_key(SHARD, 5), ShardRecord, number=7),
        record_key(SHARD, 5),
        "it holds record 7",
    ),
    "a record adds up wrongly": (
        lambda lake: change(lake, record_key(SHARD, 5), ShardRecord, rows=99),
        record_key(SHARD, 5),
        "it says 99 rows and",
    ),
    "a range is skipped": (
        lambda lake: change(lake, record_key(SHARD, 5), ShardRecord, since={"relay": Input(17)}),
        record_key(SHARD, 5),
        "relay begins at 17, and the record before ended at 4",
    ),
    "a sealed log goes on": (
        lambda lake: change(lake, record_key(SHARD, 4), ShardRecord, kind="seal"),
        record_key(SHARD, 5),
        "went on without a claim",
    ),
    "a marker is corrupt": (lambda lake: flipped(lake, MARKER_2), MARKER_2, ""),
    "a marker is missing": (
        lambda lake: (lake.folder / marker_key("posts", LATE, 1)).unlink(),
        marker_key("posts", LATE, 1),
        "its marker is missing",
    ),
    "a marker is short": (
        lambda lake: change(lake, MARKER_2, Marker, files=(RAW_1.rpartition("/")[2],)),
        MARKER_2,
        "its files are not those of the records",
    ),
    "a marker counts wrongly": (
        lambda lake: change(lake, MARKER_2, Marker, rows=1),
        MARKER_2,
        "it says 1 rows and",
    ),
    "a marker covers too little": (
        lambda lake: change(lake, marker_key("posts", H16, 1), Marker, covers=()),
        marker_key("posts", H16, 1),
        "what it covers is not what the records say",
    ),
    "a marker of another hour": (
        lambda lake: change(lake, MARKER_2, Marker, hour="2026-07-04T16"),
        MARKER_2,
        "it is of posts, 2026-07-04T16",
    ),
    "a marker that nobody made": (
        lambda lake: lake.put(
            marker_key("posts", LATE, 3),
            encode(Marker("posts", "2026-07-04T17", 3, NOW_S, 0, 0, (), ())),
        ),
        marker_key("posts", LATE, 3),
        "no record of its hour made it",
    ),
    "an hour's record is missing": (
        without_version_1,
        hour_key("likes", LATE, 1),
        "this record is missing, and later ones are there",
    ),
    "an hour's record is corrupt": (
        lambda lake: flipped(lake, hour_key("posts", H16, 1)),
        hour_key("posts", H16, 1),
        "",
    ),
    "an orphan in fresh": (
        lambda lake: lake.put(
            FRESH_2.replace("04.parquet", "05.parquet"), parquet("posts", [post(at(2), 9)])
        ),
        FRESH_2.replace("04.parquet", "05.parquet"),
        "no record of its log published it",
    ),
    "an orphan in raw": (
        lambda lake: lake.put(raw_key("posts", LATE, 1, 2), parquet("posts", [post(at(1), 9)])),
        raw_key("posts", LATE, 1, 2),
        "no record of its hour made it",
    ),
    "no description": (lambda lake: (lake.folder / DESCRIPTION).unlink(), DESCRIPTION, "missing"),
    "a corrupt description": (lambda lake: flipped(lake, DESCRIPTION), DESCRIPTION, ""),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_an_error_where_it_is(lake: WrittenLake, name: str) -> None:
    damage, where, what = DAMAGE[name]
    damage(lake)
    errors = [one for one in await found(lake) if one.severity == "error"]
    assert where in {one.where for one in errors}
    assert what in next(one.what for one in errors if one.where == where)
    others = {one.where for one in errors} - {where}
    allowed = {"a marker of another hour", "an hour's record is missing"}  # what follows from it
    assert not others or name in allowed, others


async def test_rows_that_got_lost_in_compaction_are_an_error(lake: WrittenLake) -> None:
    key = hour_key("posts", H16, 1)
    change(lake, key, HourRecord, outputs=(), rows=0, bytes=0)
    change(lake, marker_key("posts", H16, 1), Marker, files=(), rows=0, bytes=0)
    errors = {one.where: one.what for one in await found(lake)}
    assert errors[key] == "1 rows of fresh/ became 0 of raw/"
    assert errors[raw_key("posts", H16, 1, 1)] == "no record of its hour made it"


async def test_a_file_that_is_compacted_twice_is_an_error(lake: WrittenLake) -> None:
    first = lake.versions["posts", LATE][0].inputs
    change(lake, hour_key("posts", LATE, 2), HourRecord, inputs=first)
    errors = {one.where: one.what for one in await found(lake)}
    assert errors[hour_key("posts", LATE, 2)] == f"{first[0]} is compacted for the second time"


FOREIGN = (
    "fresh/posts/year=2026/month=07/day=04/hour=18/mine.parquet",
    "raw/posts/year=2026/month=07/day=04/hour=18/posts-20260704T17-000001-01.parquet",
    "raw/posts/notes.txt",
    "_blueflow/logs/test/0-of-1/readme.json",
    f"{hour_log('posts', H16)}x.json",
)


@pytest.mark.parametrize("key", FOREIGN)
async def test_a_foreign_file_is_a_warning(lake: WrittenLake, key: str) -> None:
    lake.put(key, parquet("posts", [post(at(2), 9)]))
    finding = await only(lake)
    assert (finding.severity, finding.where, finding.what) == (
        *("warning", key),
        "it is not blueflow's",
    )


async def test_what_lies_beside_the_roots_is_nobodys_business(lake: WrittenLake) -> None:
    lake.put("processed/trends/x.parquet", b"")
    lake.put("readme.md", b"")
    assert await found(lake) == []


async def test_what_the_last_record_names_may_not_be_visible_yet(lake: WrittenLake) -> None:
    (key,) = lake.publish("posts", [post(at(2), 6)])
    (lake.folder / key).unlink()
    finding = await only(lake)
    assert (finding.severity, finding.where) == ("warning", key)
    assert finding.what == "it is published and not visible yet"


async def test_what_is_to_be_repaired_is_a_warning(lake: WrittenLake) -> None:
    file = lake.published[-1]
    (lake.folder / file.key).unlink()
    lake.record("claim")
    change(lake, record_key(SHARD, lake.number), ShardRecord, repair=Repair((file,), {}, {}))
    assert (await only(lake)).severity == "warning"


async def test_an_unfinished_version_is_a_warning(lake: WrittenLake) -> None:
    (lake.folder / MARKER_2).unlink()
    finding = await only(lake)
    assert (finding.severity, finding.where) == ("warning", MARKER_2)


async def test_a_loss_that_was_accepted_is_told(lake: WrittenLake) -> None:
    change(lake, RECORD_3, ShardRecord, lost=(Lost("posts/0", 5, 9, "retention"),))
    finding = await only(lake)
    assert (finding.severity, finding.where) == ("note", RECORD_3)
    assert finding.what == "5 up to 9 of posts/0 is accepted as lost: retention"


@pytest.mark.parametrize(
    ("key", "age_s", "severity", "what"),
    [
        ("fresh/x", 10.0, "note", "an upload that is invisible for 10 s, of a flush under way"),
        ("fresh/x", 7200.0, "warning", "an upload that is invisible for 7,200 s and forgotten"),
    ],
)
async def test_invisible_uploads_are_told_with_their_age(
    lake: WrittenLake, key: str, age_s: float, severity: str, what: str
) -> None:
    finding = await only(lake, unfinished=[PendingUpload(key, "u", NOW_S - age_s)])
    assert (finding.severity, finding.what) == (severity, what)


async def test_a_closed_hour_without_a_marker_is_told(lake: WrittenLake) -> None:
    lake.record("commit")
    key = record_key(SHARD, lake.number)
    change(lake, key, ShardRecord, watermark_us=at(4))
    finding = await only(lake)
    assert (finding.severity, finding.where) == ("note", "2026-07-04T18")
    assert finding.what.endswith(
        "not compacted yet: posts, likes, reposts, follows, other, accounts"
    )


async def test_an_expired_hour_is_fine_and_what_it_left_behind_is_told(lake: WrittenLake) -> None:
    kept = {
        path: path.read_bytes()
        for path in (lake.folder / hour_folder("raw", "posts", LATE)).glob("*")
    }
    lake.expire("posts", LATE)
    assert await found(lake) == []
    for path, data in kept.items():
        path.write_bytes(data)
    told = await found(lake)
    assert {one.severity for one in told} == {"warning"}
    assert len(told) == len(kept) == 4


async def test_records_that_were_trimmed_are_not_missed(lake: WrittenLake) -> None:
    for number in (1, 2, 3):
        (lake.folder / record_key(SHARD, number)).unlink()
    assert await found(lake) == []


async def test_what_happens_while_it_looks_is_no_finding(lake: WrittenLake) -> None:
    """A flush and the compaction of an hour, with the removal of its files, in between."""

    def work(prefix: str) -> None:
        if prefix == "fresh/" and not store.closed:
            store.closed = 1
            lake.record("commit")
            lake.publish("posts", [post(at(2), 7, rkey="7")])
            lake.record("commit")
            lake.publish("posts", [post(at(2), 8, rkey="8")])
        if prefix == "raw/" and store.closed == 1:
            store.closed = 2
            lake.compact("posts", H16 + 2)
            lake.sweep("posts", H16 + 2)

    store = FolderStore(lake.folder, work)
    told = await verify(store, now_s=NOW_S)
    assert store.closed == 2
    assert [one for one in told if one.severity == "error"] == []
