"""The source contract over recordings: frames and lines, plain and zstd."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
import zstandard

from blueflow.decode import Decoder, Wanted
from blueflow.events import decode_line
from blueflow.source import replay
from blueflow.source.replay import ReplaySource
from blueflow.testing.contracts import SourceContract
from blueflow.wire.recording import Unpacker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event
    from blueflow.interfaces import Source

DATA = Path(__file__).parents[1] / "data"


class RecordingContract(SourceContract):
    """Small batches, so that there are positions to resume from."""

    compressed: ClassVar[bool] = False
    original: ClassVar[Path]

    @pytest.fixture(autouse=True)
    def _recording(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "BATCH_FRAMES", 9)
        data = self.original.read_bytes()
        self.path = tmp_path / self.original.name
        self.path.write_bytes(
            zstandard.ZstdCompressor().compress(data) if self.compressed else data
        )

    async def make_source(self) -> Source:
        return ReplaySource(self.path)


class TestFrames(RecordingContract):
    original = DATA / "firehose" / "frames.bin"

    async def expected_events(self) -> Sequence[Event]:
        decoder = Decoder("frames.bin", after=None, wanted=Wanted())
        for frame in Unpacker("frames.bin").feed(self.original.read_bytes()):
            decoder.feed(frame, 2**62)
        return decoder.take().events


class TestCompressedFrames(TestFrames):
    compressed = True


class TestJetstreamLines(RecordingContract):
    original = DATA / "firehose" / "jetstream_v1.jsonl"

    async def expected_events(self) -> Sequence[Event]:
        lines = self.original.read_bytes().splitlines()
        return [decode_line(line, self.original.name, n) for n, line in enumerate(lines, start=1)]


class TestCompressedJetstreamLines(TestJetstreamLines):
    compressed = True
