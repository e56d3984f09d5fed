from __future__ import annotations

import asyncio
import json
import os
import threading
from functools import partial
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blueflow.errors import CursorError, RecordingError, SequenceResetError
from blueflow.events import Account, Identity, Position, RepoOp, encode_event, encode_lines
from blueflow.metrics import Metrics
from blueflow.source import recordings, replay
from blueflow.source.recordings import RecordingFile
from blueflow.source.replay import Pace, ReplaySource
from blueflow.testing.contracts import contract_events
from blueflow.testing.faults import cancel_at
from blueflow.wire.recording import pack

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from blueflow.events import Event
    from blueflow.interfaces import Batch, Rejected

FIRST_SEQ = 31_527_015_322
LINES = contract_events("relay.example", 30)  # 37 events or so: some seqs have two
LINE_FILE = encode_lines(LINES)


class Played:
    """What came out of a file."""

    def __init__(self, path: Path, after: Position | None = None, **options: Any) -> None:
        self.source = ReplaySource(path, **options)
        self.after = after
        self.batches: list[Batch] = []

    async def play(self) -> Played:
        with anyio.fail_after(20):
            await self.source.start(self.after)
            try:
                async for batch in self.source:
                    self.batches.append(batch)
            finally:
                await self.source.stop()
        return self

    @property
    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch.events]

    @property
    def rejected(self) -> list[Rejected]:
        return [one for batch in self.batches for one in batch.rejected]

    @property
    def through(self) -> Position | None:
        return self.batches[-1].through if self.batches else None


async def played(path: Path, after: Position | None = None, **options: Any) -> Played:
    return await Played(path, after, **options).play()


@pytest.fixture
def frames(data_folder: Path) -> Path:
    return data_folder / "firehose" / "frames.bin"


@pytest.fixture
def data(frames: Path) -> bytes:
    return frames.read_bytes()


def plain(data: bytes) -> bytes:
    return data


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def zstd_in_many_frames(data: bytes) -> bytes:
    size = max(1, len(data) // 7)
    return b"".join(zstd(data[at : at + size]) for at in range(0, len(data), size))


FORMS = pytest.mark.parametrize("form", [plain, zstd, zstd_in_many_frames])


@pytest.fixture(params=[100, 1000, 256 * 1024])
def read_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces in which a file is read."""
    monkeypatch.setattr(recordings, "READ_BYTES", request.param)
    monkeypatch.setattr(recordings, "_PIECE_BYTES", min(request.param, 2048))
    return request.param


# Frames


@FORMS
async def test_recorded_frames_replay(data: bytes, tmp_path: Path, form: Any) -> None:
    path = tmp_path / "again"
    path.write_bytes(form(data))
    metrics = Metrics()
    result = await played(path, metrics=metrics)
    assert len(result.events) == 102
    assert result.rejected == []
    assert result.events[0].seq == FIRST_SEQ
    assert {event.source for event in result.events} == {"again"}
    assert [event.seq for event in result.events] == sorted(event.seq for event in result.events)
    assert metrics.registry.get_sample_value("blueflow_source_frames_total") == 100


async def test_they_are_the_operations_that_a_jetstream_saw(
    frames: Path, data_folder: Path
) -> None:
    result = await played(frames)
    text = (data_folder / "firehose" / "jetstream_v1.jsonl").read_text(encoding="utf-8")
    due = {}
    for line in map(json.loads, text.splitlines()):
        commit = line["commit"]
        key = line["did"], commit["rev"], commit["operation"], commit["collection"], commit["rkey"]
        due[key] = commit.get("record")
    got = {
        (e.did, e.rev, e.operation, e.collection, e.rkey): e.record
        for e in result.events
        if isinstance(e, RepoOp)
    }
    assert got == due


async def test_filters_and_the_position_behind_what_they_leave_out(frames: Path) -> None:
    metrics = Metrics()
    result = await played(frames, collections=["app.bsky.feed.post"], metrics=metrics)
    collections = {event.collection for event in result.events if isinstance(event, RepoOp)}
    assert collections == {"app.bsky.feed.post"}
    assert 0 < len(result.events) < 50
    assert result.through is not None
    assert result.through.seq == FIRST_SEQ + 99
    filtered = metrics.registry.get_sample_value("blueflow_pipeline_filtered_frames_total")
    assert filtered is not None
    assert 50 < filtered < 100
    nobody = await played(frames, dids=["did:plc:nobody"])
    assert (nobody.events, nobody.through) == ([], result.through)


@FORMS
async def test_frames_resume_behind_any_position(data: bytes, tmp_path: Path, form: Any) -> None:
    path = tmp_path / "frames.bin"
    path.write_bytes(form(data))
    everything = (await played(path, speed=1e12)).batches  # a batch per frame
    assert len(everything) == 100
    for number in (*range(3), 50, 97, 98, 99):
        after = everything[number].through
        result = await played(path, after)
        assert result.events == [e for batch in everything[number + 1 :] for e in batch.events]


async def test_a_cursor_is_a_position(frames: Path) -> None:
    result = await played(frames, cursor=str(FIRST_SEQ + 89))
    assert {event.seq for event in result.events} == set(range(FIRST_SEQ + 90, FIRST_SEQ + 100))
    for everything in ("oldest", "live", "saved"):
        assert len((await played(frames, cursor=everything)).events) == 102
    with pytest.raises(CursorError):
        await played(frames, cursor="yesterday")


async def test_a_recording_may_begin_long_before_the_cursor(tmp_path: Path) -> None:
    path = tmp_path / "long.bin"
    path.write_bytes(b"".join(frame_of(seq, seq // 10_000) for seq in (5, 20_000, 40_000, 50_000)))
    for after in (None, Position("long.bin", 40_000), Position("long.bin", 40_000, 2**60)):
        result = await played(path, after, cursor=40_000)
        assert [event.seq for event in result.events] == [50_000]


async def test_a_position_goes_before_a_cursor(frames: Path) -> None:
    result = await played(frames, Position("frames.bin", FIRST_SEQ + 97), cursor="oldest")
    assert {event.seq for event in result.events} == {FIRST_SEQ + 98, FIRST_SEQ + 99}


async def test_a_bad_frame_is_rejected_and_the_next_one_is_read(
    recorded_frames: list[bytes], tmp_path: Path
) -> None:
    bad = [b"no frame", b"\xff" * 50, recorded_frames[7][:-9]]
    mixed = [*recorded_frames[:5], bad[0], *recorded_frames[5:7], *bad[1:], *recorded_frames[8:]]
    path = tmp_path / "mixed.bin"
    path.write_bytes(b"".join(map(pack, mixed)))
    result = await played(path)
    assert [(one.reason, one.message) for one in result.rejected] == [("frame", b) for b in bad]
    assert {event.seq for event in result.events} == {*range(FIRST_SEQ, FIRST_SEQ + 100)} - {
        FIRST_SEQ + 7
    }


async def test_a_recording_may_hold_the_frames_twice(
    frames: Path, data: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "twice.bin"
    path.write_bytes(data * 2)
    assert (await played(path)).events == (await played(frames, name="twice.bin")).events


# Damage


@FORMS
async def test_a_recording_that_was_cut_off_gives_what_is_there(
    frames: Path, data: bytes, tmp_path: Path, form: Any
) -> None:
    data = form(data)
    everything = [event.seq for event in (await played(frames)).events]
    seen = set()
    for end in (*range(1, 12), 1000, len(data) // 2, len(data) - 100, len(data) - 1):
        path = tmp_path / f"{end}.bin"
        path.write_bytes(data[:end])
        result = await played(path)
        assert [event.seq for event in result.events] == everything[: len(result.events)]
        assert [one.reason for one in result.rejected] == ["frame"]
        assert "cut off" in result.rejected[0].detail or "ends before" in result.rejected[0].detail
        seen.add(len(result.events))
    assert len(seen) >= 3


async def test_the_bytes_of_a_frame_that_was_cut_off_are_kept(
    recorded_frames: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(b"".join(map(pack, recorded_frames[:3]))[:-10])
    (rejected,) = (await played(path)).rejected
    assert rejected.message == pack(recorded_frames[2])[:-10]
    assert rejected.after_seq == FIRST_SEQ + 1


@pytest.mark.usefixtures("read_bytes")
async def test_what_is_before_the_damage_is_handed_over(
    recorded_frames: list[bytes], tmp_path: Path
) -> None:
    path, good = tmp_path / "damaged.bin", b"".join(map(pack, recorded_frames[:3]))
    path.write_bytes(good + b"\xff\xff\xff\xff" + good)
    result = Played(path)
    with pytest.raises(RecordingError) as caught:
        await result.play()
    assert caught.value.offset == len(good)
    assert {event.seq for event in result.events} == {FIRST_SEQ, FIRST_SEQ + 1, FIRST_SEQ + 2}


async def test_damaged_zstd_is_told_behind_what_was_good(data: bytes, tmp_path: Path) -> None:
    damaged = bytearray(zstd_in_many_frames(data))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 2000] = bytes(2000)
    path = tmp_path / "damaged.zst"
    path.write_bytes(damaged)
    result = Played(path)
    with pytest.raises(RecordingError, match=r"damaged\.zst: damaged zstd data .* at byte \d+"):
        await result.play()
    assert 10 < len(result.events) < 90


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text", b"Dear diary,\n"),
        ("page", b"<!doctype html><html></html>"),
        ("noise", bytes(range(255, 0, -1))),
        ("zeros", bytes(100)),
        ("zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 100),
        ("window", zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=28)
        ).compress(bytes(range(10))) + b"garbage behind it"),
    ],
    ids=["text", "page", "noise", "zeros", "zst", "window"],
)  # fmt: skip
async def test_what_is_no_recording_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecordingError) as caught:
        await played(path)
    assert str(path) in str(caught.value)
    assert caught.value.offset >= 0


async def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"cannot replay .*/none: No such file or directory"):
        await played(tmp_path / "none")
    with pytest.raises(RecordingError, match="Is a directory"):
        await played(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n\n", zstd(b""), zstd(b"") * 3])
async def test_an_empty_file_is_an_empty_recording(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty"
    path.write_bytes(content)
    result = await played(path)
    assert (result.events, result.rejected) == ([], [])


async def test_a_pipe_can_be_replayed(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(zstd(data),))
    writer.start()
    assert len((await played(path)).events) == 102
    writer.join()


def test_a_small_file_that_unpacks_to_much_is_unpacked_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zst"
    path.write_bytes(zstd(bytes(300_000_000)))
    assert path.stat().st_size < 50_000
    file = RecordingFile(path)
    sizes = []
    while data := file.read():
        sizes.append(len(data))
    file.close()
    assert sum(sizes) == 300_000_000
    assert max(sizes) <= 70_000_000


# Lines


@FORMS
@pytest.mark.usefixtures("read_bytes")
async def test_lines_of_ours_replay_as_they_were(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(form(LINE_FILE))
    result = await played(path)
    assert result.events == LINES
    assert result.through is not None
    assert (result.through.source, result.through.seq) == ("events.jsonl", len(LINES))
    assert [n for batch in result.batches for n in batch.seqs or ()] == [*range(1, len(LINES) + 1)]


@pytest.mark.parametrize("name", ["golden_v1.jsonl", "jsonbench_head10.ndjson"])
async def test_recorded_jetstream_lines_replay(data_folder: Path, name: str) -> None:
    path = data_folder / "jetstream" / name
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    result = await played(path)
    assert result.rejected == []
    assert len(result.events) == len(lines) == 10
    for number, (event, line) in enumerate(zip(result.events, lines, strict=True), start=1):
        assert (event.source, event.seq, event.op_index) == (name, number, 0)
        again = msgspec.json.decode(encode_event(event))
        assert (again["did"], again["time_us"], again["kind"]) == (
            line["did"], line["time_us"], line["kind"],
        )  # fmt: skip
        if line["kind"] == "commit":
            assert again["commit"] == line["commit"]
        elif isinstance(event, Identity):
            assert event.handle == line["identity"].get("handle")
        elif isinstance(event, Account):
            assert event.active == line["account"]["active"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n \n"])
async def test_endings_and_blank_lines_do_not_matter(
    tmp_path: Path, ending: bytes, last: bytes
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(ending.join(LINE_FILE.splitlines()) + last)
    result = await played(path)
    assert result.events == LINES


@pytest.mark.usefixtures("read_bytes")
@pytest.mark.parametrize("batch_size", [1, 5, 256])
async def test_lines_resume_behind_any_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(replay, "BATCH_FRAMES", batch_size)
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINE_FILE)
    for number in range(len(LINES) + 1):
        result = await played(path, Position("x.jsonl", number))
        assert result.events == LINES[number:]
        assert all(b.through and b.through.seq > number for b in result.batches)


async def test_lines_that_are_added_later_are_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = LINE_FILE.splitlines(keepends=True)
    position, events = None, []
    for line in lines:
        with path.open("ab") as file:
            file.write(line)
        result = await played(path, position)
        position = result.through
        events += result.events
    assert events == LINES


@pytest.mark.parametrize(
    "bad",
    [b"{", b"{}", b"[]", b"nonsense", b'{"did": "x"}', b"\xff\xfe", b"\x00", b"[" * 100_000],
    ids=repr,
)
async def test_a_bad_line_is_rejected_and_the_next_one_is_read(tmp_path: Path, bad: bytes) -> None:
    lines = LINE_FILE.splitlines()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([*lines[:3], bad, *lines[3:]]))
    result = await played(path)
    assert result.events == LINES
    (rejected,) = result.rejected
    assert (rejected.reason, rejected.seq, rejected.after_seq) == ("body", 4, 3)
    assert rejected.message == bad


async def test_a_line_without_an_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "_LINE_BYTES_MAX", 10_000)
    monkeypatch.setattr(recordings, "READ_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINE_FILE.splitlines()[0] + b"\n{" + b" " * 20_000)
    with pytest.raises(RecordingError, match="line 2 has no end"):
        await played(path)


async def test_filters_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINE_FILE)
    did = LINES[0].did
    result = await played(path, dids=[did])
    assert result.events == [event for event in LINES if event.did == did]
    assert result.through is not None
    assert result.through.seq == len(LINES)
    posts = await played(path, collections=["app.bsky.feed.*"])
    assert 0 < len(posts.events) < len(LINES)
    assert all(isinstance(event, RepoOp) for event in posts.events)


async def test_the_name_has_no_epoch_in_it(tmp_path: Path) -> None:
    path = tmp_path / "take#two.jsonl"
    path.write_bytes(LINE_FILE)
    result = await played(path)
    assert result.source.name == "take_two.jsonl"
    assert result.through is not None
    assert result.through.source == "take_two.jsonl"


# Sequences that begin anew


def frame_of(seq: int, minute: int) -> bytes:
    """Return an #account frame: the seqs and times of a test, in the shape of the protocol."""
    from libipld import encode_dag_cbor  # noqa: PLC0415 - here alone

    body = {
        "seq": seq,
        "did": "did:plc:x",
        "time": f"2026-07-04T16:{minute:02}:00.000Z",
        "active": True,
    }
    return pack(encode_dag_cbor({"op": 1, "t": "#account"}) + encode_dag_cbor(body))


@pytest.fixture
def reset(tmp_path: Path) -> Path:
    """A recording of a relay that began to count anew, twice."""
    path = tmp_path / "reset.bin"
    seqs = [5, 6, 7, 3, 4, 5, 6, 1, 2]
    path.write_bytes(b"".join(frame_of(seq, minute) for minute, seq in enumerate(seqs)))
    return path


async def test_a_sequence_that_begins_anew_stops_the_replay(reset: Path) -> None:
    result = Played(reset)
    with pytest.raises(SequenceResetError):
        await result.play()
    assert [event.seq for event in result.events] == [5, 6, 7]


async def test_it_goes_on_in_a_new_epoch_when_told(reset: Path) -> None:
    result = await played(reset, on_sequence_reset="continue")
    assert [(event.source, event.seq) for event in result.events] == [
        ("reset.bin", 5), ("reset.bin", 6), ("reset.bin", 7),
        ("reset.bin#2", 3), ("reset.bin#2", 4), ("reset.bin#2", 5), ("reset.bin#2", 6),
        ("reset.bin#3", 1), ("reset.bin#3", 2),
    ]  # fmt: skip
    for batch in result.batches:
        assert batch.through is not None
        assert {event.source for event in batch.events} == {batch.through.source}


@pytest.mark.parametrize("batch_size", [1, 2, 256])
async def test_it_resumes_in_any_epoch(
    reset: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(replay, "BATCH_FRAMES", batch_size)
    everything = (await played(reset, on_sequence_reset="continue")).events
    for number, event in enumerate(everything, start=1):
        after = Position(event.source, event.seq, event.time_us)
        result = await played(reset, after, on_sequence_reset="continue")
        assert result.events == everything[number:]


# Pace

HOUR_US = 3_600_000_000


def waits(speed: float, times_us: Sequence[int], *, late_s: float = 0.0) -> list[float]:
    """Return the waits of a consumer that waits as told, and needs `late_s` for each event."""
    pace, now_s, told = Pace(speed), 1000.0, []
    for time_us in times_us:
        told.append(pace.wait_s(time_us, now_s))
        now_s += told[-1] + late_s
    return told


def test_the_pace_is_that_of_the_recording() -> None:
    times_us = [10_000_000, 11_000_000, 11_500_000, 14_000_000]
    assert waits(1, times_us) == pytest.approx([0, 1, 0.5, 2.5])
    assert waits(10, times_us) == pytest.approx([0, 0.1, 0.05, 0.25])
    assert waits(0.5, times_us) == pytest.approx([0, 2, 1, 5])


def test_what_the_consumer_needs_is_not_waited_for_as_well() -> None:
    times_us = [0, 1_000_000, 2_000_000, 3_000_000]
    assert waits(1, times_us, late_s=0.25) == pytest.approx([0, 0.75, 0.75, 0.75])
    assert waits(1, times_us, late_s=5) == pytest.approx([0, 0, 0, 0])


def test_times_that_go_back_are_not_waited_for() -> None:
    assert waits(1, [5_000_000, 4_500_000, 5_200_000]) == pytest.approx([0, 0, 0.2])


@pytest.mark.parametrize("claim_us", [2**62, 0, 3 * HOUR_US])
def test_a_time_that_is_far_off_costs_no_wait(claim_us: int) -> None:
    told = waits(1, [50 * HOUR_US, 50 * HOUR_US + 10**6, claim_us, 50 * HOUR_US + 2 * 10**6])
    assert told == pytest.approx([0, 1, 0, 0])


@given(st.lists(st.integers(0, 2**62), max_size=30), st.floats(0.01, 1000))
def test_no_wait_is_longer_than_an_hour_of_the_recording(times_us: list[int], speed: float) -> None:
    for wait_s in waits(speed, times_us):
        assert 0 <= wait_s <= len(times_us) * 3600 / speed * 1.001


@given(st.lists(st.integers(0, HOUR_US // 2), min_size=1, max_size=30), st.floats(0.1, 100))
def test_the_whole_takes_as_long_as_the_stream_did(times_us: list[int], speed: float) -> None:
    lasted_s = (max(times_us) - times_us[0]) / 1e6 / speed
    assert sum(waits(speed, times_us)) == pytest.approx(lasted_s)


class Clock:
    """Time passes only where the source waits."""

    def __init__(self, source: ReplaySource, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(source, "_clock", lambda: self.now_s)
        monkeypatch.setattr(source, "_sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now_s += seconds


async def test_a_replay_at_a_speed_hands_over_when_it_is_due(
    frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Played(frames, speed=2)
    clock = Clock(result.source, monkeypatch)
    await result.source.start(None)
    handed_over = [(clock.now_s, batch.events[0].time_us) async for batch in result.source]
    await result.source.stop()
    assert len(handed_over) == 100
    newest_us = first_us = handed_over[0][1]
    for now_s, time_us in handed_over:
        newest_us = max(newest_us, time_us)
        assert now_s == pytest.approx((newest_us - first_us) / 1e6 / 2)
    assert clock.now_s > 0


async def test_the_fastest_speed_does_not_wait(
    frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Played(frames)
    clock = Clock(result.source, monkeypatch)
    await result.play()
    assert clock.now_s == 0
    assert len(result.batches) < 10


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Lines half an hour apart."""
    path = tmp_path / "slow.jsonl"
    path.write_bytes(encode_lines(contract_events("x", 5, step_us=HOUR_US // 2)))
    return path


async def test_who_stops_waiting_for_an_event_loses_nothing(
    slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook does: `await asyncio.wait_for(anext(posts), 1)`."""
    result = Played(slow, speed=1)
    await result.source.start(None)
    first = await anext(result.source)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(result.source), 0.01)
    Clock(result.source, monkeypatch)
    rest = [event async for batch in result.source for event in batch.events]
    assert [*first.events, *rest] == (await played(slow)).events
    await result.source.stop()


async def test_stop_ends_a_wait_for_what_is_not_due(slow: Path) -> None:
    result = Played(slow, speed=1)
    await result.source.start(None)
    await anext(result.source)
    waiting = asyncio.ensure_future(anext(result.source))
    await asyncio.sleep(0.01)
    await result.source.stop()
    with pytest.raises(StopAsyncIteration), anyio.fail_after(10):
        await waiting


# Cancellation


@FORMS
async def test_cancelled_anywhere_nothing_is_lost(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    monkeypatch.setattr(recordings, "READ_BYTES", 50_000)
    monkeypatch.setattr(replay, "BATCH_FRAMES", 20)
    path = tmp_path / "frames.bin"
    path.write_bytes(form(data))
    due = (await played(path)).events
    for suspension in count(1):
        result = Played(path)
        await result.source.start(None)

        async def take(into: Played = result) -> None:
            async for batch in into.source:
                into.batches.append(batch)  # no suspension in between

        reached = await cancel_at(suspension, take)
        with anyio.fail_after(10):
            async for batch in result.source:
                result.batches.append(batch)
        await result.source.stop()
        assert result.events == due
        if not reached:
            break
    assert suspension > 10


async def test_cancelled_anywhere_in_its_start_it_closes(frames: Path) -> None:
    for suspension in count(1):
        source = ReplaySource(frames)
        reached = await cancel_at(suspension, partial(source.start, None))
        await source.stop()
        assert source._file is None
        if not reached:
            break
    assert suspension > 1


async def test_stop_waits_for_a_read_that_is_under_way(
    frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reading, go_on = ReplaySource(frames), threading.Event(), threading.Event()
    await source.start(None)
    read = RecordingFile.read

    def slow_read(file: RecordingFile) -> bytes:
        reading.set()
        go_on.wait(10)
        return read(file)

    monkeypatch.setattr(RecordingFile, "read", slow_read)
    running = asyncio.ensure_future(_to_the_end(source))
    while not reading.is_set():
        await asyncio.sleep(0.001)
    stopping = asyncio.ensure_future(source.stop())
    await asyncio.sleep(0.01)
    assert not stopping.done()
    go_on.set()
    await stopping
    await running


async def test_stop_does_not_wait_for_ever_for_a_read(
    frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_STOP_S", 0.01)
    source, go_on = ReplaySource(frames), threading.Event()
    await source.start(None)
    monkeypatch.setattr(RecordingFile, "read", lambda _: go_on.wait(10) and b"")
    running = asyncio.ensure_future(_to_the_end(source))
    await asyncio.sleep(0.01)
    await source.stop()
    go_on.set()
    await running
    await source.stop()
    assert source._file is None


async def _to_the_end(source: ReplaySource) -> None:
    async for _ in source:
        pass


async def test_a_position_never_goes_back_whatever_the_batches(
    frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "BATCH_FRAMES", 7)
    throughs = [batch.through for batch in (await played(frames)).batches]
    for one, following in pairwise(throughs):
        assert one is not None
        assert following is not None
        assert (one.seq, one.time_us) < (following.seq, following.time_us + 1)
