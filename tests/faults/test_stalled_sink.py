"""A sink that stalls at 2,000 events/s: memory stays bounded, and then everything arrives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import anyio
import psutil
import pytest

from blueflow.testing.ledger import Ledger
from blueflow.testing.relay import spawn

RATE = 2000
STALL_S, STALL_FULL_S = 20.0, 60.0
RESIDENT_MAX = 150_000_000
HERE = Path(__file__).parent


@pytest.mark.faults
async def test_memory_is_bounded_while_the_sink_stalls(
    tmp_path: Path, *, full_campaign: bool
) -> None:
    stall_s = STALL_FULL_S if full_campaign else STALL_S
    limit = int(RATE * (stall_s + 5))
    output, ledger_file = tmp_path / "lines.jsonl", tmp_path / "ledger"
    relay = spawn(
        rate=RATE, limit=limit, retention=limit + 1, cycle=4000, ledger=ledger_file, seed=3
    )
    async with relay:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "blueflow.produce", "--source", relay.url),
            *("--source-name", "sim", "--prometheus-port", "0"),
            *("--sink", f"stalling_sink:StallingSink:{stall_s}{output}"),
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
            stderr=asyncio.subprocess.DEVNULL,
        )
        peak = 0
        try:
            with anyio.fail_after(stall_s * 3 + 60):
                while not await _done(output, limit):
                    assert process.returncode is None
                    peak = max(peak, _resident(process.pid))
                    await anyio.sleep(0.25)
            process.send_signal(signal.SIGTERM)
            with anyio.fail_after(15):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:  # the test failed: nobody else would end it
                process.kill()
                await process.wait()
    events = [json.loads(line) for line in output.read_bytes().splitlines()]
    stalls = [event["stalled_s"] for event in events if "stalled_s" in event]
    assert len(stalls) == 1, stalls
    assert stalls[0] >= stall_s
    assert relay.summary["kicked"] >= 1, "the relay was to give the consumer up"
    verdict = Ledger.load(ledger_file).compare(e for e in events if "seq" in e)
    assert verdict.ok, str(verdict)
    assert verdict.demanded >= limit
    assert 10_000_000 < peak < RESIDENT_MAX, f"{peak:,} bytes resident"


async def _done(output: Path, limit: int) -> bool:
    def look() -> bool:
        if not output.exists() or output.stat().st_size < limit * 200:
            return False
        with output.open("rb") as file:
            whole = (line for line in file if line.endswith(b"\n"))  # the last may be half-written
            return len({json.loads(x)["seq"] for x in whole if b'"seq"' in x}) >= limit

    return await anyio.to_thread.run_sync(look)


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0
