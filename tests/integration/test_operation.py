"""`blueflow produce` as an operator meets it: metrics, health, logs and signals, live."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAIT_S = 20.0


class Process:
    """One `blueflow produce` on the simulated network."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "blueflow.produce", "--source", "sim"),
                    *("--sink", f"jsonl:{self.output}", "--commit-interval", "0.2s"),
                    *("--prometheus-port", str(self.port)),
                ],
                stderr=stderr,
            )

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            with error:
                return error.code, error.read()
        except URLError:
            return 0, b""

    def wait_for(self, path: str, expected: bytes) -> bytes:
        deadline = time.monotonic() + WAIT_S
        while True:
            status, body = self.get(path)
            if status == 200 and expected in body:
                return body
            assert time.monotonic() < deadline, (status, body[-2000:], self.log.read_text())
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    @property
    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait(10)


@pytest.mark.needs("promtool")
def test_promtool_has_nothing_to_say_about_the_live_metrics(running: Process) -> None:
    running.wait_for("/readyz", b"durable")
    body = running.wait_for("/metrics", b'blueflow_sink_commits_total{outcome="ok"} 2')
    said = subprocess.run(
        ["promtool", "check", "metrics"],  # noqa: S607 - where the fixture found it
        input=body,
        capture_output=True,
        check=False,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, b"", b"")


def test_health_metrics_and_logs_of_a_live_process(running: Process) -> None:
    ready = json.loads(running.wait_for("/readyz", b"durable"))
    assert all(check["ok"] for check in ready["checks"].values()), ready
    assert running.get("/livez")[0] == 200
    running.wait_for("/metrics", b'blueflow_sink_commits_total{outcome="ok"} 1')
    running.wait_for("/metrics", b"blueflow_source_connected 1.0")
    metrics = dict(
        line.rsplit(" ", 1)
        for line in running.get("/metrics")[1].decode().splitlines()
        if not line.startswith("#")
    )
    assert float(metrics["blueflow_source_last_seq"]) > 2**32
    assert float(metrics["blueflow_source_lag_seconds"]) < 60
    assert float(
        metrics['blueflow_pipeline_operations_total{collection="like",operation="create"}']
    )
    assert float(metrics["blueflow_sink_durable_seq"]) <= float(metrics["blueflow_source_last_seq"])
    connected = [r for r in running.records if r["message"] == "connected to the relay"]
    assert connected[0]["connection"] == "c1"


def test_sigterm_drains_and_exits_0(running: Process) -> None:
    running.wait_for("/readyz", b"durable")
    running.wait_for("/metrics", b'blueflow_sink_commits_total{outcome="ok"} 1')
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(15) == 0
    finished = running.records[-1]
    assert finished["message"] == "finished"
    assert finished["durable_seq"] == finished["seq"]
    assert (running.output / "SIMULATED-DATA.txt").exists()


def test_the_simulated_relay_ends_with_its_parent(running: Process) -> None:
    running.wait_for("/readyz", b"durable")
    children = psutil.Process(running.process.pid).children()
    assert children
    running.process.kill()
    running.process.wait(10)
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert not alive


def test_a_simulated_relay_that_is_killed_ends_the_run_with_the_reason(running: Process) -> None:
    running.wait_for("/readyz", b"durable")
    (child,) = psutil.Process(running.process.pid).children()
    child.kill()
    assert running.process.wait(WAIT_S) == 69
    last = running.log.read_bytes().splitlines()[-1]
    assert last.startswith(b"BF-104: the simulated relay has ended (killed by SIGKILL).")
