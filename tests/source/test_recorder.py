from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from blueflow.errors import RecordFileError
from blueflow.metrics import Metrics
from blueflow.source.recorder import Recorder
from blueflow.source.replay import ReplaySource

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["frames.bin", "frames.bin.zst"]


def dropped(metrics: Metrics) -> float | None:
    labels = {"stage": "record", "reason": "write_error"}
    return metrics.registry.get_sample_value("blueflow_pipeline_dropped_total", labels)


async def events_of(path: Path) -> list[Any]:
    source = ReplaySource(path, name="relay")
    events: list[Any] = []
    await source.start(None)
    async for batch in source:
        events += batch.events
        assert not batch.rejected
    await source.stop()
    return events


@pytest.mark.parametrize("name", NAMES)
async def test_a_recording_replays_to_the_same_events(
    tmp_path: Path, data_folder: Path, recorded_frames: list[bytes], name: str
) -> None:
    recorder = Recorder(tmp_path / name, Metrics())
    for frame in recorded_frames:
        recorder.add(frame)
    recorder.close()
    recorder.close()
    assert recorder.frames == len(recorded_frames)
    original = await events_of(data_folder / "firehose" / "frames.bin")
    assert await events_of(tmp_path / name) == original
    assert len(original) == 102


def test_a_recording_is_what_was_given_byte_for_byte(
    tmp_path: Path, data_folder: Path, recorded_frames: list[bytes]
) -> None:
    for name in NAMES:
        recorder = Recorder(tmp_path / name, Metrics())
        for frame in recorded_frames:
            recorder.add(frame)
        recorder.close()
    original = (data_folder / "firehose" / "frames.bin").read_bytes()
    assert (tmp_path / "frames.bin").read_bytes() == original
    packed = (tmp_path / "frames.bin.zst").read_bytes()
    assert zstandard.ZstdDecompressor().stream_reader(packed).read() == original
    assert len(packed) < len(original) * 0.8


@pytest.mark.parametrize("name", NAMES)
def test_without_a_frame_there_is_no_file(tmp_path: Path, name: str) -> None:
    Recorder(tmp_path / name, Metrics()).close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(b"mine")
    with pytest.raises(RecordFileError, match="it exists"):
        Recorder(path, Metrics())
    assert path.read_bytes() == b"mine"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecordFileError, match="it exists"):
        Recorder(tmp_path / "dangling", Metrics())


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordFileError, match="does not exist"):
        Recorder(tmp_path / "no" / "frames.bin", Metrics())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(RecordFileError, match="may not be written"):
        Recorder(tmp_path / "frames.bin", Metrics())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_appears_in_between_is_left_alone(tmp_path: Path, name: str) -> None:
    metrics = Metrics()
    recorder = Recorder(tmp_path / name, metrics)
    (tmp_path / name).write_bytes(b"mine")
    recorder.add(b"frame")
    recorder.close()
    assert (tmp_path / name).read_bytes() == b"mine"
    assert dropped(metrics) == 1


class FullDisk:
    """A file on a disk that becomes full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    def close(self) -> None:
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_recording_and_counts_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    recorder = Recorder(tmp_path / "frames.bin", metrics)
    disk = FullDisk(50)
    monkeypatch.setattr(recorder, "_file", disk)
    for _ in range(10):
        recorder.add(bytes(10))
    recorder.close()
    assert recorder.frames == 3
    assert dropped(metrics) == 7
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert vars(errors[0])["taken"] == 3


def test_a_disk_that_fails_at_the_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    recorder = Recorder(tmp_path / "frames.bin", metrics)
    disk = FullDisk(14)
    monkeypatch.setattr(recorder, "_file", disk)
    recorder.add(bytes(10))
    disk.room = -1
    recorder.close()
    assert dropped(metrics) == 1
    assert "the recording ends here" in caplog.text
