"""A child process that stands for a server."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest

from blueflow.errors import InvariantError, ServiceError
from blueflow.testing.services.child import Child, free_ports, is_free

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_S = 15
PARENT = """
import os, pathlib, signal, sys
from blueflow.testing.services.child import Child
child = Child("sleep", pathlib.Path(sys.argv[1]))
child.start(("sleep", "1000"))
print(child.pid, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_its_output_is_in_the_log_and_the_tail_is_of_the_last_start(tmp_path: Path) -> None:
    child = Child("shell", tmp_path / "log")
    assert child.tail() == ""
    for word in ("first", "second"):
        child.start(("sh", "-c", f"echo {word}; echo; echo {word} end >&2; exit 3"))
        with anyio.fail_after(PATIENCE_S):
            assert await child.ended() == "exit code 3"
        assert not child.running
        assert child.pid == 0
    assert child.tail() == "second / second end"
    log = (tmp_path / "log").read_text()
    assert log == "first\n\nfirst end\nsecond\n\nsecond end\n"


async def test_a_child_that_does_not_stop_is_killed_also_when_suspended(tmp_path: Path) -> None:
    child = Child("shell", tmp_path / "log")
    child.start(("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"))
    with anyio.fail_after(PATIENCE_S):
        while child.tail() != "ready":
            await anyio.sleep(0.01)
        child.suspend()
        process = psutil.Process(child.pid)
        while process.status() != psutil.STATUS_STOPPED:
            await anyio.sleep(0.01)
        await child.stop(timeout_s=0.2)
        assert await child.ended() == "signal 9"
    assert not psutil.pid_exists(process.pid)
    await child.stop(timeout_s=0.2)  # again: nothing to do


async def test_a_suspended_child_that_listens_to_signals_stops(tmp_path: Path) -> None:
    child = Child("sleep", tmp_path / "log")
    child.start(("sleep", "1000"))
    child.suspend()
    with anyio.fail_after(PATIENCE_S):
        await child.stop(timeout_s=PATIENCE_S)
        assert await child.ended() == "signal 15"


@pytest.mark.parametrize("end", ["killed", "returned"])
async def test_a_child_ends_with_its_parent(tmp_path: Path, end: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(tmp_path / "log"), end]
    with anyio.fail_after(PATIENCE_S):
        parent = await anyio.run_process(command, check=False)
    assert parent.returncode == (-9 if end == "killed" else 0), parent.stderr
    pid = int(parent.stdout)
    with anyio.fail_after(PATIENCE_S):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await anyio.sleep(0.01)


async def test_what_cannot_run_is_a_typed_error_and_a_second_start_a_bug(tmp_path: Path) -> None:
    child = Child("Nothing", tmp_path / "log")
    with pytest.raises(InvariantError):
        child.suspend()
    with pytest.raises(ServiceError, match="BF-105: Nothing: cannot be run"):
        child.start((str(tmp_path / "missing"),))
    assert not child.running
    child.start(("sleep", "1000"))
    with pytest.raises(InvariantError):
        child.start(("sleep", "1000"))
    await child.kill()


def test_ports_are_different_and_one_that_is_listened_on_is_not_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not is_free(ports[0])
    assert is_free(ports[0])
