from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from math import inf
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from libipld import decode_dag_cbor_multi
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from blueflow.errors import Exit, SimulatedRelayError
from blueflow.testing.ledger import Ledger
from blueflow.testing.network import FIRST_SEQ
from blueflow.testing.relay import RelayProcess, spawn
from blueflow.wire.recording import pack

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_S = 20
COMMAND = (sys.executable, "-m", "blueflow.testing.relay")
SMALL: dict[str, Any] = {"accounts": 20, "records": 50}


async def receive(relay: RelayProcess, count: int, cursor: int | None = 0) -> list[Any]:
    query = "" if cursor is None else f"?cursor={cursor}"
    url = f"{relay.url}/xrpc/com.atproto.sync.subscribeRepos{query}"
    with anyio.fail_after(PATIENCE_S):
        async with connect(url, max_size=None, max_queue=None) as connection:
            return [await connection.recv() for _ in range(count)]


async def receive_all(url: str) -> None:
    async with connect(url, max_size=None) as connection:
        while True:
            await connection.recv()


async def test_a_child_serves_the_recording_and_then_the_network_that_goes_on_from_it(
    tmp_path: Path, data_folder: Path, recorded_frames: list[bytes]
) -> None:
    path = tmp_path / "ledger.jsonl"
    frames = data_folder / "firehose/frames.bin"
    async with spawn(frames=frames, speed=inf, limit=150, ledger=path, **SMALL) as relay:
        messages = await receive(relay, 150)
    assert messages[:100] == recorded_frames
    bodies = [decode_dag_cbor_multi(message)[1] for message in messages]
    assert [body["seq"] for body in bodies] == list(range(31_527_015_322, 31_527_015_472))
    assert {body["time"][:18] for body in bodies} == {"2026-07-04T14:38:0"}
    assert relay.summary["issued"] == relay.summary["sent_events"] == 150
    assert {entry.seq for entry in Ledger.load(path)} == {body["seq"] for body in bodies}


async def test_two_children_with_one_seed_serve_the_same() -> None:
    served = []
    for _ in range(2):
        async with spawn(seed=5, speed=inf, limit=30, **SMALL) as relay:
            served.append(await receive(relay, 30))
    assert served[0] == served[1]


async def test_a_later_run_goes_on_behind_an_earlier_one() -> None:
    last = FIRST_SEQ + 41
    options: dict[str, Any] = {
        "first_seq": last + 1,
        "start_time": "2026-08-01T00:00:00Z",
        "limit": 10,
    }
    async with spawn(speed=inf, **SMALL, **options) as relay:
        bodies = [decode_dag_cbor_multi(m)[1] for m in await receive(relay, 10, cursor=last)]
    assert [body["seq"] for body in bodies] == list(range(last + 1, last + 11))
    assert all(body["time"].startswith(("2026-07-31T23:59:59", "2026-08-01")) for body in bodies)


async def test_faults_that_fired_stand_in_the_summary_and_in_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    faults = "duplicate@3,close@900"
    async with spawn(speed=inf, limit=10, faults=faults, ledger=path, **SMALL) as relay:
        await receive(relay, 11)
    assert relay.summary["faults"] == {"duplicate@3": 1, "close:1001@900": 0}
    assert [fired.fault for fired in Ledger.load(path).fired] == ["duplicate@3"]


async def test_a_child_that_cannot_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    relay = spawn(faults="meteor@5")
    with pytest.raises(SimulatedRelayError, match=r"did not start \(exit code 2\)"):
        await relay.start()
    assert "BF-002: faults (from the plan): no fault 'meteor'" in capfd.readouterr().err
    assert relay.pid == 0


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "exit code 0"),
        ("exit 3", "exit code 3"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("exec sleep 60", "it said nothing for 0.5 s"),
        (None, "python: No such file or directory"),
    ],
    ids=["ends", "fails", "killed", "hangs", "missing"],
)
async def test_a_child_that_did_not_start_is_told_with_the_true_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    relay = spawn(start_timeout_s=0.5 if "0.5" in reason else PATIENCE_S, stop_timeout_s=0.1)
    with pytest.raises(SimulatedRelayError) as caught:
        await relay.start()
    assert str(caught.value).startswith("BF-104: the simulated relay did not start (")
    assert f"{reason})." in str(caught.value)
    assert relay.pid == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_child_that_ends_says_how(number: signal.Signals) -> None:
    async with spawn(**SMALL) as relay:
        os.kill(relay.pid, number)
        with anyio.fail_after(PATIENCE_S):
            how = await relay.ended()
    assert how == ("killed by SIGKILL" if number == signal.SIGKILL else "exit code 0")


async def test_stopping_twice_is_stopping_once() -> None:
    relay = spawn(**SMALL)
    await relay.start()
    assert relay.pid
    summary = await relay.stop()
    assert await relay.stop() == summary
    assert summary["issued"] == 0


@pytest.mark.parametrize("speed", ["max", "1"])
async def test_a_recording_that_breaks_off_into_garbage_ends_the_relay(
    tmp_path: Path, recorded_frames: list[bytes], speed: str
) -> None:
    path = tmp_path / "frames.bin"
    path.write_bytes(b"".join(map(pack, recorded_frames[:9])) + b"\xff" * 9)
    with start(f"--frames={path}", f"--speed={speed}", stderr=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert (output, process.returncode) == (b"", Exit.USAGE)
    assert errors.startswith(b"BF-121")


async def test_a_disk_that_fills_up_ends_the_relay() -> None:
    with start("--ledger=/dev/full", "--records=50", stderr=subprocess.PIPE) as process:
        url = json.loads(line_of(process))["url"]
        async with connect(f"{url}/xrpc/com.atproto.sync.subscribeRepos") as connection:
            with anyio.fail_after(PATIENCE_S), pytest.raises(ConnectionClosed):
                await connection.recv()
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == Exit.UNAVAILABLE
    assert json.loads(output)["sent_events"] == 0
    assert b"No space left on device" in errors


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_command_cleanly(signum: int) -> None:
    with start("--records=50") as process:
        assert json.loads(line_of(process))["url"].startswith("ws://127.0.0.1:")
        process.send_signal(signum)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert json.loads(output)["issued"] == 0
    assert process.returncode == Exit.OK


def test_the_command_ends_with_its_parent() -> None:
    with start("--exit-with-parent", "--records=50", stdin=subprocess.PIPE) as process:
        line_of(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == Exit.OK


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--speed=fast"], Exit.USAGE, "--speed"),
        (["--rate=0"], Exit.USAGE, "not above 0"),
        (["--faults=close:7@1"], Exit.USAGE, "BF-002"),
        (["--host=256.256.256.256"], Exit.UNAVAILABLE, "blueflow.testing.relay: "),
        (["--frames=/proc/none/frames"], Exit.UNAVAILABLE, "blueflow.testing.relay: "),
        ([f"--frames={__file__}"], Exit.USAGE, "BF-121"),
        (["--ledger=/proc/none/ledger"], Exit.UNAVAILABLE, "blueflow.testing.relay: "),
    ],
)
def test_bad_arguments_are_told(arguments: list[str], code: int, said: str) -> None:
    with start(*arguments, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert said in errors.decode()
    assert "Traceback" not in errors.decode()


async def test_a_recording_that_goes_bad_is_told(tmp_path: Path, data_folder: Path) -> None:
    """Only the first frame is looked at before the relay listens."""
    good = (data_folder / "firehose/frames.bin").read_bytes()
    (tmp_path / "frames").write_bytes(good + pack(b"hello"))
    arguments = [f"--frames={tmp_path / 'frames'}", "--rate=100000"]
    with start(*arguments, stderr=subprocess.PIPE) as process:
        url = json.loads(line_of(process))["url"] + "/xrpc/com.atproto.sync.subscribeRepos"
        with anyio.fail_after(PATIENCE_S), pytest.raises(ConnectionClosed):
            await receive_all(url)
        _, errors = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    assert process.returncode == Exit.USAGE
    assert "BF-121" in errors.decode()
    assert "behind frame 100" in errors.decode()
    assert "Traceback" not in errors.decode()


def test_the_help_names_every_fault() -> None:
    output = subprocess.run([*COMMAND, "--help"], env=ENVIRONMENT, capture_output=True, check=True)
    assert b"slow" in output.stdout
    assert b"unknown-type" in output.stdout


ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, env=ENVIRONMENT, **options
    )


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()
