"""One run in this process, with doubles for source and sink; signals are tested by test_produce."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import blueflow.job
from blueflow.config import Settings
from blueflow.errors import (
    CursorError,
    OutputClosedError,
    OutputIOError,
    RecordFileError,
    SettingError,
)
from blueflow.events import Position
from blueflow.job import _accept, _checks
from blueflow.metrics import Metrics
from blueflow.pipeline import Flow
from blueflow.source.firehose import FirehoseSource
from blueflow.testing.contracts import contract_events
from blueflow.testing.faults import Faults
from blueflow.testing.memory import ListSource, MemorySink, batches_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from blueflow.events import Event
    from blueflow.interfaces import Sink, Source

NAME = "list.example"
EVENTS = contract_events(NAME, 20)
QUIET = Settings(sink="memory", prometheus_port=0, log_format="json")


@pytest.fixture(autouse=True)
def _only_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's signals and garbage collector alone."""
    monkeypatch.setattr(blueflow.job, "stop_on_signals", lambda _: None)
    monkeypatch.setattr(blueflow.job, "tune_memory", lambda: None)


async def produce(
    monkeypatch: pytest.MonkeyPatch, source: Source, sink: Sink, settings: Settings = QUIET
) -> int:
    monkeypatch.setattr(blueflow.job, "source_of", lambda *_: source)
    monkeypatch.setattr(blueflow.job, "sink_of", lambda *_: sink)
    with anyio.fail_after(20):
        return await blueflow.job.produce(settings)


def listed(**options: Any) -> ListSource:
    return ListSource(batches_of(EVENTS, 5), **options)


async def test_a_run_ends_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MemorySink()
    assert await produce(monkeypatch, listed(), sink) == 0
    assert sink.events == EVENTS


async def test_a_run_ends_after_its_limit_or_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MemorySink()
    assert await produce(monkeypatch, listed(endless=True), sink, replace(QUIET, limit=6)) == 0
    assert len(sink.events) in (6, 7)
    sink = MemorySink()
    assert await produce(monkeypatch, listed(endless=True), sink, replace(QUIET, for_s=0.2)) == 0
    assert sink.events == EVENTS


async def test_the_time_of_a_run_does_not_hide_that_its_sink_cannot_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Away(MemorySink):
        async def resume(self) -> Mapping[str, Position]:
            await anyio.sleep(0.3)
            raise OutputIOError("away", "gone")

    with pytest.RaisesGroup(OutputIOError):
        await produce(monkeypatch, listed(endless=True), Away(), replace(QUIET, for_s=0.05))


async def test_a_reader_that_leaves_is_a_normal_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MemorySink(Faults(2, OutputClosedError("stdout")))
    assert await produce(monkeypatch, listed(), sink) == 0
    assert sink.faults.fired == 1


async def test_an_error_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = MemorySink(Faults(2, OutputIOError("memory", "full")))
    with pytest.RaisesGroup(OutputIOError):
        await produce(monkeypatch, listed(), sink)


async def test_the_server_of_a_run_is_there_while_it_runs_and_gone_behind_it(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    seen: list[bytes] = []

    class Asking(MemorySink):
        async def write(self, events: Sequence[Event], *, through: Position) -> None:
            stream = await anyio.connect_tcp("127.0.0.1", unused_tcp_port)
            async with stream:
                await stream.send(b"GET /readyz HTTP/1.1\r\n\r\n")
                seen.append(await stream.receive())
            await super().write(events, through=through)

    settings = replace(QUIET, prometheus_port=unused_tcp_port)
    for _ in range(2):  # the port is free again
        await produce(monkeypatch, listed(), Asking(), settings)
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in seen)
    server = await anyio.create_tcp_listener(local_port=unused_tcp_port, local_host="127.0.0.1")
    async with server:
        with pytest.raises(SettingError):
            await produce(monkeypatch, listed(), MemorySink(), settings)


async def test_a_recording_that_exists_is_refused_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "mine.bin"
    path.write_bytes(b"mine")
    source = listed()
    with pytest.raises(RecordFileError):
        await produce(monkeypatch, source, MemorySink(), replace(QUIET, record=path))
    assert not source._stopped.is_set()


async def test_a_run_is_described_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Metrics] = []

    class Kept(Metrics):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(blueflow.job, "Metrics", Kept)
    settings = replace(QUIET, sink="my:Sink:postgres://me:hunter2@host")
    await produce(monkeypatch, listed(), MemorySink(), settings)
    text = made[0].exposition().decode()
    assert "hunter2" not in text
    assert 'sink="my"' in text
    assert 'simulated="true"' in text


# Cursors


@pytest.mark.parametrize("cursor", ["live", "oldest", "7"])
def test_a_cursor_over_a_position_is_refused(cursor: str) -> None:
    with pytest.raises(CursorError, match=rf"'{cursor}': the sink is at seq 5 of host"):
        _accept(replace(QUIET, cursor=cursor), Position("host", 5))
    _accept(replace(QUIET, cursor=cursor), None)
    _accept(QUIET, Position("host", 5))


# Checks


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("blueflow.job.time.monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def ready(settings: Settings, flow: Flow, source: Source) -> dict[str, bool]:
    return {name: check().ok for name, check in _checks(settings, source, flow).items()}


def test_a_relay_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FirehoseSource("wss://host")
    assert ready(QUIET, Flow(), source)["source"] is False
    monkeypatch.setattr(FirehoseSource, "connected", True)
    assert ready(QUIET, Flow(), source)["source"] is True
    assert ready(QUIET, Flow(), listed())["source"] is True


def test_silence_is_told(clock: Clock) -> None:
    flow = Flow()
    check = _checks(QUIET, listed(), flow)["frames"]
    assert check().ok
    clock.now_s += 121
    assert not check().ok
    assert check().reason == "no frame for 121 s"
    flow.moved_s = clock.now_s
    assert check().ok


def test_a_sink_that_hangs_is_told(clock: Clock) -> None:
    flow = Flow(keeps_position=False)
    check = _checks(QUIET, listed(), flow)["sink"]
    late_s = 3 * 60 + QUIET.drain_s
    clock.now_s += 10 * late_s
    flow.position = Position("x", 2)
    assert check().ok  # a sink that keeps no position says nothing about it
    flow.keeps_position = True
    flow.durable = Position("x", 1)
    flow.durable_s = clock.now_s
    assert check().ok
    clock.now_s += late_s + 1
    assert not check().ok
    flow.durable = flow.position
    assert check().ok  # nothing new has come


def test_a_sink_that_never_made_anything_durable_is_told(clock: Clock) -> None:
    flow = Flow()
    check = _checks(QUIET, listed(), flow)["sink"]
    assert check().reason == "nothing was to be made durable yet"
    flow.position = Position("x", 2)
    clock.now_s += 3 * 60 + QUIET.drain_s + 1
    assert not check().ok


def test_a_call_of_the_sink_that_does_not_end_is_the_sinks(clock: Clock) -> None:
    flow = Flow(keeps_position=False)
    checks = _checks(QUIET, listed(), flow)
    flow.sink_call_s = clock.now_s
    clock.now_s += 121
    assert checks["frames"]() == (True, "waiting for the sink")
    assert checks["sink"]() == (False, "the sink has been at one call for 121 s")
    flow.sink_call_s = 0.0
    assert not checks["frames"]().ok
    assert checks["sink"]().ok
