from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import psutil
import pytest
import zstandard

from blueflow.config import Settings
from blueflow.errors import (
    Exit,
    OutputIOError,
    SettingError,
    SimulatedRelayError,
    SinkLoadError,
    SinkUrlError,
    SourceUrlError,
)
from blueflow.factory import SimulatedSource, folder_of, quarantine_of, sink_of, source_of
from blueflow.files.jsonl import JsonlSink
from blueflow.files.stdout import StdoutSink
from blueflow.kafka.sink import KafkaSink
from blueflow.masking import mask_credentials
from blueflow.metrics import Metrics
from blueflow.pipeline import Flow, pump
from blueflow.source.firehose import FirehoseSource
from blueflow.source.recorder import Recorder
from blueflow.source.replay import ReplaySource
from blueflow.testing.frames import encode_frame, encode_info
from blueflow.testing.memory import ListSource, MemorySink
from blueflow.wire.recording import pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blueflow.interfaces import Sink, Source
    from blueflow.kafka.connection import Connection

SINK = """
from blueflow.interfaces import Sink

class Mine(Sink):
    def __init__(self, argument):
        self.argument = argument
    async def resume(self): return {}
    async def write(self, events, *, through): pass
    async def flush(self): pass
    @property
    def durable(self): return {}
    async def close(self): pass

class Other:  # a sink by its shape alone, whose state comes with resume()
    def __init__(self, argument): pass
    async def resume(self): self.state = {}
    async def write(self, events, *, through): pass
    async def flush(self): pass
    async def close(self): pass
    @property
    def durable(self): return self.state

class Lazy(Sink):
    def __init__(self, argument): pass
    async def resume(self): return {}
    async def close(self): pass

class Nothing:
    def __init__(self, argument): pass

class Failing:
    def __init__(self, argument): raise ValueError(f"no {argument}")

class Telling:
    def __init__(self, argument):
        from blueflow.errors import OutputIOError
        raise OutputIOError(argument, "full")

class Proud:
    def __init__(self): pass

def make(argument): return Mine(argument)
not_callable = 5
"""


def source(url: str, **settings: Any) -> Source:
    return source_of(Settings(source=url, **settings), Metrics())


def sink(url: str | None, **settings: Any) -> Sink:
    source = ListSource([], name="relay", simulated=True)
    return sink_of(Settings(sink=url, **settings), source, Metrics())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with sinks of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_sinks.py").write_text(SINK)
    (tmp_path / "broken.py").write_text("this is no Python")
    (tmp_path / "needy.py").write_text("import nothing_of_that_name")
    (tmp_path / "angry.py").write_text("raise ZeroDivisionError('boom')")
    yield tmp_path
    for name in ("my_sinks", "broken", "needy", "angry"):
        sys.modules.pop(name, None)


# Sources


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("wss://bsky.network", "bsky.network"),
        ("wss://bsky.network:443", "bsky.network"),
        ("ws://127.0.0.1:8080/path", "127.0.0.1:8080"),
        ("wss://me:secret@relay.example", "relay.example"),
        ("replay:some/where/frames.bin.zst", "frames.bin.zst"),
        ("sim", "sim"),
    ],
)
def test_a_source_has_a_name_without_secrets(url: str, name: str) -> None:
    assert source(url).name == name
    assert source(url, source_name="mine").name == "mine"
    assert source(url).simulated == (url == "sim")


def test_an_address_is_a_relay_a_file_is_a_replay_and_sim_is_simulated() -> None:
    assert type(source("wss://host")) is FirehoseSource
    assert type(source("replay:x")) is ReplaySource
    assert type(source("sim")) is SimulatedSource


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"no recording at all, but long enough", "no recording of plain frames"),
        (zstandard.compress(b"what --record FILE.zst wrote"), "no recording of plain frames"),
        (pack(b"hello"), "does not begin with a frame"),
        (pack(encode_info("OutdatedCursor", "without a seq")), "does not begin with a frame"),
        (pack(encode_frame("#commit", {"seq": 1, "time": "noon"})), "does not begin with a frame"),
    ],
    ids=["missing", "text", "compressed", "no-frame", "no-seq", "no-operations"],
)
def test_frames_that_cannot_be_served_are_told_before_anything_begins(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "frames"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match=rf"sim_frames .*{path}: .*{problem}") as caught:
        source("sim", sim_frames=path)
    assert caught.value.exit_code == Exit.USAGE


async def test_the_end_of_the_simulated_relay_ends_the_source_and_what_came_is_durable() -> None:
    sink, flow = MemorySink(buffered=True), Flow()
    run = asyncio.create_task(pump(source("sim", sim_rate=2000.0), sink, flow=flow))
    with anyio.fail_after(20):
        while flow.events < 500:
            await anyio.sleep(0.01)
        (relay,) = (
            child
            for child in psutil.Process().children()
            if "--exit-with-parent" in child.cmdline()
        )
        relay.kill()
        with pytest.raises(SimulatedRelayError, match=r"has ended \(killed by SIGKILL\)"):
            await run
    assert len(sink.events) == flow.events
    assert sink.store.positions == {"sim": flow.position}


@pytest.mark.parametrize(
    "url",
    [
        *("bsky.network", "", "https://host", "ftp://host", "wss://", "ws://host:port", "SIM"),
        *("ws://a..b", "ws://[x]", f"ws://{'a' * 64}.b", "ws://\udce9"),
    ],
)
def test_what_is_no_source(url: str) -> None:
    with pytest.raises(SourceUrlError):
        source(url)


@pytest.mark.parametrize(
    "url",
    [
        *("https://me:hunter2@host", "me:hunter2@host", "wss://me:hunter2/x@host"),
        *("wss://me:x[hunter2]y@host", "wss://me:hunter2\u2100@host"),  # urlsplit cites these
    ],
)
def test_an_address_in_an_error_has_no_secret(url: str) -> None:
    with pytest.raises(SourceUrlError) as caught:
        source(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_masking_leaves_what_to_do_about_a_password() -> None:
    with pytest.raises(SourceUrlError) as caught:
        source("wss://me:hunter2/x@host")
    assert mask_credentials(str(caught.value)) == str(caught.value)
    assert "(/ is %2F)" in str(caught.value)


def test_a_replay_is_not_recorded_again(here: Path) -> None:
    recorder = Recorder(here / "again.bin", Metrics())
    with pytest.raises(SettingError, match="record"):
        source_of(Settings(source="replay:x"), Metrics(), recorder)


# Sinks


def test_sinks_of_ours(here: Path) -> None:
    assert type(sink("stdout")) is StdoutSink
    jsonl = sink(f"jsonl:{here / 'out'}")
    assert isinstance(jsonl, JsonlSink)
    assert jsonl.directory == here / "out"
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("kafka://broker", ["broker"]),
        ("kafka://broker:9092/", ["broker:9092"]),
        ("kafka://a:1, b:2", ["a:1", "b:2"]),
        ("kafka://a-1.example:9092,b_2:19092", ["a-1.example:9092", "b_2:19092"]),
        ("kafka://[::1]:9092,127.0.0.1:9092", ["[::1]:9092", "127.0.0.1:9092"]),
    ],
)
def test_kafka_with_one_server_or_some(url: str, servers: list[str]) -> None:
    made = sink(url)
    assert isinstance(made, KafkaSink)
    options = connection_of(made).options("x")
    assert options["bootstrap_servers"] == servers
    assert options["security_protocol"] == "PLAINTEXT"


def test_kafka_without_a_server_takes_those_of_the_settings() -> None:
    made = sink("kafka://", kafka_bootstrap_servers="a:1,b:2")
    assert connection_of(made).bootstrap == "a:1,b:2"
    assert connection_of(sink("kafka://c:3", kafka_bootstrap_servers="a:1")).bootstrap == "c:3"


def test_kafka_with_a_user_is_encrypted_unless_said_otherwise(here: Path) -> None:
    login: dict[str, Any] = {"kafka_username": "me", "kafka_password": "hunter2"}
    options = connection_of(sink("kafka://a:1", **login)).options("x")
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    plain = sink(
        "kafka://a:1", **login, kafka_security_protocol="sasl_plaintext",
        kafka_sasl_mechanism="plain",
    )  # fmt: skip
    options = connection_of(plain).options("x")
    assert (options["security_protocol"], options["sasl_mechanism"]) == ("SASL_PLAINTEXT", "PLAIN")
    files: dict[str, Any] = {"kafka_ca_file": Path("~/ca.pem"), "kafka_cert_file": here / "me.pem"}
    connection = connection_of(sink("kafka://a:1", kafka_security_protocol="ssl", **files))
    assert connection.ca_file == str(Path("~/ca.pem").expanduser())
    assert (connection.cert_file, connection.key_file) == (str(here / "me.pem"), None)


def connection_of(sink: Sink) -> Connection:
    assert isinstance(sink, KafkaSink)
    return sink._supervisor._connection


def settings_of(sink: JsonlSink) -> tuple[float, int]:
    return sink._commit_interval_s, sink._commit_bytes_max


def test_a_sink_has_its_own_defaults_of_how_often_it_commits(here: Path) -> None:
    kafka, folder = sink("kafka://a:1"), sink(f"jsonl:{here / 'out'}")
    assert isinstance(kafka, KafkaSink)
    assert isinstance(folder, JsonlSink)
    assert (kafka._age_s, kafka._bytes_max) == (0.3, 8 * 1024**2)
    assert settings_of(folder) == (60.0, 64 * 1024**2)
    given: dict[str, Any] = {"commit_interval_s": 2.0, "commit_bytes_max": 100_000}
    kafka, folder = sink("kafka://a:1", **given), sink(f"jsonl:{here / 'out'}", **given)
    assert isinstance(kafka, KafkaSink)
    assert isinstance(folder, JsonlSink)
    assert (kafka._age_s, kafka._bytes_max) == settings_of(folder) == (2.0, 100_000)


def test_a_home_folder_is_understood(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setenv("HOME", str(here))
    settings = Settings(sink="jsonl:~/out")
    assert folder_of(settings, "jsonl:~/out") == here / "out"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (None, "no sink is set"),
        ("jsonl:", "there is no folder in it"),
        ("jsonl", "there is no such sink"),
        ("kafak://broker:9092", "there is no such sink"),
        ("stdout:", "there is no such sink"),
        ("kafka://broker:x", "it is not kafka://HOST:PORT"),
        ("kafka://broker:9092/topic", "it is not kafka://HOST:PORT"),
        ("kafka://a:1,", "it is not kafka://HOST:PORT"),
        ("kafka://a:123456", "it is not kafka://HOST:PORT"),
        ("kafka://a:65536", "it is not kafka://HOST:PORT"),
        ("kafka://a:0", "it is not kafka://HOST:PORT"),
        ("kafka://::1:9092", "it is not kafka://HOST:PORT"),
        ("kafka://me@broker", "credentials do not belong in it"),
        ("a b:C", "there is no such sink"),
        ("my_sinks:", "there is no such sink"),
        (":Mine", "there is no such sink"),
        ("my-sinks:Mine", "there is no such sink"),
    ],
)
def test_what_is_no_sink(url: str | None, told: str) -> None:
    with pytest.raises(SinkUrlError, match=told):
        sink(url)


@pytest.mark.parametrize(
    ("url", "argument"),
    [
        ("my_sinks:Mine", ""),
        ("my_sinks:Mine:", ""),
        ("my_sinks:Mine:a:b c", "a:b c"),
        ("my_sinks:make:x", "x"),
    ],
)
def test_a_sink_of_the_users_gets_its_argument(url: str, argument: str) -> None:
    assert sink(url).argument == argument  # type: ignore[attr-defined]


def test_a_sink_by_its_shape_alone() -> None:
    assert type(sink("my_sinks:Other")).__name__ == "Other"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nothing_of_that_name:X", "nothing_of_that_name cannot be imported"),
        ("my_sinks:Missing", "my_sinks has no class Missing"),
        ("my_sinks:not_callable", "my_sinks has no class not_callable"),
        ("broken:X", "broken cannot be imported: SyntaxError"),
        ("needy:X", "needy cannot be imported: ModuleNotFoundError"),
        ("angry:X", "angry cannot be imported: ZeroDivisionError: boom"),
        ("my_sinks:Failing:x", r"Failing\('x'\) failed: ValueError: no x"),
        ("my_sinks:Proud", "failed: TypeError"),
        ("my_sinks:Nothing", "Nothing has no resume, write, flush, durable, close"),
        ("my_sinks:Lazy", "Lazy has no write, flush, durable"),
    ],
)
def test_a_sink_of_the_users_that_cannot_be_used(
    url: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(SinkLoadError, match=told):
        sink(url)
    if "Error" in told:
        assert "Traceback" in caplog.text  # for who wrote it


@pytest.mark.parametrize(
    "url",
    [
        "kafka://me:hunter2@broker",
        "kafka://me:hunter2@broker:9092,other:9092",
        "kafka://broker/?password=hunter2",
        "my_sinks:Failing:host=x password=hunter2",
        "my_sinks:Missing:host=x password=hunter2",
    ],
)
def test_a_sink_in_an_error_has_no_secret(url: str) -> None:
    with pytest.raises((SinkUrlError, SinkLoadError)) as caught:
        sink(url)
    assert "hunter2" not in str(caught.value)


def test_an_error_of_ours_from_a_users_sink_stays_what_it_is() -> None:
    with pytest.raises(OutputIOError):
        sink("my_sinks:Telling:x")


# The quarantine


def test_the_quarantine_lies_beside_the_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quarantine_of(Settings(sink=f"jsonl:{here}/out")) == (
        here / "out" / "_blueflow" / "quarantine"
    )
    assert quarantine_of(Settings(sink="stdout", quarantine_dir=here / "q")) == here / "q"
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    assert quarantine_of(Settings(sink="stdout")) == here / "state" / "blueflow" / "quarantine"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(here))
    assert quarantine_of(Settings(sink="a:B")) == (
        here / ".local" / "state" / "blueflow" / "quarantine"
    )


def test_a_recording_of_the_simulated_network_stays_marked(tmp_path: Path) -> None:
    recording = tmp_path / "sim.rec"
    recorder = Recorder(recording, Metrics(), simulated=True)
    recorder.add(b"frame")
    recorder.close()
    segment = tmp_path / "output" / "posts" / "hour=2026-07-04T14" / "000000000001.jsonl.zst"
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "SIMULATED-DATA.txt").touch()
    plain = tmp_path / "plain.rec"
    for path, simulated in ((recording, True), (segment, True), (plain, False)):
        source = source_of(Settings(source=f"replay:{path}"), Metrics())
        assert source.simulated is simulated, path


@pytest.mark.parametrize("url", ["jsonl:~nosuchuser/x", "jsonl:a\0b"])
def test_a_folder_that_cannot_be_is_a_bad_setting(url: str) -> None:
    with pytest.raises(SettingError, match="sink"):
        folder_of(Settings(sink=url), url)


def test_a_replay_of_nobodys_home_is_a_bad_setting() -> None:
    with pytest.raises(SettingError, match="source"):
        source("replay:~nosuchuser/x")


@pytest.fixture
def homeless(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of a user without a home."""

    def fail(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    return here


def test_without_a_home_the_quarantine_is_temporary(homeless: Path) -> None:
    folder = quarantine_of(Settings(sink="stdout"))
    assert folder.parent == homeless
    assert folder.stat().st_mode & 0o777 == 0o700
    assert quarantine_of(Settings(sink="stdout")) == folder  # so that its bound holds


def test_a_temporary_quarantine_is_not_in_a_folder_of_somebody_else(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = quarantine_of(Settings(sink="stdout"))
    user = os.getuid()
    taken.rename(homeless / f"{taken.name.removesuffix(str(user))}{user + 1}")
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    folder = quarantine_of(Settings(sink="stdout"))
    assert folder.parent == homeless
    assert not folder.name.endswith(f"-{user + 1}")


def test_without_any_folder_to_write_to_a_run_begins_all_the_same(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert quarantine_of(Settings(sink="stdout")).parent == homeless


def test_a_replay_with_an_impossible_name_is_told_when_it_is_read() -> None:
    assert not source(f"replay:{'x' * 300}").simulated
