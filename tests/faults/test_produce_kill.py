"""kill -9 of `blueflow produce` at seeded moments; the ledger of the simulated relay decides."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import sys
import time
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import zstandard

from blueflow.testing.ledger import Ledger
from blueflow.testing.relay import RelayProcess, spawn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENTS_PER_S = 500  # a third of what the relay can make on a core that it shares
KILLS, KILLS_FULL = 12, 50
POSITION = re.compile(rb'"source":"sim[^"]*","seq":(\d+)')
FAULTS = "close:1001@900,garbage@1500,close:1006@2600,duplicate@3000,slow@3900,reorder@4500"


def produce(relay: RelayProcess, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "blueflow.produce", "--source", relay.url),
        *("--source-name", "sim", "--sink", f"jsonl:{output}", "--prometheus-port", "0"),
        *("--commit-interval", "0.1s", "--commit-bytes-max", "64KiB", "--log-format", "json"),
    ]


def newest_record(output: Path) -> Path | None:
    return max((output / "_blueflow" / "log").glob("*.json"), default=None)


def durable_seq(output: Path) -> int:
    try:
        found = POSITION.findall((newest_record(output) or output).read_bytes())
    except (FileNotFoundError, IsADirectoryError):  # before the first commit; between two
        return 0
    return max(map(int, found), default=0)


def lines(output: Path) -> Iterator[dict[str, Any]]:
    """Every line of the output, in the order of the commits; within one by seq."""
    commits: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output.glob("*/hour=*/*.jsonl.zst")):
        with path.open("rb") as file:
            text = zstandard.ZstdDecompressor().stream_reader(file).read()
        events = [json.loads(line) for line in text.splitlines()]
        assert events, path
        commits.setdefault(path.name, []).extend(events)
    for _, events in sorted(commits.items()):
        yield from sorted(events, key=lambda event: (event["seq"], event["op_index"]))


async def killed_after(command: list[str], seconds: float, log: Path) -> int | None:
    """Run a command, kill it, and return its exit code."""
    with log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(*command, stderr=stderr)
        with anyio.move_on_after(seconds):
            return await process.wait()
        process.kill()
        return await process.wait()


@pytest.mark.faults
async def test_killed_at_any_moment_nothing_is_lost_or_twice(
    tmp_path: Path, *, full_campaign: bool
) -> None:
    kills = KILLS_FULL if full_campaign or os.environ.get("CI") else KILLS
    random = Random(20_261_123)
    output, ledger_file, log = tmp_path / "output", tmp_path / "ledger", tmp_path / "log"
    # From the start of Python on, to some commits behind the first one.
    start_s = median([await first_commit_s(tmp_path / f"start-{n}", log) for n in range(3)])
    moments = [start_s * random.uniform(0.3, 3.0) for _ in range(kills)]
    limit = math.ceil(EVENTS_PER_S * sum(moments) * 0.8) + 5000
    relay = spawn(
        rate=EVENTS_PER_S,
        limit=limit,
        retention=limit + 1,
        faults=FAULTS,
        ledger=ledger_file,
        seed=7,
    )
    async with relay:
        begun = 0
        for moment in moments:
            before = durable_seq(output) if output.exists() else 0
            code = await killed_after(produce(relay, output), moment, log)
            assert code == -signal.SIGKILL, log.read_text()[-2000:]
            begun += durable_seq(output) > before
        assert begun > kills / 6, (
            f"only {begun} of {kills} runs had committed when they were killed"
        )
        with log.open("ab") as stderr:
            told = log.stat().st_size
            last = await asyncio.create_subprocess_exec(*produce(relay, output), stderr=stderr)
            with anyio.fail_after(60):
                while not await done(ledger_file, output, limit):
                    assert last.returncode is None, log.read_text()[-2000:]
                    await anyio.sleep(0.2)
                up = b"connected to the relay"
                while up not in log.read_bytes()[told:]:  # before that a signal just ends it
                    await anyio.sleep(0.1)
            last.send_signal(signal.SIGTERM)
            with anyio.fail_after(15):
                assert await last.wait() == 0
    verdict = await anyio.to_thread.run_sync(judge, ledger_file, output)
    assert verdict.ok, str(verdict)
    assert verdict.demanded == verdict.delivered > limit
    fired = relay.summary["faults"]
    assert all(fired.values()), fired


async def first_commit_s(output: Path, log: Path) -> float:
    """Return how long a run takes, on this machine and now, until it has committed."""
    async with spawn(rate=EVENTS_PER_S, seed=8) as relay:
        began_s = time.monotonic()
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(*produce(relay, output), stderr=stderr)
        try:
            with anyio.fail_after(60):
                while not durable_seq(output):
                    assert process.returncode is None, "it ended"
                    await anyio.sleep(0.01)
            return time.monotonic() - began_s
        finally:
            process.kill()
            await process.wait()


async def done(ledger_file: Path, output: Path, limit: int) -> bool:
    """Whether the relay has issued everything and the output has the last of it."""

    def look() -> bool:
        tail = ledger_file.read_bytes()[-20_000:].splitlines(keepends=True)
        whole = [line for line in tail[1:] if b'"event"' in line and line.endswith(b"\n")]
        last = json.loads(whole[-1]) if whole else {}
        return last.get("index", 0) == limit - 1 and durable_seq(output) >= last["seq"]

    return await anyio.to_thread.run_sync(look)


def judge(ledger_file: Path, output: Path) -> Any:
    return Ledger.load(ledger_file).compare(lines(output))
