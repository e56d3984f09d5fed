"""`python -m blueflow.produce` as a user runs it: output, signals, and an error per mistake."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

import blueflow
from blueflow.events import encode_lines
from blueflow.testing.contracts import contract_events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FRAMES = Path(__file__).parent / "data" / "firehose" / "frames.bin"
REPLAY = ["--source", f"replay:{FRAMES}"]
FIRST_SEQ = 31_527_015_322
OPERATIONS = 102
HEAVY = ("anyio", "asyncio", "libipld", "msgspec", "prometheus_client", "websockets", "zstandard")
WAIT_S = 25
EVENTS = contract_events("recorded", 60)

SINKS = """
import os
from blueflow.events import encode_lines
from blueflow.interfaces import Sink

class Lines(Sink):
    def __init__(self, argument):
        self.path, self.positions = argument, {}
    async def resume(self):
        return {}
    async def write(self, events, *, through):
        with open(self.path, "ab") as file:
            file.write(encode_lines(events))
        self.positions[through.source] = through
    async def flush(self): pass
    @property
    def durable(self): return self.positions
    async def close(self):
        with open(self.path, "ab") as file:
            file.write(b"closed\\n")

class Hanging(Lines):
    async def flush(self):
        import asyncio
        if os.path.exists(self.path + ".seen"):
            await asyncio.sleep(3600)
        open(self.path + ".seen", "w").close()  # the first flush anchors a new run
"""


class Ran:
    """A process that has ended."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out, err.decode()

    @property
    def events(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def logged(self) -> list[Any]:
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]

    @property
    def told(self) -> list[str]:
        """What is on stderr beside the log."""
        return [line for line in self.err.splitlines() if not line.startswith("{")]


class Command:
    """Runs `blueflow produce` in a folder of its own, without a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sinks_of_mine.py").write_text(SINKS)

    def start(self, *args: object, **more: Any) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(Path(blueflow.__file__).parents[1]),
            "PROMETHEUS_PORT": "0",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "blueflow.produce", *map(str, args)],
            cwd=self.folder,
            env=environment,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )

    def __call__(self, *args: object) -> Ran:
        with self.start(*args) as process:
            return finished(process)

    def stored(self, folder: str = "out") -> list[Any]:
        paths = sorted((self.folder / folder).glob("*/hour=*/*.jsonl.zst"))
        lines = [json.loads(line) for path in paths for line in unpacked(path).splitlines()]
        return sorted(lines, key=lambda line: (line["seq"], line["op_index"]))

    def snapshot(self) -> dict[str, bytes]:
        """Return every file below the folder but the code; a lock may name a new holder."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != "lock" and "__pycache__" not in path.parts
        }


def unpacked(path: Path) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()


def finished(process: subprocess.Popen[bytes]) -> Ran:
    try:
        out, err = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ran(process.returncode, out, err)


@pytest.fixture
def produce(tmp_path: Path) -> Command:
    return Command(tmp_path)


# What comes out


def test_every_operation_comes_out_once(produce: Command) -> None:
    run = produce(*REPLAY, "--sink", "stdout")
    assert run.code == 0
    assert len(run.events) == OPERATIONS
    identities = [(event["source"], event["seq"], event["op_index"]) for event in run.events]
    assert len(set(identities)) == OPERATIONS
    assert identities == sorted(identities)
    assert run.told == []
    assert run.logged[-1]["message"] == "finished"
    assert run.logged[-1]["events"] == OPERATIONS


def test_a_limit_a_collection_and_an_account(produce: Command) -> None:
    posts = produce(*REPLAY, "--sink", "stdout", "--collection", "app.bsky.feed.post")
    assert {event["commit"]["collection"] for event in posts.events} == {"app.bsky.feed.post"}
    assert len(posts.events) == 10
    limited = produce(*REPLAY, "--sink", "stdout", "--collection", "app.bsky.feed.*", "--limit", 7)
    assert len(limited.events) == 7
    assert {event["commit"]["collection"] for event in limited.events} >= {"app.bsky.feed.like"}
    did = posts.events[0]["did"]
    several = produce(
        *REPLAY, "--sink", "stdout", "--did", did,
        "--collection", "app.bsky.graph.*", "--collection", "app.bsky.feed.post",
    )  # fmt: skip
    assert {event["did"] for event in several.events} == {did}


def test_a_limit_of_a_pipe_is_exact(produce: Command) -> None:
    everything = produce(*REPLAY, "--sink", "stdout")
    repeated = Counter(event["seq"] for event in everything.events)
    within = next(n for n, e in enumerate(everything.events, 1) if repeated[e["seq"]] > 1)
    limited = produce(*REPLAY, "--sink", "stdout", "--limit", within)
    assert limited.events == everything.events[:within]


def test_a_folder_goes_on_where_it_ended(produce: Command) -> None:
    for expected in (40, 80, OPERATIONS, OPERATIONS):
        run = produce(*REPLAY, "--sink", "jsonl:out", "--limit", 40)
        assert run.code == 0
        assert expected <= len(produce.stored()) <= expected + 3
    stored = produce.stored()
    assert stored == produce(*REPLAY, "--sink", "stdout").events


def test_a_sink_of_mine_beside_me(produce: Command) -> None:
    run = produce(*REPLAY, "--sink", "sinks_of_mine:Lines:mine.jsonl")
    assert run.code == 0, run.err
    *lines, last = (produce.folder / "mine.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == produce(*REPLAY, "--sink", "stdout").events
    assert last == b"closed"


def test_what_cannot_be_read_is_in_the_quarantine_beside_the_output(produce: Command) -> None:
    recording = FRAMES.read_bytes()
    bad = b"\x00\x00\x00\x08no frame"
    (produce.folder / "bad.bin").write_bytes(bad + recording + bad + recording[:1000])
    run = produce("--source", "replay:bad.bin", "--sink", "jsonl:out")
    assert run.code == 0
    assert len(produce.stored()) == OPERATIONS
    quarantine = produce.folder / "out" / "_blueflow" / "quarantine" / "quarantine.jsonl"
    entries = [json.loads(line) for line in quarantine.read_bytes().splitlines()]
    assert [entry["reason"] for entry in entries] == ["frame"] * 3
    assert run.logged[-1]["quarantined"] == 3


def test_an_output_can_be_replayed(produce: Command) -> None:
    produce(*REPLAY, "--sink", "jsonl:out")
    segment = max((produce.folder / "out").glob("posts/*/*.zst"), key=lambda p: p.stat().st_size)
    posts = [json.loads(line) for line in unpacked(segment).splitlines()]
    assert len(posts) > 3
    run = produce("--source", f"replay:{segment}", "--sink", "stdout", "--limit", 3)
    assert run.events == posts[:3]
    again = produce("--source", f"replay:{segment}", "--sink", "jsonl:posts", "--limit", 3)
    assert again.code == 0, again.err
    again = produce("--source", f"replay:{segment}", "--sink", "jsonl:posts")
    assert again.code == 0, again.err
    assert produce.stored("posts") == posts


def test_a_reader_that_leaves_ends_the_run_quietly(produce: Command) -> None:
    (produce.folder / "many.jsonl").write_bytes(encode_lines(contract_events("x", 20_000)))
    with produce.start("--source", "replay:many.jsonl", "--sink", "stdout") as process:
        head = subprocess.run(
            ["/usr/bin/env", "head", "-n", "2"],
            stdin=process.stdout,
            capture_output=True,
            check=True,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None
        err = process.stderr.read().decode()
    assert len(head.stdout.splitlines()) == 2
    assert "Traceback" not in err
    assert "BF-" not in err


# Ends


@pytest.fixture
def slow(produce: Command) -> list[str]:
    """A recording that would take a day."""
    events = contract_events("recorded", 60, step_us=1_500_000_000)
    (produce.folder / "slow.jsonl").write_bytes(encode_lines(events))
    return ["--source", "replay:slow.jsonl", "--speed", "1"]


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(produce: Command, slow: list[str], number: signal.Signals) -> None:
    out = produce.folder / "out"
    with produce.start(*slow, "--speed", "1500", "--sink", "jsonl:out") as process:
        until(lambda: list(out.glob("_blueflow/log/*")))
        time.sleep(0.3)
        process.send_signal(number)
        run = finished(process)
    assert run.code == 0
    assert run.told == []
    stored = produce.stored()
    assert 0 < len(stored) < 80
    assert run.logged[-1]["events"] == len(stored)
    produce("--source", "replay:slow.jsonl", "--sink", "jsonl:out")
    assert len(produce.stored()) == len(contract_events("recorded", 60))


def test_a_time_drains(produce: Command, slow: list[str]) -> None:
    run = produce(*slow, "--sink", "jsonl:out", "--for", "0.3s")
    assert run.code == 0
    assert len(produce.stored()) == run.logged[-1]["events"] <= 1


@pytest.mark.parametrize("begin", ["signal", "time"])
def test_a_second_signal_forces(produce: Command, slow: list[str], begin: str) -> None:
    args = [*slow, "--sink", "sinks_of_mine:Hanging:x", "--drain", "1h"]
    args += ["--for", "0.2s"] if begin == "time" else []
    with produce.start(*args) as process:
        until((produce.folder / "x.seen").exists)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # one alone drains, also after --for
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        run = finished(process)
    assert run.code == 128 + signal.SIGTERM
    assert run.told == ["blueflow: second signal, ending at once"]


def test_one_request_to_stop_may_come_as_several_signals(produce: Command, slow: list[str]) -> None:
    """Ctrl-C reaches the whole group, and a parent passes it on; `timeout` signals twice."""
    with produce.start(*slow, "--sink", "jsonl:out") as process:
        until(lambda: list((produce.folder / "out").glob("_blueflow/log/*")))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            process.send_signal(number)
        run = finished(process)
    assert (run.code, run.told) == (0, [])


def test_a_run_outlives_its_stderr(produce: Command) -> None:
    (produce.folder / "some.jsonl").write_bytes(encode_lines(EVENTS))
    args = ["--source", "replay:some.jsonl", "--sink", "jsonl:out", "--log-format", "text"]
    with Path("/dev/full").open("wb") as full, produce.start(*args, stderr=full) as process:
        assert process.wait(WAIT_S) == 0
    assert len(produce.stored()) == len(EVENTS)


def test_a_stopped_terminal_holds_nothing_up(produce: Command, slow: list[str]) -> None:
    """Ctrl-S: progress, log lines and the summary wait for Ctrl-Q; the run and its end do not."""
    ours, theirs = pty.openpty()
    try:
        with produce.start(*slow, "--sink", "jsonl:out", stderr=theirs) as process:
            until(lambda: list((produce.folder / "out").glob("_blueflow/log/*")))
            termios.tcflow(theirs, termios.TCOOFF)
            time.sleep(1.5)  # a line of progress is due every second
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("closed", ["0", "1", "2"])
def test_a_closed_standard_stream_is_as_an_empty_one(produce: Command, closed: str) -> None:
    (produce.folder / "some.jsonl").write_bytes(encode_lines(EVENTS))
    close = partial(os.close, int(closed))
    args = ["--source", "replay:some.jsonl", "--sink", "jsonl:out"]
    with produce.start(*args, preexec_fn=close) as process:
        run = finished(process)
    assert (run.code, run.told) == (0, [])
    assert len(produce.stored()) == len(EVENTS)


def test_standard_output_that_is_closed_is_no_sink(produce: Command) -> None:
    (produce.folder / "some.jsonl").write_bytes(encode_lines(EVENTS))
    args = ["--source", "replay:some.jsonl", "--sink", "stdout"]
    with produce.start(*args, preexec_fn=partial(os.close, 1)) as process:
        run = finished(process)
    assert run.code == 2
    assert run.told[0].startswith("BF-002: sink (from standard output): it is closed.")


def test_a_drain_that_takes_too_long_is_told(produce: Command, slow: list[str]) -> None:
    args = [*slow, "--sink", "sinks_of_mine:Hanging:x", "--drain", "0.2s", "--for", "0.2s"]
    run = produce(*args)
    assert run.code == 69
    assert run.told[-1].startswith("BF-130: the sink was not done 0.2 s after the stop.")
    assert (produce.folder / "x").read_bytes().endswith(b"closed\n")


# Bad input: one line, the exit code, and nothing touched


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A folder with an output and files in the way."""
    produce = Command(tmp_path_factory.mktemp("taken"))
    produce(*REPLAY, "--sink", "jsonl:out", "--limit", 20)
    (produce.folder / "recorded.bin").write_bytes(b"mine")
    (produce.folder / "file").write_text("in the way")
    (produce.folder / "damaged.bin").write_bytes(b"\xff" * 100)
    (produce.folder / "other.jsonl").write_bytes(encode_lines(EVENTS))
    return produce


@pytest.fixture
def taken(prepared: Command) -> Iterator[Command]:
    """The same, with the proof that it was left as it was."""
    before = prepared.snapshot()
    assert len(before) > 5
    yield prepared
    assert prepared.snapshot() == before


UNREACHABLE = ["--source", "ws://127.0.0.1:9", "--connect-wait", "0.2s", "--source-name"]


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["--source", "ftp://host", "--sink", "stdout"], 2, "BF-101: cannot use source 'ftp://h"),
        (["--source", "bsky", "--sink", "stdout"], 2, "BF-101: cannot use source 'bsky'"),
        ([*UNREACHABLE, "x", "--sink", "stdout"], 69, "BF-102: no connection to ws://127.0.0.1:9"),
        (
            [*UNREACHABLE, "frames.bin", "--sink", "jsonl:out"], 69,
            "BF-102: no connection to ws://127.0.0.1:9",
        ),
        (
            [*UNREACHABLE, "x", "--sink", "stdout", "--record", "new.bin"], 69,
            "BF-102: no connection to ws://127.0.0.1:9",
        ),
        ([*UNREACHABLE, "other", "--sink", "jsonl:out"], 78, "BF-205: "),
        (["--source", "replay:other.jsonl", "--sink", "jsonl:out"], 78, "BF-205: "),
        (["--source", "sim", "--sink", "jsonl:out"], 78, "BF-205: "),
        (
            ["--source", "sim", "--sim-frames", "no/such", "--sink", "jsonl:new"], 2,
            "BF-002: sim_frames (from flag --sim-frames): no/such: No such file",
        ),
        (["--source", "replay:none", "--sink", "stdout"], 2, "BF-121: cannot replay none: No such"),
        (["--source", "replay:", "--sink", "stdout"], 2, "BF-121: cannot replay .: Is a directory"),
        (["--source", "replay:damaged.bin", "--sink", "stdout"], 2, "BF-121: cannot replay damag"),
        ([*REPLAY, "--sink", "jsonl:no/such"], 73, "BF-202: cannot write to no/such: No such file"),
        ([*REPLAY, "--sink", "jsonl:file"], 73, "BF-202: cannot write to file"),
        ([*REPLAY, "--sink", "jsonl:/proc/x"], 73, "BF-202: cannot write to /proc/x"),
        ([*REPLAY, "--sink", "jsonl:out", "--cursor", "oldest"], 2, "BF-120: cannot start at cu"),
        ([*REPLAY, "--sink", "jsonl:out", "--cursor", "5"], 2, "BF-120: cannot start at cursor"),
        ([*REPLAY, "--sink", "jsonl:out", "--cursor", "x"], 2, "BF-002: cursor (from flag --curs"),
        ([*REPLAY, "--sink", "stdout", "--limit", "0"], 2, "BF-002: limit (from flag --limit)"),
        ([*REPLAY, "--sink", "stdout", "--collection", "p"], 2, "BF-002: collections (from flag"),
        ([*REPLAY, "--sink", "stdout", "--config", "none"], 2, "BF-002: config (from flag --con"),
        ([*REPLAY], 2, "BF-201: no sink is set. Use --sink kafka://HOST:PORT"),
        ([*REPLAY, "--sink", "kafak://host"], 2, "BF-201: cannot use sink 'kafak://host'"),
        ([*REPLAY, "--sink", "nothing:X"], 2, "BF-207: cannot load sink 'nothing:X': nothing can"),
        ([*REPLAY, "--sink", "sinks_of_mine:X"], 2, "BF-207: cannot load sink 'sinks_of_mine:X'"),
        ([*REPLAY, "--sink", "stdout", "--record", "x"], 2, "BF-002: record (from flag --record)"),
        (
            ["--source", "ws://127.0.0.1:9", "--sink", "stdout", "--record", "recorded.bin"], 73,
            "BF-206: cannot record to recorded.bin: it exists",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_the_remedy_and_touches_nothing(
    taken: Command, args: list[str], code: int, line: str
) -> None:
    run = taken(*args)
    assert run.code == code, run.err
    assert run.out == b""
    assert len(run.told) == 1, run.err
    assert run.told[0].startswith(line)
    assert run.err.splitlines()[-1] == run.told[0]
    assert "Traceback" not in run.err
    assert run.told[0].count(". ") >= 1  # what happened, then what to do


def test_a_flag_that_does_not_exist_is_told_by_argparse(produce: Command) -> None:
    run = produce("--sinks", "stdout")
    assert run.code == 2
    assert "unrecognized arguments: --sinks" in run.err


def test_a_password_is_not_shown(produce: Command) -> None:
    run = produce("--source", "wsx://me:hunter2@host", "--sink", "stdout")
    assert run.code == 2
    assert "hunter2" not in run.err


# Help


def test_help_tells_the_flags_and_loads_nothing_heavy(produce: Command) -> None:
    code = (
        "import sys, contextlib\n"
        "from blueflow.produce import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        f"print(*sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(blueflow.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == "\n"
    for flag in ("--source", "--sink", "--collection", "--did", "--limit", "--for", "--record"):
        assert flag in run.stdout
    assert produce("--help").out.decode() == run.stdout
