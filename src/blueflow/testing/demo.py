"""`make demo`: the main job for a few seconds on the simulated network, without any network."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from shlex import join

from blueflow.progress import command_name
from blueflow.quantities import show_duration, show_rate

FRAMES = Path("tests/data/firehose/frames.bin")
STOP_S = 30.0  # a drain is bounded by 10 s; this is for a machine that is very slow


def main() -> int:
    """Run the demo and return the exit code of `blueflow produce`."""
    parser = argparse.ArgumentParser(prog="python -m blueflow.testing.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long [default: 20]")
    parser.add_argument("--directory", default="demo-data", help="output [default: demo-data]")
    parser.add_argument("--rate", type=float, default=1000.0, help="events per second")
    args = parser.parse_args()
    return asyncio.run(_demo(args.seconds, args.directory, args.rate, frames=FRAMES.exists()))


async def _demo(seconds: float, directory: str, rate: float, *, frames: bool) -> int:
    arguments = ["produce", "--source", "sim", "--sink", f"jsonl:{directory}"]
    arguments += ["--sim-rate", show_rate(rate), "--for", show_duration(seconds)]
    if frames:
        arguments += ["--sim-frames", str(FRAMES)]
    print(
        "The relay of this demo is SIMULATED: it runs on this machine and sends 100 frames\n"
        "recorded from the real network, then made-up traffic of the same shape.\n"
        f"\n$ {command_name()} {join(arguments)}\n",
        flush=True,
    )
    quiet = ["--log-format", "text", "--log-level", "warning"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "blueflow", *arguments, *quiet
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, process.send_signal, signal.SIGTERM)
    return await asyncio.wait_for(process.wait(), seconds + STOP_S)


if __name__ == "__main__":
    sys.exit(main())
