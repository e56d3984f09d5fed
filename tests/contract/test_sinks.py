"""The sink contract over every sink, the memory double included."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zstandard

from blueflow.events import encode_event
from blueflow.files.jsonl import JsonlSink
from blueflow.files.stdout import StdoutSink
from blueflow.testing.contracts import OutputContract, SinkContract
from blueflow.testing.memory import MemorySink, MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from blueflow.interfaces import Sink


class TestMemorySink(SinkContract):
    buffered = False

    @pytest.fixture(autouse=True)
    def _new_store(self) -> None:
        self.store = MemoryStore()

    async def make_sink(self) -> Sink:
        return MemorySink(store=self.store, buffered=self.buffered)

    async def stored_events(self) -> Sequence[Mapping[str, Any]]:
        return [msgspec.json.decode(encode_event(event)) for event in self.store.events]


class TestBufferedMemorySink(TestMemorySink):
    buffered = True


class TestJsonlSink(SinkContract):
    cut_by_hour = True
    commit_bytes_max = 64 * 1024 * 1024

    @pytest.fixture(autouse=True)
    def _new_folder(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "out"

    async def make_sink(self) -> Sink:
        return JsonlSink(
            self.directory,
            origin_source=self.source,
            simulated=True,
            commit_bytes_max=self.commit_bytes_max,
        )

    async def stored_events(self) -> Sequence[Mapping[str, Any]]:
        segments = sorted(self.directory.glob("*/hour=*/*.jsonl.zst"), key=lambda path: path.name)
        return [
            msgspec.json.decode(line)
            for path in segments
            for line in unpacked(path.read_bytes()).splitlines()
        ]


class TestJsonlSinkThatCommitsEveryWrite(TestJsonlSink):
    commit_bytes_max = 1


class TestStdoutSink(OutputContract):
    @pytest.fixture(autouse=True)
    def _new_stream(self) -> None:
        self.stream = io.BytesIO()

    async def make_sink(self) -> Sink:
        return StdoutSink(self.stream)

    async def stored_events(self) -> Sequence[Mapping[str, Any]]:
        return [msgspec.json.decode(line) for line in self.stream.getvalue().split(b"\n")[:-1]]


def unpacked(segment: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(segment).read()
