"""From a relay's websocket to a sink: blueflow beside the atproto SDK's async client.

Both read the same simulated relay (a process of its own, flat out, recorded frames over and over)
in turn, in one process. blueflow delivers wire JSON lines to a sink that drops them; the SDK's
handler does what its documentation shows: parse the message, decode the CAR, make the typed model
of every created record, and its JSON. The SDK compares no block with its hash, so the like-for-like
case is `--check none`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import math
import platform
import time
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from blueflow.events import encode_lines
from blueflow.pipeline import pump
from blueflow.source.firehose import FirehoseSource
from blueflow.testing.relay import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.decode import Check
    from blueflow.events import Event, Position

FRAMES = Path(__file__).parents[1] / "tests" / "data" / "firehose" / "frames.bin"
OUR_FRAMES, PEER_FRAMES = 30_000, 8_000


class LineSink:
    """Encodes lines and drops them."""

    keeps_position = False
    durable: Mapping[str, Position] = {}

    def __init__(self) -> None:
        self.bytes = 0

    async def resume(self) -> Mapping[str, Position]:
        """Nothing is kept."""
        return {}

    async def write(self, events: Sequence[Event], *, through: Position) -> None:  # noqa: ARG002
        """Encode."""
        self.bytes += len(encode_lines(events))

    async def flush(self) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is open."""


async def ours(url: str, check: Check) -> float:
    """Return frames per second."""
    source, sink = FirehoseSource(url, name="relay", check=check), LineSink()
    began_s = time.perf_counter()
    flow = await pump(source, sink, limit=OUR_FRAMES)
    rate = flow.frames / (time.perf_counter() - began_s)
    assert sink.bytes > 300 * OUR_FRAMES
    assert flow.rejected == 0
    return rate


async def sdk(url: str) -> float:
    """Return frames per second."""
    from atproto import (  # noqa: PLC0415 - a second
        CAR,
        AsyncFirehoseSubscribeReposClient,
        models,
        parse_subscribe_repos_message,
    )

    client = AsyncFirehoseSubscribeReposClient(base_uri=f"{url}/xrpc")
    frames = size = 0

    async def on_message(message: Any) -> None:
        nonlocal frames, size
        commit = parse_subscribe_repos_message(message)
        if isinstance(commit, models.ComAtprotoSyncSubscribeRepos.Commit):
            car = CAR.from_bytes(commit.blocks)
            for op in commit.ops:
                if op.action == "create" and op.cid:
                    raw = car.blocks.get(op.cid)
                    if raw:
                        record = models.get_or_create(raw, strict=False)
                        size += len(models.utils.get_model_as_json(record))
        frames += 1
        if frames == PEER_FRAMES:
            await client.stop()

    began_s = time.perf_counter()
    await client.start(on_message)
    rate = frames / (time.perf_counter() - began_s)
    assert size > 100 * PEER_FRAMES
    return rate


async def measure(rounds: int) -> list[dict[str, Any]]:
    """Run everything in turn and return the cases."""
    relay = spawn(frames=FRAMES, speed=math.inf, cycle=100, retention=40_000)
    rates: dict[str, list[float]] = {"none": [], "all": [], "sdk": []}
    async with relay:
        for number in range(rounds + 1):
            measured = {
                "none": await ours(relay.url, "none"),
                "all": await ours(relay.url, "all"),
                "sdk": await sdk(relay.url),
            }
            gc.collect()
            gc.freeze()
            if number:  # the first round warms up
                for name, rate in measured.items():
                    rates[name].append(rate)
    cases = {"relay_to_sink_vs_sdk": "none", "relay_to_sink_hashed_vs_sdk": "all"}
    return [
        {
            "case": case,
            "ours": round(median(rates[name]), 1),
            "peer": round(median(rates["sdk"]), 1),
            "unit": "frames/s",
            "ratio": round(
                median(a / b for a, b in zip(rates[name], rates["sdk"], strict=True)), 2
            ),
        }
        for case, name in cases.items()
    ]


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    cases = asyncio.run(measure(args.rounds))
    result = {
        "name": "websocket",
        "cases": cases,
        "versions": {
            name: version(name) for name in ("blueflow", "atproto", "websockets", "libipld")
        },
        "machine": f"Python {platform.python_version()}, {platform.machine()}, {cpu_count()} cores",
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
