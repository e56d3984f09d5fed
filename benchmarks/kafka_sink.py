"""Encoded records into Kafka: blueflow's producer beside aiokafka's `send()` and librdkafka's.

The same records go to the same broker, each side in a process of its own that lives through all
rounds, one after the other in each round. Ours places every record by its DID, groups by partition
and commits 10,000 at a time, exactly once (`transactional`) or without transactions
(`idempotent`). The peers are idempotent and use zstd too, with the batch sizes that were best for
them; each says afterwards of every record that it was taken. A read_committed consumer then counts
what arrived; that is not in the time.

The ratio that counts is messages per second of the client's CPU time (all its threads, librdkafka's
too). The cases `…_wall` are messages per second as a clock sees them: the broker's share is in
them, and a transaction waits for the broker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Protocol

from _kafka import (
    PARTITIONS,
    SHARES,
    Reader,
    Record,
    broker,
    delete_topics,
    machine_is_busy,
    make_topics,
    records,
)
from blueflow.kafka.connection import Connection
from blueflow.kafka.partition import placer
from blueflow.kafka.producer import Producer
from blueflow.kafka.transaction import KafkaRecord, Partition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CURSOR: Final = "cursor"
TRANSACTION: Final = 10_000
POOL: Final = 50_000  # different records; longer runs take them again
# Of one run: about a second of each contender.
MESSAGES: Final = {
    "transactional": 100_000,
    "idempotent": 100_000,
    "send": 30_000,
    "aioproducer": 50_000,
    "confluent": 100_000,
}
CASES: Final = {
    "idempotent_vs_send": ("idempotent", "send"),
    "transactional_vs_send": ("transactional", "send"),
    "idempotent_vs_aioproducer": ("idempotent", "aioproducer"),
    "idempotent_vs_confluent": ("idempotent", "confluent"),
}
AIMS: Final = {"idempotent": 150_000, "transactional": 100_000}
LIBRDKAFKA: Final = {
    "enable.idempotence": True,
    "compression.type": "zstd",
    "compression.level": 1,  # quicker than its default of 3, and no larger here
    "partitioner": "murmur2_random",  # else other partitions than Java's, and ours
    "linger.ms": 20,
    "batch.size": 384 * 1024,
    "batch.num.messages": 10_000,
    "queue.buffering.max.messages": 500_000,
}


class Contender(Protocol):
    """One way to get records into Kafka."""

    async def start(self) -> None:
        """Connect."""

    async def send(self, made: Sequence[Record]) -> None:
        """Return when the broker has taken every record; raise when it has not."""

    async def stop(self) -> None:
        """Disconnect."""


class Ours:
    """What `KafkaSink` does from encoded events on."""

    def __init__(self, bootstrap: str, prefix: str, *, transactional: bool) -> None:
        self._place = placer(PARTITIONS)
        self._partitions = {
            dataset: [Partition(prefix + dataset, number) for number in range(PARTITIONS)]
            for dataset in SHARES
        }
        self._cursor = Partition(prefix + CURSOR, 0)
        self._producer = Producer(
            Connection(bootstrap),
            client_id="benchmark",
            transactional_id=prefix if transactional else None,
            compression="zstd",
            timeout_s=15.0,
        )

    async def start(self) -> None:
        """See `Contender`."""
        await self._producer.start()

    async def send(self, made: Sequence[Record]) -> None:
        """See `Contender`."""
        place, partitions = self._place, self._partitions
        for begin in range(0, len(made), TRANSACTION):
            groups: dict[Partition, list[KafkaRecord]] = {}
            for dataset, did, timestamp_ms, value in made[begin : begin + TRANSACTION]:
                key, number = place(did)
                record = (timestamp_ms, key, value)
                partition = partitions[dataset][number]
                if (group := groups.get(partition)) is None:
                    groups[partition] = [record]
                else:
                    group.append(record)
            position = (made[begin].timestamp_ms, b"default|benchmark", b'{"seq":1}')
            await self._producer.commit(groups, {self._cursor: [position]})

    async def stop(self) -> None:
        """See `Contender`."""
        await self._producer.discard()


class Send:
    """aiokafka's `send()`, one call a record."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        from aiokafka import AIOKafkaProducer  # noqa: PLC0415 - in its own process only

        self._topics = {dataset: prefix + dataset for dataset in SHARES}
        self._producer = AIOKafkaProducer(
            bootstrap_servers=bootstrap,
            enable_idempotence=True,
            compression_type="zstd",
            max_batch_size=384 * 1024,
            linger_ms=20,
        )

    async def start(self) -> None:
        """See `Contender`."""
        await self._producer.start()

    async def send(self, made: Sequence[Record]) -> None:
        """See `Contender`."""
        send, topics = self._producer.send, self._topics
        for begin in range(0, len(made), TRANSACTION):
            futures = [
                await send(topics[dataset], value, did.encode(), timestamp_ms=timestamp_ms)
                for dataset, did, timestamp_ms, value in made[begin : begin + TRANSACTION]
            ]
            await self._producer.flush()
            for future in futures:
                future.result()

    async def stop(self) -> None:
        """See `Contender`."""
        await self._producer.stop()


class AioProducer:
    """confluent-kafka's asyncio producer."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self._bootstrap = bootstrap
        self._topics = {dataset: prefix + dataset for dataset in SHARES}
        self._producer: Any = None

    async def start(self) -> None:
        """See `Contender`."""
        from confluent_kafka.aio import AIOProducer  # noqa: PLC0415 - in its own process only

        options = {"bootstrap.servers": self._bootstrap, **LIBRDKAFKA}
        self._producer = AIOProducer(options, batch_size=AIO_BATCH)

    async def send(self, made: Sequence[Record]) -> None:
        """See `Contender`."""
        produce, topics = self._producer.produce, self._topics
        for begin in range(0, len(made), TRANSACTION):
            futures = [
                await produce(topics[dataset], value, did.encode())  # it takes no timestamp
                for dataset, did, _, value in made[begin : begin + TRANSACTION]
            ]
            await self._producer.flush()
            for future in futures:
                await future

    async def stop(self) -> None:
        """See `Contender`."""
        await self._producer.close()


class Confluent:
    """confluent-kafka's `produce()` and `poll()`: no asyncio, so a thread of one's own in life."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        from confluent_kafka import Producer as Librdkafka  # noqa: PLC0415 - in its own process

        self._topics = {dataset: prefix + dataset for dataset in SHARES}
        self._producer = Librdkafka({"bootstrap.servers": bootstrap, **LIBRDKAFKA})
        self._taken = 0

    async def start(self) -> None:
        """See `Contender`."""
        self._producer.list_topics(timeout=10)

    async def send(self, made: Sequence[Record]) -> None:
        """See `Contender`."""
        produce, poll, topics = self._producer.produce, self._producer.poll, self._topics
        noted, self._taken = self._note, 0
        for number, (dataset, did, timestamp_ms, value) in enumerate(made):
            produce(topics[dataset], value, did.encode(), timestamp=timestamp_ms, on_delivery=noted)
            if not number % 1000:
                poll(0)
        self._producer.flush(60)
        assert self._taken == len(made)

    def _note(self, error: object, message: object) -> None:
        del message
        self._taken += error is None

    async def stop(self) -> None:
        """See `Contender`."""


AIO_BATCH: Final = 10_000


def contender(name: str, bootstrap: str, prefix: str) -> Contender:
    """Return a contender by its name."""
    match name:
        case "send":
            return Send(bootstrap, prefix)
        case "aioproducer":
            return AioProducer(bootstrap, prefix)
        case "confluent":
            return Confluent(bootstrap, prefix)
        case _:
            return Ours(bootstrap, prefix, transactional=name == "transactional")


async def compete(name: str, bootstrap: str, prefix: str) -> None:
    """Be a contender: for each line of input send so many records, and say what it took."""
    one = contender(name, bootstrap, prefix)
    pool = records(POOL, 1, time.time_ns() // 1000)
    await one.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # as blueflow's job does; it serves the peers as well
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        count = int(line)
        made = (pool * -(-count // len(pool)))[:count]
        began_s, cpu_s = time.perf_counter(), time.process_time()
        await one.send(made)
        took = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - began_s}
        print(json.dumps({name: count / seconds for name, seconds in took.items()}), flush=True)
    await one.stop()


class Process:
    """A contender in a process of its own."""

    def __init__(self, name: str, bootstrap: str, prefix: str) -> None:
        self.name = name
        topics = [prefix + dataset for dataset in SHARES]
        make_topics(bootstrap, topics)
        make_topics(bootstrap, [prefix + CURSOR], partitions=1)
        self._reader = Reader(bootstrap, topics)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--contender", name, bootstrap, prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        """Wait until it is connected."""
        self._line()

    def run(self, share: float = 1.0) -> dict[str, float]:
        """Let it send; return messages per second of CPU time and of the clock."""
        count = round(MESSAGES[self.name] * share)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        rates: dict[str, float] = json.loads(self._line())
        arrived = self._reader.count()
        assert arrived == count, f"{self.name}: {arrived:,} of {count:,} records arrived"
        return rates

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        return line


def measure(bootstrap: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Let the contenders take turns; return what each gave in each round."""
    run = f"benchmark-{secrets.token_hex(4)}."
    processes: list[Process] = []
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in MESSAGES}
    try:
        processes += [Process(name, bootstrap, f"{run}{name}.") for name in MESSAGES]
        for process in processes:
            process.ready()
        for process in processes:  # connections, caches, the broker's own warming
            process.run(0.5)
        for _ in range(rounds):
            machine_is_busy(os.getloadavg()[0] - 1, os.cpu_count() or 1)
            for process in processes:
                rates[process.name].append(process.run())
    finally:
        for process in processes:
            process.stop()
        delete_topics(bootstrap, run)
    return rates


def cases(rates: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return the medians, and the medians of the rounds' ratios."""
    made = []
    for measured, suffix, unit in (
        ("cpu_s", "", "messages/s of client CPU"),
        ("wall_s", "_wall", "messages/s"),
    ):
        for case, (ours, peer) in CASES.items():
            mine = [rate[measured] for rate in rates[ours]]
            theirs = [rate[measured] for rate in rates[peer]]
            made.append(
                {
                    "case": case + suffix,
                    "ours": round(median(mine)),
                    "peer": round(median(theirs)),
                    "unit": unit,
                    "ratio": round(median(a / b for a, b in zip(mine, theirs, strict=True)), 2),
                }
            )
    return made


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bootstrap", help="a broker that runs; without it one is started")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    if args.contender:
        asyncio.run(compete(*args.contender))
        return
    asyncio.run(report(args))


async def report(args: argparse.Namespace) -> None:
    """Measure at a broker and tell."""
    async with broker(args.bootstrap) as bootstrap:
        rates = await asyncio.to_thread(measure, bootstrap, args.rounds)
    result = {
        "name": "kafka_sink",
        "cases": cases(rates),
        "versions": {
            name: version(name)
            for name in ("blueflow", "aiokafka", "cramjam", "zstandard", "confluent-kafka")
        },
        "machine": f"Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=1))
    for name, aim in AIMS.items():
        reached = median(rate["cpu_s"] for rate in rates[name])
        verdict = "reached" if reached >= aim else "missed"
        print(f"{name}: {reached:,.0f} messages/s/core, aim {aim:,}: {verdict}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
