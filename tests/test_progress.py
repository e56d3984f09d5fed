from __future__ import annotations

import io
import json
import logging
import re
import shlex
import sys
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import blueflow.logs
import blueflow.progress
from blueflow.config import Settings
from blueflow.events import Position
from blueflow.logs import JsonFormatter
from blueflow.pipeline import Flow
from blueflow.progress import Progress, _size, for_people, summary
from blueflow.source.firehose import FirehoseSource
from blueflow.testing.memory import ListSource

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = ListSource([], name="relay.example", simulated=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def busy_flow() -> Flow:
    return Flow(
        frames=1000,
        frame_bytes=5_250_000,
        events=1234,
        rejected=2,
        by_dataset=Counter(posts=1000, likes=234),
        position=Position("relay.example", 31_527_015_421, 7),
        durable=Position("relay.example", 31_527_015_400, 7),
    )


def written_to(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Give progress another stderr; pytest itself sets that of the process anew in each phase."""
    there = SimpleNamespace(stderr=stream, executable=sys.executable)
    monkeypatch.setattr(blueflow.progress, "sys", there)
    monkeypatch.setattr(blueflow.logs, "sys", there)
    return stream


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return written_to(io.StringIO(), monkeypatch)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return written_to(Terminal(), monkeypatch)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TERMINAL_S", "_LINES_S", "_LOG_S"):
        monkeypatch.setattr(blueflow.progress, name, 0.001)


async def shown(progress: Progress, stream: io.StringIO) -> str:
    """Show progress until something is there."""
    with anyio.move_on_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.show)
            while stream.getvalue().count("relay") + stream.getvalue().count("events") < 2:
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
    progress.end()
    return stream.getvalue()


async def test_a_terminal_has_one_line_that_is_kept_up_to_date(terminal: io.StringIO) -> None:
    text = await shown(Progress(busy_flow(), SOURCE, Settings()), terminal)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    line = text.split("\r\x1b[2K")[-1]
    for part in ("1,234 events", "seq 31,527,015,421", "5.2 MB read", "0 reconnects"):
        assert part in line + text


async def test_a_line_fits_into_a_narrow_terminal(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueflow.progress, "_columns", lambda: 30)
    text = await shown(Progress(busy_flow(), SOURCE, Settings()), terminal)
    lines = text.removesuffix("\n").split("\r\x1b[2K")
    assert max(map(len, lines)) == 29


async def test_text_without_a_terminal_comes_in_lines(stderr: io.StringIO) -> None:
    text = await shown(Progress(busy_flow(), SOURCE, Settings(log_format="text")), stderr)
    assert "\x1b" not in text
    first = text.splitlines()[0]
    assert re.fullmatch(
        r"1,234 events  [\d,]+/s  seq 31,527,015,421  5\.2 MB read  0 reconnects  2 in quarantine",
        first,
    )


async def test_before_the_first_frame_it_says_so(stderr: io.StringIO) -> None:
    text = await shown(Progress(Flow(), SOURCE, Settings(log_format="text")), stderr)
    assert text.startswith("0 events  0/s  no seq yet  0 B read  0 reconnects\n")


async def test_a_log_has_records(caplog: pytest.LogCaptureFixture, stderr: io.StringIO) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(busy_flow(), SOURCE, Settings(log_format="json"))
    with anyio.move_on_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.show)
            while not caplog.records:
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
    progress.end()
    assert stderr.getvalue() == ""
    record = vars(caplog.records[0])
    assert record["events"] == 1234
    assert record["seq"] == 31_527_015_421
    assert record["durable_seq"] == 31_527_015_400
    assert json.loads(JsonFormatter().format(caplog.records[0]))["message"] == "progress"


async def test_how_far_behind_a_relay_is_shown(
    stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FirehoseSource("wss://relay.example")
    monkeypatch.setattr(FirehoseSource, "latest_time_us", 1_000_000_000)
    monkeypatch.setattr("time.time", lambda: 1012.5)
    source.reconnects = 3
    text = await shown(Progress(busy_flow(), source, Settings(log_format="text")), stderr)
    assert "behind 12.5 s" in text
    assert "3 reconnects" in text


@pytest.mark.parametrize(
    ("log_format", "tty", "people"),
    [
        ("text", False, True),
        ("text", True, True),
        ("json", True, False),
        ("json", False, False),
        ("auto", True, True),
        ("auto", False, False),
    ],
)
def test_who_reads(
    log_format: str, monkeypatch: pytest.MonkeyPatch, *, tty: bool, people: bool
) -> None:
    written_to(Terminal() if tty else io.StringIO(), monkeypatch)
    assert for_people(Settings(log_format=log_format)) is people


# The summary


def told(stream: io.StringIO, flow: Flow, made_by: Any = SOURCE, **settings: Any) -> str:
    summary(flow, Settings(log_format="text", **settings), made_by, 10.0)
    return stream.getvalue()


def test_the_summary_of_a_pipe(stderr: io.StringIO) -> None:
    assert told(stderr, busy_flow(), sink="stdout").splitlines() == [
        "1,234 events from relay.example in 10.0 s (123/s): 1,000 posts, 234 likes",
        "1,000 frames, 5.2 MB read, 0 reconnects, 2 in quarantine",
    ]


def test_the_summary_of_nothing(stderr: io.StringIO) -> None:
    lines = told(stderr, Flow(), sink="stdout").splitlines()
    assert lines[0] == "0 events from relay.example in 10.0 s (0/s)"


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 600)
    return folder


def test_the_summary_of_a_folder_tells_what_is_there_and_how_to_look(
    stderr: io.StringIO, tmp_path: Path
) -> None:
    folder = folder_with(
        tmp_path / "my data",
        "posts/hour=2026-07-04T16/000000000001.jsonl.zst",
        "posts/hour=2026-07-04T17/000000000002.jsonl.zst",
        "likes/hour=2026-07-04T16/000000000001.jsonl.zst",
        "_blueflow/log/000000000002",
    )
    lines = told(stderr, busy_flow(), sink=f"jsonl:{folder}").splitlines()
    assert lines[2] == f"3 segments, 1.8 kB, in {folder}/<dataset>/hour=…/"
    assert lines[3].startswith("durable to seq 31,527,015,400;")
    command = shlex.split(lines[5])
    newest = folder / "posts/hour=2026-07-04T17/000000000002.jsonl.zst"
    assert command[command.index("--source") + 1] == f"replay:{newest}"
    assert newest.exists()


def test_a_long_history_is_not_counted_to_its_end(
    stderr: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueflow.progress, "_SEGMENTS_MAX", 5)
    names = [f"likes/hour=2026-07-04T{hour:02}/1.jsonl.zst" for hour in range(24)]
    folder = folder_with(tmp_path / "out", *names)
    assert "at least 5 segments" in told(stderr, busy_flow(), sink=f"jsonl:{folder}")


def test_a_simulated_run_says_so_and_how_to_go_live(stderr: io.StringIO) -> None:
    source = ListSource([], name="sim", simulated=True)
    text = told(stderr, busy_flow(), source, sink="stdout", source="sim")
    assert "from the simulated network" in text
    assert "all of it is simulated; go live" in text


def test_a_simulated_run_into_kafka_goes_live_there_beside_its_own_topics(
    stderr: io.StringIO,
) -> None:
    source = ListSource([], name="sim", simulated=True)
    text = told(stderr, busy_flow(), source, sink="kafka://a:1", source="sim", topic_prefix="sim.")
    assert "--sink kafka://a:1 --topic-prefix live." in text
    look = 'blueflow.kafka.read("posts", connection="a:1", until_end=True, topic_prefix="sim.")'
    assert look in text
    assert "import blueflow.kafka\n" in text


def test_a_live_run_does_not(stderr: io.StringIO) -> None:
    assert "simulated" not in told(stderr, busy_flow(), sink="stdout")


@pytest.mark.usefixtures("stderr")
def test_a_log_gets_the_summary_as_a_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    summary(busy_flow(), Settings(log_format="json", sink="stdout"), SOURCE, 10.0)
    (record,) = caplog.records
    assert record.getMessage() == "finished"
    line = json.loads(JsonFormatter().format(record))
    assert (line["events_posts"], line["events_likes"]) == (1000, 234)
    assert vars(record)["elapsed_s"] == 10.0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (5e9, "5.0 GB"),
        (7.5e12, "7.5 TB"),
        (1e18, "1000000.0 TB"),
    ],
)
def test_sizes(size: float, text: str) -> None:
    assert _size(size) == text
