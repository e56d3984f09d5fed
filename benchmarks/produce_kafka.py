"""From a relay into Kafka: `python -m blueflow.produce` beside the atproto SDK with aiokafka.

Both are processes of their own, read the same simulated relay (recorded frames over and over) and
write to the same broker. blueflow compares every block with its hash and writes exactly once, at
its default settings. The peer is what one writes with the two libraries: the SDK's async client
and typed models as in its documentation, a JSON text for every operation, and `send()` of an
idempotent producer with zstd; it compares no hashes and stores no position.

`sustained` and `cpu_per_event` are flat out: events that a read_committed consumer can read, and
the client's user and system time, between two moments of a run. `latency_RATE` is the p99 of the
seconds from when the relay gave a frame out (a bystander receives every frame as well) to when a
read_committed consumer had the event; its `ratio` is above 1 where ours is shorter. A transaction
is readable when it is committed, every 0.3 s by default, so ours is not shorter than that while
the peer keeps up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import psutil
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from _kafka import (
    PARTITIONS,
    Reader,
    broker,
    delete_topics,
    machine_is_busy,
    make_topics,
    offsets,
)
from blueflow.kafka.topicnames import TopicNames
from blueflow.testing.relay import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FRAMES = Path(__file__).parents[1] / "tests" / "data" / "firehose" / "frames.bin"
PATH: Final = "/xrpc/com.atproto.sync.subscribeRepos"
OURS: Final = "ours"
PEER: Final = "peer"
SIDES: Final = (OURS, PEER)
ROUND_S: Final = 5.0
RATES: Final = (1_000, 2_000)
LATENCY_S: Final = 7.0  # of events whose latency is taken
WARM_S: Final = 1.0  # at the beginning, left out
START_S: Final = 20.0
CATCH_UP_S: Final = 25.0
MIB: Final = 1024 * 1024
EVENTS_S_MIN: Final = 20_000
CPU_US_MAX: Final = 50
LATENCY_S_MAX: Final = 1


class Sample(NamedTuple):
    """A client at one moment."""

    at_s: float
    cpu_s: float
    offsets: int  # of all event topics, as far as they can be read
    memory: int


class Run(NamedTuple):
    """What one side did flat out."""

    events_s: float
    cpu_us: float
    memory: int


def flat_out(samples: Sequence[Sample], events: int) -> Run:
    """Judge a run by its first and last sample that saw another offset.

    Args:
        samples: in order of time.
        events: how many there were in the end, at the offsets of the last sample. Offsets count
            the marks of transactions too.
    """
    moved = [new for old, new in pairwise(samples) if new.offsets != old.offsets]
    assert len(moved) > 1, "nothing can be read: the client wrote nothing"
    first, last = moved[0], moved[-1]
    count = (last.offsets - first.offsets) * events / samples[-1].offsets
    cpu_us = (last.cpu_s - first.cpu_s) / count * 1e6
    return Run(count / (last.at_s - first.at_s), cpu_us, max(one.memory for one in samples))


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """Return p50 and p99."""
    assert len(latencies) >= 100, f"{len(latencies)} latencies are too few"  # noqa: PLR2004
    cuts = quantiles(latencies, n=100, method="inclusive")
    return cuts[49], cuts[98]


class Client:
    """One side as a process, with topics of its own."""

    def __init__(self, side: str, bootstrap: str, url: str) -> None:
        self.prefix = f"benchmark-{secrets.token_hex(4)}."
        self.topics = TopicNames(self.prefix).events
        self._bootstrap = bootstrap
        self._admin = AdminClient({"bootstrap.servers": bootstrap})
        # They keep all: recorded frames are old, and would be deleted at once.
        make_topics(bootstrap, self.topics)
        command = [sys.executable, __file__, "--peer", url, bootstrap, self.prefix]
        if side == OURS:
            command = [
                *(sys.executable, "-m", "blueflow.produce", "--source", url),
                *("--source-name", "relay", "--sink", f"kafka://{bootstrap}"),
                *("--topic-prefix", self.prefix, "--kafka-retention", "forever"),
                *("--prometheus-port", "0", "--log-level", "warning"),
            ]
        self._process = subprocess.Popen(
            command,
        )
        self._watched = psutil.Process(self._process.pid)

    def sample(self) -> Sample:
        """Look at it."""
        assert self._process.poll() is None, f"a client ended with {self._process.returncode}"
        spent = self._watched.cpu_times()
        memory = self._watched.memory_info().rss
        return Sample(time.monotonic(), spent.user + spent.system, self.readable(), memory)

    def stop(self) -> None:
        """End it; what it has taken is written."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def delete(self) -> None:
        """Delete its topics."""
        delete_topics(self._bootstrap, self.prefix)

    def readable(self) -> int:
        """Return the sum of the offsets up to which its topics can be read_committed."""
        return offsets(self._admin, self.topics)


async def run_flat_out(side: str, bootstrap: str, url: str) -> Run:
    """Let one side write for some seconds."""
    client = Client(side, bootstrap, url)
    try:
        samples = [client.sample()]
        began_s = time.monotonic()
        while len(samples) == 1 or samples[-1].offsets == samples[0].offsets:
            assert time.monotonic() - began_s < START_S, f"{side} wrote nothing"
            await asyncio.sleep(0.1)
            samples.append(client.sample())
        began_s = time.monotonic()
        while time.monotonic() - began_s < ROUND_S:
            await asyncio.sleep(0.25)
            samples.append(client.sample())
        client.stop()
        events = await asyncio.to_thread(Reader(bootstrap, client.topics).count)
        last = samples[-1]._replace(offsets=client.readable())
        return flat_out_of(samples, last, events)
    finally:
        client.stop()
        client.delete()


def flat_out_of(samples: Sequence[Sample], end: Sample, events: int) -> Run:
    """Judge a run whose offsets at its end, `end`, are so many events."""
    return flat_out(samples, round(events * samples[-1].offsets / end.offsets))


class Bystander:
    """Receives every frame that the relay gives out, in this process, and notes when."""

    def __init__(self, url: str) -> None:
        self.received_s: dict[int, float] = {}
        self.began = threading.Event()
        self._url = url
        self._thread = threading.Thread(target=lambda: asyncio.run(self._receive()), daemon=True)

    def start(self) -> None:
        """Begin; the relay issues from here on."""
        self._thread.start()
        assert self.began.wait(START_S), "the relay gives nothing out"

    async def _receive(self) -> None:
        from websockets.asyncio.client import connect  # noqa: PLC0415 - in one process only

        received_s, mark = self.received_s, b"cseq\x1b"
        async with connect(self._url + PATH, compression=None, max_size=None) as connection:
            async for message in connection:
                assert isinstance(message, bytes)
                at = message.find(mark) + len(mark)
                received_s[int.from_bytes(message[at : at + 8], "big")] = time.time()
                self.began.set()


class Wire(msgspec.Struct):
    """What of a value is looked at."""

    seq: int


def latencies(bootstrap: str, topics: Sequence[str], url: str, frames: int) -> list[float]:
    """Return the seconds from received to readable of every event that arrives."""
    bystander = Bystander(url)
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "benchmark",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 50,
        }
    )
    consumer.assign(
        [TopicPartition(topic, number, 0) for topic in topics for number in range(PARTITIONS)]
    )
    consumer.consume(1, 1.0)  # connect
    bystander.start()
    decode = msgspec.json.Decoder(Wire).decode
    seen: list[tuple[int, float]] = []
    began_s = moved_s = time.monotonic()
    try:
        while time.monotonic() - moved_s < (START_S if not seen else 2.5):
            messages = consumer.consume(1000, 0.01)
            now_s = time.time()
            for message in messages:
                assert message.error() is None, message.error()
                seen.append((decode(message.value() or b"").seq, now_s))
                moved_s = time.monotonic()
            if len(bystander.received_s) >= frames and time.monotonic() - began_s > CATCH_UP_S:
                break
    finally:
        consumer.close()
    return latencies_of(bystander.received_s, seen)


def latencies_of(received_s: Mapping[int, float], seen: Sequence[tuple[int, float]]) -> list[float]:
    """Return how long each event took, but for those of the first second.

    Args:
        received_s: when the bystander got each seq; the client may have begun before it.
        seen: seq of each event, and when it was read.
    """
    both = [(received_s[seq], at_s) for seq, at_s in seen if seq in received_s]
    first_s = min(from_s for from_s, _ in both) + WARM_S
    return [at_s - from_s for from_s, at_s in both if from_s >= first_s]


async def run_latency(side: str, bootstrap: str, rate: int) -> list[float]:
    """Let one side write at a rate; return the latencies."""
    frames = round(rate * (LATENCY_S + 3))
    relay = spawn(
        frames=FRAMES, rate=rate, cycle=100, retention=frames, limit=frames, start_timeout_s=START_S
    )
    async with relay:
        client = Client(side, bootstrap, relay.url)
        try:
            reader = await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, "--reader", bootstrap, relay.url, str(frames)),
                *client.topics,
                stdout=subprocess.PIPE,
            )
            out, _ = await reader.communicate()
            assert reader.returncode == 0, "the reader failed"
            found: list[float] = json.loads(out)
            return found
        finally:
            client.stop()
            client.delete()


async def peer(url: str, bootstrap: str, prefix: str) -> None:
    """Be the peer, until SIGTERM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SDK's own, about its own names
        from aiokafka import AIOKafkaProducer  # noqa: PLC0415 - the peer's process only
        from atproto import (  # noqa: PLC0415 - as above
            CAR,
            AsyncFirehoseSubscribeReposClient,
            models,
            parse_subscribe_repos_message,
        )
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        enable_idempotence=True,
        compression_type="zstd",
        max_batch_size=384 * 1024,
        linger_ms=20,
    )
    client = AsyncFirehoseSubscribeReposClient(base_uri=f"{url}/xrpc")
    topics = {
        "app.bsky.feed.post": prefix + "posts",
        "app.bsky.feed.like": prefix + "likes",
        "app.bsky.feed.repost": prefix + "reposts",
        "app.bsky.graph.follow": prefix + "follows",
    }
    commits = models.ComAtprotoSyncSubscribeRepos.Commit

    async def on_message(message: Any) -> None:
        commit = parse_subscribe_repos_message(message)
        if not isinstance(commit, commits):
            return
        car = CAR.from_bytes(commit.blocks)
        for op in commit.ops:
            raw = car.blocks.get(op.cid) if op.cid else None
            model = models.get_or_create(raw, strict=False) if raw else None
            record = models.utils.get_model_as_json(model) if model is not None else "null"
            value = (
                f'{{"did":"{commit.repo}","seq":{commit.seq},"rev":"{commit.rev}",'
                f'"time":"{commit.time}","operation":"{op.action}","path":"{op.path}",'
                f'"cid":"{op.cid}","record":{record}}}'
            )
            topic = topics.get(op.path.partition("/")[0], prefix + "other")
            await producer.send(topic, value.encode(), commit.repo.encode())

    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await producer.start()
    reading = asyncio.create_task(client.start(on_message))
    await asyncio.wait(
        [reading, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED
    )
    if reading.done():
        reading.result()
    await client.stop()
    await reading
    await producer.stop()


async def measure(bootstrap: str, rounds: int) -> list[dict[str, Any]]:
    """Run everything in turn and return the cases."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    async with spawn(frames=FRAMES, speed=math.inf, cycle=100, retention=40_000) as relay:
        for _ in range(rounds):
            machine_is_busy(os.getloadavg()[0] - 2, os.cpu_count() or 1)
            for side in SIDES:
                runs[side].append(await run_flat_out(side, bootstrap, relay.url))
    made = cases(runs)
    for rate in RATES:
        found = {side: percentiles(await run_latency(side, bootstrap, rate)) for side in SIDES}
        for number, suffix in ((1, ""), (0, "_p50")):
            mine, theirs = found[OURS][number], found[PEER][number]
            made.append(
                {
                    "case": f"latency_{rate}{suffix}",
                    "ours": round(mine, 3),
                    "peer": round(theirs, 3),
                    "unit": "s, p50" if suffix else "s, p99",
                    "ratio": round(theirs / mine, 2),
                }
            )
    return made


def cases(runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Return the medians of the flat-out runs, and the medians of the rounds' ratios."""
    made = []
    for case, unit, fields in (
        ("sustained", "events/s", ([run.events_s for run in runs[side]] for side in SIDES)),
        ("cpu_per_event", "us", ([run.cpu_us for run in runs[side]] for side in SIDES)),
        ("memory", "MiB", ([run.memory / MIB for run in runs[side]] for side in SIDES)),
    ):
        mine, theirs = fields
        ratios = [
            a / b if case == "sustained" else b / a for a, b in zip(mine, theirs, strict=True)
        ]
        made.append(
            {
                "case": case,
                "ours": round(median(mine), 1),
                "peer": round(median(theirs), 1),
                "unit": unit,
                "ratio": round(median(ratios), 2),
            }
        )
    return made


async def report(args: argparse.Namespace) -> None:
    """Measure at a broker and tell."""
    async with broker(args.bootstrap) as bootstrap:
        found = await measure(bootstrap, args.rounds)
    result = {
        "name": "produce_kafka",
        "cases": found,
        "versions": {
            name: version(name)
            for name in (
                "blueflow",
                "aiokafka",
                "cramjam",
                "zstandard",
                "atproto",
                "confluent-kafka",
            )
        },
        "machine": f"Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=1))
    ours = {case["case"]: case["ours"] for case in found}
    for case, aim, reached in (
        ("sustained", f"aim {EVENTS_S_MIN:,} events/s", ours["sustained"] >= EVENTS_S_MIN),
        ("cpu_per_event", f"at most {CPU_US_MAX} us", ours["cpu_per_event"] <= CPU_US_MAX),
        ("latency_2000", f"below {LATENCY_S_MAX} s", ours["latency_2000"] < LATENCY_S_MAX),
    ):
        print(
            f"{case}: {ours[case]:,}, {aim}: {'reached' if reached else 'missed'}", file=sys.stderr
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, print, and write the JSON; or be one of the processes that this takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bootstrap", help="a broker that runs; without it one is started")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--reader", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    if args.peer:
        asyncio.run(peer(*args.peer))
    elif args.reader:
        bootstrap, url, frames, *topics = args.reader
        print(json.dumps(latencies(bootstrap, topics, url, int(frames))))
    else:
        asyncio.run(report(args))


if __name__ == "__main__":
    main()
