"""The jsonl sink on a real disk: layout, commits, failures, refusals."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import zstandard

from blueflow.errors import (
    BlueflowError,
    CommitLogError,
    InvariantError,
    OtherSourceError,
    OutputIOError,
    OutputLockedError,
    OutputNotWritableError,
)
from blueflow.events import Position, RepoOp, encode_event
from blueflow.files.commitlog import CommitLog
from blueflow.files.disk import Disk
from blueflow.files.folder import SEGMENTS_OPEN_MAX
from blueflow.files.jsonl import JsonlSink
from blueflow.files.layout import SIMULATED_MARK
from blueflow.testing.contracts import contract_events
from blueflow.testing.faults import Faults
from blueflow.testing.watcheddisk import WatchedDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from blueflow.events import Event

SOURCE = "relay.example"
EVENTS = contract_events(SOURCE, 30, step_us=300_000_000)
HALF = [event for event in EVENTS if event.seq <= 15]


def sink_over(directory: Path, **settings: Any) -> JsonlSink:
    return JsonlSink(directory, **{"origin_source": SOURCE, "simulated": False, **settings})


async def store(sink: JsonlSink, events: Sequence[Event]) -> None:
    """Resume, write what is not there yet, flush and close."""
    try:
        position = (await sink.resume()).get(SOURCE)
        rest = [event for event in events if position is None or event.seq > position.seq]
        if rest:
            await sink.write(rest, through=through(rest))
        await sink.flush()
    finally:
        await sink.close()


def through(events: Sequence[Event]) -> Position:
    return Position(events[-1].source, events[-1].seq, events[-1].time_us)


def stored(directory: Path) -> Counter[bytes]:
    return Counter(line for path in segments(directory) for line in lines_of(path))


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/hour=*/*.jsonl.zst"))


def lines_of(path: Path) -> list[bytes]:
    return zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().split(b"\n")[:-1]


def lines(events: Sequence[Event]) -> Counter[bytes]:
    return Counter(map(encode_event, events))


def records(directory: Path) -> list[Path]:
    return sorted((directory / "_blueflow" / "log").iterdir())


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path and content, but for the lock, which names its last holder."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if path.name != "lock"
    }


def post(seq: int, time_us: int, collection: str = "app.bsky.feed.post") -> RepoOp:
    return RepoOp(SOURCE, seq, 0, "did:plc:a", time_us, "3l", "delete", collection, "r")


async def test_an_event_goes_where_its_kind_and_hour_say(tmp_path: Path) -> None:
    events = [
        post(1, 1_783_180_799_999_999),
        post(2, 1_783_180_800_000_000),
        post(3, 1_783_180_800_000_000, "app.bsky.feed.like"),
        post(4, -1),  # far from the stream: it goes to the hour of the batch's position
        post(5, 2**63 - 1, "com.example.note"),
    ]
    await store(sink_over(tmp_path / "out"), events)
    number = "000000000001.jsonl.zst"
    assert [str(path.relative_to(tmp_path / "out")) for path in segments(tmp_path / "out")] == [
        f"likes/hour=2026-07-04T16/{number}",
        f"other/hour=9999-12-31T23/{number}",
        f"posts/hour=2026-07-04T15/{number}",
        f"posts/hour=2026-07-04T16/{number}",
        f"posts/hour=9999-12-31T23/{number}",
    ]
    assert stored(tmp_path / "out") == lines(events)


async def test_a_record_tells_what_a_commit_holds(tmp_path: Path) -> None:
    await store(sink_over(tmp_path / "out"), EVENTS)
    (path,) = records(tmp_path / "out")
    record = json.loads(path.read_bytes())["record"]
    assert sum(file["rows"] for file in record["files"]) == record["head"]["rows"] == len(EVENTS)
    assert record["head"]["pipeline"] == "default"
    assert record["head"]["source"] == SOURCE
    assert record["head"]["simulated"] is False
    assert record["head"]["positions"]["default"][SOURCE]["seq"] == 30
    assert {file["path"] for file in record["files"]} == {
        str(path.relative_to(tmp_path / "out")) for path in segments(tmp_path / "out")
    }


async def test_a_commit_comes_with_age_or_size_and_not_before(tmp_path: Path) -> None:
    now_s = 0.0
    sink = sink_over(
        tmp_path / "out", clock=lambda: now_s, commit_interval_s=60, commit_bytes_max=100_000
    )
    await sink.resume()
    await sink.write(HALF, through=through(HALF))
    now_s = 59.9
    await sink.write([], through=through(HALF))
    assert sink.durable == {}
    now_s = 60.0
    await sink.write([], through=through(HALF))
    assert sink.durable == {SOURCE: through(HALF)}
    now_s = 1_000.0  # quiet times bring no commits
    await sink.write([], through=through(HALF))
    assert len(records(tmp_path / "out")) == 1
    await sink.write([], through=Position(SOURCE, 16))
    now_s = 1_060.0  # a position alone is worth one
    await sink.write([], through=Position(SOURCE, 17))
    assert sink.durable == {SOURCE: Position(SOURCE, 17)}
    large = contract_events(SOURCE, 500, first_seq=18)
    await sink.write(large, through=through(large))
    assert sink.durable == {SOURCE: through(large)}
    assert len(records(tmp_path / "out")) == 3
    await sink.flush()
    assert len(records(tmp_path / "out")) == 3
    await sink.close()


async def test_more_hours_than_may_be_open_stay_one_commit(tmp_path: Path) -> None:
    events = [post(seq, seq * 3_600_000_000) for seq in range(1, 3 * SEGMENTS_OPEN_MAX)]
    events += [post(200 + seq, seq * 3_600_000_000) for seq in range(1, 4)]
    sink = sink_over(tmp_path / "out")
    await sink.resume()
    for batch in (events[:-3], events[-3:]):
        await sink.write(batch, through=through(batch))
    assert sink.durable == {SOURCE: through(events[:-3])}, "so many segments bring a commit"
    await sink.flush()
    await sink.close()
    assert stored(tmp_path / "out") == lines(events)
    assert len(records(tmp_path / "out")) == 2


async def test_an_hour_that_was_closed_early_gets_a_second_segment(tmp_path: Path) -> None:
    """As many hours as may be open, then new ones, and the first one again."""
    hours = [*range(SEGMENTS_OPEN_MAX - 1), 40, 41, 0, 0]
    events = [post(seq, hour * 3_600_000_000) for seq, hour in enumerate(hours, start=1)]
    sink = sink_over(tmp_path / "out")
    await sink.resume()
    for batch in (events[: SEGMENTS_OPEN_MAX - 1], events[SEGMENTS_OPEN_MAX - 1 :]):
        # A position without a time leaves every event its own hour.
        await sink.write(batch, through=Position(SOURCE, batch[-1].seq))
    later = post(99, 0)
    await sink.write([later], through=Position(SOURCE, 99))
    await sink.flush()
    await sink.close()
    assert stored(tmp_path / "out") == lines([*events, later])
    first = [path for path in segments(tmp_path / "out") if path.parent.name.endswith("-01-01T00")]
    assert [path.name for path in first] == [
        "000000000001.jsonl.zst",
        "000000000001.p0002.jsonl.zst",
        "000000000002.jsonl.zst",
    ]
    in_order = [line for path in first for line in lines_of(path)]
    assert in_order == [encode_event(event) for event in (events[0], *events[-2:], later)]


@pytest.mark.slow
async def test_a_commit_of_ten_thousand_segments_is_one(tmp_path: Path) -> None:
    """Its hidden names get a digit more on the way, and stay in order."""
    events = [post(seq, seq * 3_600_000_000) for seq in range(1, 10_003)]
    sink = sink_over(tmp_path / "out", disk=WatchedDisk(lambda: None, synced=False))
    await sink.resume()
    await sink.write(events, through=Position(SOURCE, events[-1].seq))
    await sink.close()
    assert len(segments(tmp_path / "out")) == len(events)
    assert len(records(tmp_path / "out")) == 1


async def test_times_spread_over_years_make_few_folders(tmp_path: Path) -> None:
    now_us, year_us = 1_783_180_800_000_000, 365 * 86_400_000_000
    claims = [now_us - (index * 7_919 % 1_000) * year_us // 50 for index in range(1_000)]
    events = [post(seq, time_us) for seq, time_us in enumerate(claims, start=1)]
    sink = sink_over(tmp_path / "out", commit_bytes_max=1)
    await sink.resume()
    for start in range(0, len(events), 100):
        batch = events[start : start + 100]
        await sink.write(batch, through=Position(SOURCE, batch[-1].seq, now_us))
    await sink.close()
    assert stored(tmp_path / "out") == lines(events)
    assert {path.parent.name for path in segments(tmp_path / "out")} == {"hour=2026-07-04T16"}


async def test_the_reference_of_hours_outlives_a_restart(tmp_path: Path) -> None:
    directory, now_us = tmp_path / "out", 1_783_180_800_000_000
    await store(sink_over(directory), [post(1, now_us)])
    await store(sink_over(directory), [post(2, 5), post(3, now_us + 1)])
    assert {path.parent.name for path in segments(directory)} == {"hour=2026-07-04T16"}


async def test_at_any_moment_a_reader_sees_whole_committed_segments(tmp_path: Path) -> None:
    directory, looks = tmp_path / "out", 0
    batches = [EVENTS[start : start + 10] for start in range(0, len(EVENTS), 10)]
    prefixes = [lines(EVENTS[: 10 * index]) for index in range(len(batches) + 1)]

    def look() -> None:
        nonlocal looks
        looks += 1
        seen = stored(directory)  # a half segment would not unpack
        assert seen <= prefixes[-1]
        assert max(seen.values(), default=1) == max(prefixes[-1].values())

    sink = sink_over(directory, disk=WatchedDisk(look), commit_bytes_max=1)
    await sink.resume()
    for batch in batches:
        await sink.write(batch, through=through(batch))
    await sink.close()
    assert stored(directory) == prefixes[-1]
    assert looks > 100


@pytest.mark.faults
@pytest.mark.parametrize(("code", "first"), [(errno.ENOSPC, 1), (errno.EIO, 2)])
async def test_a_disk_that_fails_at_any_call_loses_and_doubles_nothing(
    tmp_path: Path, code: int, first: int, *, full_campaign: bool
) -> None:
    quick = WatchedDisk(lambda: None, synced=False)
    for call in range(1 if full_campaign else first, 1_000, 1 if full_campaign else 2):
        directory = tmp_path / str(call)
        faults = Faults(call, OSError(code, os.strerror(code)))
        sink = sink_over(directory, disk=WatchedDisk(faults.step, synced=False))
        promised: dict[str, Position] = {}
        sentence = os.strerror(code)
        try:
            await sink.resume()
            await sink.write(HALF, through=through(HALF))
            await sink.flush()
            promised = dict(sink.durable)
            await sink.write(EVENTS[len(HALF) :], through=through(EVENTS))
            await sink.flush()
            promised = dict(sink.durable)
        except OutputIOError as error:
            sentence = str(error)
            with pytest.raises(BlueflowError):  # after an error there is only close
                await sink.flush()
        finally:
            await sink.close()
        if not faults.fired:
            assert call > 40
            assert promised == {SOURCE: through(EVENTS)}
            return
        assert os.strerror(code) in sentence
        again = sink_over(directory, disk=quick)
        found = await again.resume()
        assert found.get(SOURCE, Position(SOURCE, 0)).seq >= (
            promised[SOURCE].seq if promised else 0
        )
        assert stored(directory) == lines(
            [event for event in EVENTS if found and event.seq <= found[SOURCE].seq]
        )
        await again.close()
        await store(sink_over(directory, disk=quick), EVENTS)
        assert stored(directory) == lines(EVENTS)


async def test_a_second_writer_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    first, second = sink_over(directory), sink_over(directory)
    await first.resume()
    with pytest.raises(OutputLockedError, match=f"process {os.getpid()} on "):
        await second.resume()
    await second.close()
    await first.write(HALF, through=through(HALF))
    await first.flush()
    await first.close()
    await store(sink_over(directory), EVENTS)
    assert stored(directory) == lines(EVENTS)


async def test_a_writer_in_another_process_is_seen(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from blueflow.files.jsonl import JsonlSink\n"
        f"sink = JsonlSink(sys.argv[1], origin_source={SOURCE!r}, simulated=False)\n"
        "asyncio.run(sink.resume())\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(  # noqa: ASYNC220 - it starts once
        [sys.executable, "-c", program, tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        sink = sink_over(tmp_path / "out")
        with pytest.raises(OutputLockedError, match=f"process {process.pid} on "):
            await sink.resume()
        await sink.close()
        process.kill()
    await store(sink_over(tmp_path / "out"), HALF)  # nothing to tidy up after a kill


async def test_a_lock_that_was_taken_away_stops_the_writer(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    sink = sink_over(directory)
    await sink.resume()
    (directory / "_blueflow" / "lock").unlink()
    await sink.write(HALF, through=through(HALF))
    with pytest.raises(OutputLockedError, match="taken away"):
        await sink.flush()
    await sink.close()
    assert stored(directory) == Counter()


def last_record(directory: Path) -> Path:
    return records(directory)[-1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def lose_a_pending_segment(directory: Path) -> None:
    """As after a crash in the publication, but a hidden segment is gone."""
    os.link(last_record(directory), directory / "_blueflow/hidden" / last_record(directory).name)
    segments(directory)[-1].unlink()


def replace_a_pending_segment(directory: Path) -> None:
    record = json.loads(last_record(directory).read_bytes())["record"]
    os.link(last_record(directory), directory / "_blueflow/hidden" / last_record(directory).name)
    file = record["files"][0]
    (directory / file["path"]).unlink()
    (directory / "_blueflow/hidden" / file["hidden"]).write_bytes(b"x" * file["size"])


def lose_the_log(directory: Path) -> None:
    for path in records(directory):
        path.unlink()


def lose_the_last_record(directory: Path) -> None:
    last_record(directory).unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda out: os.truncate(last_record(out), 100), "no record"),
        (lambda out: os.truncate(last_record(out), 0), "it is empty"),
        (lambda out: last_record(out).write_bytes(bytes(range(256))), "no record"),
        (lambda out: last_record(out).write_bytes(b"{}"), "no record"),
        (lambda out: flip(last_record(out)), "damaged"),
        (lambda out: os.truncate(segments(out)[-1], 3), "3 bytes"),
        (lose_a_pending_segment, "it is lost"),
        (replace_a_pending_segment, "checksum is wrong"),
        (lose_the_log, "segments but no commit log"),
        (lose_the_last_record, "of commit 2, and the last record is 1"),
        (lambda out: (out / "_blueflow/hidden").rmdir(), "it is missing"),
    ],
    ids=[
        "truncated", "empty", "garbage", "another document", "flipped bit", "truncated segment",
        "lost segment", "replaced segment", "lost log", "lost record",
        "lost hidden folder",
    ],
)  # fmt: skip
async def test_damage_is_refused_and_not_touched(
    tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    directory = tmp_path / "out"
    await store(sink_over(directory), HALF)
    await store(sink_over(directory), EVENTS)
    damage(directory)
    damaged = tree(directory)
    for _ in range(2):  # and it stays refused
        sink = sink_over(directory)
        with pytest.raises(CommitLogError, match=sentence):
            await sink.resume()
        await sink.close()
        assert tree(directory) == damaged


async def test_a_log_of_another_kind_is_refused(tmp_path: Path) -> None:
    log = CommitLog(tmp_path / "out", Disk())
    log.read_last()
    log.recover()
    log.decide([], {"partitions": [1, 2]})
    log.publish()
    sink = sink_over(tmp_path / "out")
    with pytest.raises(CommitLogError, match="no log of a jsonl output"):
        await sink.resume()
    await sink.close()


async def test_segments_that_a_reader_moved_away_are_not_missed(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    await store(sink_over(directory), HALF)
    for path in segments(directory):
        path.unlink()
        path.parent.rmdir()
    await store(sink_over(directory), EVENTS)
    assert stored(directory) == lines(EVENTS[len(HALF) :])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"origin_source": "other.example"}, f"events of {SOURCE} .*those of other.example"),
        ({"simulated": True}, "holds live data, and this run would add simulated data"),
        ({"simulated": True, "pipeline": "new"}, "holds live data"),
    ],
)
async def test_other_data_is_refused(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    directory = tmp_path / "out"
    await store(sink_over(directory), HALF)
    before = tree(directory)
    sink = sink_over(directory, **settings)
    with pytest.raises(OtherSourceError, match=sentence):
        await sink.resume()
    await sink.close()
    assert tree(directory) == before


@pytest.mark.parametrize("committed", [True, False])
async def test_a_simulated_folder_says_so_and_takes_no_live_data(
    tmp_path: Path, *, committed: bool
) -> None:
    directory = tmp_path / "out"
    await store(sink_over(directory, simulated=True), HALF if committed else [])
    assert "simulated data" in (directory / SIMULATED_MARK).read_text()
    if committed:
        (directory / SIMULATED_MARK).unlink()  # the log knows it, too
    sink = sink_over(directory)
    with pytest.raises(OtherSourceError, match=r"holds simulated data, .* live data"):
        await sink.resume()
    await sink.close()
    await store(sink_over(directory, simulated=True), EVENTS)
    assert (directory / SIMULATED_MARK).exists()


async def test_an_epoch_is_the_same_source_and_a_new_pipeline_begins_anew(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    await store(sink_over(directory), HALF)
    epoch = contract_events(f"{SOURCE}#2", 3)
    sink = sink_over(directory, origin_source=f"{SOURCE}#2")
    await sink.resume()
    await sink.write(epoch, through=through(epoch))
    await sink.flush()
    await sink.close()
    other = contract_events("other.example", 3)
    sink = sink_over(directory, origin_source="other.example", pipeline="second")
    assert await sink.resume() == {}
    await sink.write(other, through=through(other))
    await sink.flush()
    await sink.close()
    sink = sink_over(directory)
    assert await sink.resume() == {SOURCE: through(HALF), f"{SOURCE}#2": through(epoch)}
    await sink.close()
    assert stored(directory) == lines([*HALF, *epoch, *other])


async def test_broken_promises_of_the_caller_stop_it(tmp_path: Path) -> None:
    sink = sink_over(tmp_path / "early")
    with pytest.raises(InvariantError, match="resumed before"):
        await sink.write(HALF, through=through(HALF))
    await sink.close()
    unencodable = RepoOp(SOURCE, 20, 0, "did:a", 0, "r", "create", "c", "k", "cid", {"t": "\ud800"})
    for events, position, sentence in (
        ([], Position(SOURCE, 14), "never goes back from 15"),
        ([], Position("other.example", 99), "no events of other.example"),
        ([unencodable], Position(SOURCE, 20), "has a JSON form"),
    ):
        sink = sink_over(tmp_path / "out")
        await sink.resume()
        await sink.write(HALF, through=through(HALF))
        with pytest.raises(InvariantError, match=sentence):
            await sink.write(events, through=position)
        with pytest.raises(InvariantError, match=sentence):
            await sink.flush()
        await sink.close()
    assert stored(tmp_path / "out") == Counter()


async def test_an_unusable_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "missing/out", "file/out"):
        sink = sink_over(tmp_path / place)
        with pytest.raises(OutputNotWritableError):
            await sink.resume()
        await sink.close()
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTSUP])
async def test_missing_rights_and_missing_links_are_found_at_the_start(
    tmp_path: Path, code: int
) -> None:
    class BelowOnly(WatchedDisk):
        def sync_folder(self, path: Path) -> None:
            if path != tmp_path:  # rights to list the folder above are not asked for
                super().sync_folder(path)

    for call in range(1, 100):
        faults = Faults(call, OSError(code, os.strerror(code), "out"))
        sink = sink_over(tmp_path / str(call), disk=BelowOnly(faults.step))
        refused = ""
        try:
            await sink.resume()
        except OutputNotWritableError as error:
            refused = str(error)
        finally:
            await sink.close()
        if not faults.fired:
            assert call > 8
            return
        assert os.strerror(code) in refused


async def test_closing_waits_for_a_slow_disk_no_longer_than_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("blueflow.files.jsonl.CLOSE_WAIT_S", 0.01)
    hung, go_on = threading.Event(), threading.Event()

    def step() -> None:
        if hung.is_set():
            go_on.wait(20)

    sink = sink_over(tmp_path / "out", disk=WatchedDisk(step))
    await sink.resume()
    hung.set()
    with anyio.move_on_after(0.01) as scope:
        await sink.write(HALF, through=through(HALF))
    assert scope.cancelled_caught, "a cancelled caller does not wait for the disk"
    await sink.close()
    assert "the disk does not answer" in caplog.text
    second = sink_over(tmp_path / "out")
    with pytest.raises(OutputLockedError):  # the first one may still write
        await second.resume()
    await second.close()
    go_on.set()
