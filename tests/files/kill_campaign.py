"""Kills a writer before each change it makes to the disk; run by test_jsonl_kill.py.

    python kill_campaign.py DIRECTORY EVERY

EVERY is 1 for a kill before each change, 4 for a kill before each fourth. Each life is a forked
process, so that a kill costs milliseconds. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import zstandard

from blueflow.events import Position, encode_event
from blueflow.files.jsonl import JsonlSink
from blueflow.testing.contracts import contract_events
from blueflow.testing.watcheddisk import WatchedDisk

SOURCE = "kill.example"
EVENTS = contract_events(SOURCE, 12, step_us=200_000_000)  # of all kinds
COMMITS_AT_SEQ = (4, 8, 12)


def main(directory: Path, every: int) -> None:
    gc.freeze()  # forks then share the memory of what was imported
    swept = 0
    for kill_at in range(1, 10_000, every):
        folder = directory / str(kill_at)
        killed = live(folder, kill_at)
        live(folder, 0)
        check(folder)
        if not killed:
            break
        swept += 1
    chance, folder, lives = random.Random(40), directory / "many", 0
    while live(folder, chance.randint(1, 60)):  # the same folder through kill after kill
        lives += 1
    check(folder)
    sys.stdout.write(json.dumps({"kills_swept": swept, "kills_in_one_folder": lives}))


def live(folder: Path, kill_at: int) -> bool:
    """Write what is missing in a process of its own; return whether it was killed."""
    child = os.fork()
    if child == 0:
        asyncio.run(write_the_rest(folder, kill_at))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise SystemExit(f"a life ended with {status}")
    return False


async def write_the_rest(folder: Path, kill_at: int) -> None:
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    disk = WatchedDisk(step, synced=False)
    sink = JsonlSink(folder, origin_source=SOURCE, simulated=True, disk=disk)
    positions = await sink.resume()
    after = positions[SOURCE].seq if positions else 0
    for seq in COMMITS_AT_SEQ:
        batch = [event for event in EVENTS if after < event.seq <= seq]
        if batch:
            await sink.write(batch, through=Position(SOURCE, seq))
            await sink.flush()
        after = max(after, seq)
    await sink.close()


def check(folder: Path) -> None:
    stored = Counter(
        line
        for path in folder.glob("*/hour=*/*.jsonl.zst")
        for line in zstandard.ZstdDecompressor()
        .stream_reader(path.read_bytes())
        .read()
        .splitlines()
    )
    if stored != Counter(map(encode_event, EVENTS)):
        raise SystemExit(f"{folder}: {stored.total()} events instead of {len(EVENTS)}")
    if list((folder / "_blueflow" / "hidden").iterdir()):
        raise SystemExit(f"{folder}: hidden files are left")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
