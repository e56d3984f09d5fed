"""What the Kafka benchmarks share: records as in life, a broker, topics, and counting."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    NewTopic,
    OffsetSpec,
)

from blueflow.events import RepoOp, encode_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

PARTITIONS: Final = 8
SHARES: Final = {"likes": 0.60, "posts": 0.20, "reposts": 0.08, "follows": 0.08, "other": 0.04}
DIDS: Final = 5_000

_COLLECTIONS: Final = {
    "likes": "app.bsky.feed.like",
    "posts": "app.bsky.feed.post",
    "reposts": "app.bsky.feed.repost",
    "follows": "app.bsky.graph.follow",
    "other": "app.bsky.actor.profile",
}
_DELETES: Final = 0.1
_BASE32: Final = "abcdefghijklmnopqrstuvwxyz234567"
_TID: Final = "234567abcdefghijklmnopqrstuvwxyz"
_WORDS: Final = """the a of and to in is it that was for on with my so just this have not be at you
people today morning coffee weather music game really think know time never good great little wonder
again still about because where there 日本 おはよう bom dia feliz hallo zusammen"""
_READ_S: Final = 30.0
_JAVA_OPTIONS: Final = ("-Xms256m", "-Xmx512m")  # and all compilers: it is measured


class Record(NamedTuple):
    """One event on its way to Kafka, encoded already."""

    dataset: str
    did: str
    timestamp_ms: int
    value: bytes


def records(count: int, seed: int, now_us: int) -> list[Record]:
    """Return events of wire JSON in the shares of the public network; equal seeds, equal events.

    Identifiers are random, so they compress as little as real ones.
    """
    random = Random(seed)
    dids = ["did:plc:" + _text(random, _BASE32, 24) for _ in range(DIDS)]
    datasets = random.choices(list(SHARES), list(SHARES.values()), k=count)
    made = []
    for number, dataset in enumerate(datasets):
        did = random.choice(dids)
        time_us = now_us + number * 1000
        gone = random.random() < _DELETES
        event = RepoOp(
            source="bsky.network",
            seq=31_527_041_487 + number,
            op_index=0,
            did=did,
            time_us=time_us,
            rev=_tid(random),
            operation="delete" if gone else "create",
            collection=_COLLECTIONS[dataset],
            rkey=_tid(random),
            cid=None if gone else _cid(random),
            record=None if gone else _record(random, dataset, dids),
        )
        made.append(Record(dataset, did, time_us // 1000, encode_event(event)))
    return made


def _record(random: Random, dataset: str, dids: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "$type": _COLLECTIONS[dataset],
        "createdAt": f"2026-07-04T14:{random.randrange(60):02d}:07.{random.randrange(1000):03d}Z",
    }
    if dataset in {"likes", "reposts"}:
        uri = f"at://{random.choice(dids)}/app.bsky.feed.post/{_tid(random)}"
        made["subject"] = {"cid": _cid(random), "uri": uri}
    elif dataset == "follows":
        made["subject"] = random.choice(dids)
    else:
        made["text"] = " ".join(random.choices(_WORDS.split(), k=random.randrange(2, 30)))
        made["langs"] = ["en"]
    return made


def _text(random: Random, alphabet: str, length: int) -> str:
    return "".join(random.choices(alphabet, k=length))


def _tid(random: Random) -> str:
    return "3m" + _text(random, _TID, 11)


def _cid(random: Random) -> str:
    return "bafyrei" + _text(random, _BASE32, 52)


@asynccontextmanager
async def broker(bootstrap: str | None) -> AsyncIterator[str]:
    """Give the address of a broker: the one named, else one that runs as long as the block."""
    if bootstrap:
        yield bootstrap
        return
    service = import_module("blueflow.testing.services.kafka")
    with tempfile.TemporaryDirectory() as folder:
        async with service.KafkaBroker(Path(folder), java_options=_JAVA_OPTIONS) as running:
            yield running.bootstrap


def make_topics(bootstrap: str, names: Sequence[str], partitions: int = PARTITIONS) -> None:
    """Make topics that keep what they get."""
    config = {"retention.ms": "-1", "max.message.bytes": str(8 * 1024 * 1024)}
    new = [NewTopic(name, partitions, config=config) for name in names]
    admin = AdminClient({"bootstrap.servers": bootstrap})  # gone, it would take the answers along
    for future in admin.create_topics(new).values():
        future.result(_READ_S)
    until_s = time.monotonic() + _READ_S
    while True:  # a topic is made before its partitions have leaders
        try:
            offsets(admin, names, partitions)
        except KafkaException:
            assert time.monotonic() < until_s, "the new topics have no leaders"
            time.sleep(0.1)
        else:
            return


def offsets(
    admin: AdminClient,
    topics: Sequence[str],
    partitions: int = PARTITIONS,
    isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
) -> int:
    """Return the sum of the offsets up to which the topics can be read."""
    asked = {
        TopicPartition(topic, number): OffsetSpec.latest()
        for topic in topics
        for number in range(partitions)
    }
    answers = admin.list_offsets(asked, isolation_level=isolation)
    return sum(answer.result(_READ_S).offset for answer in answers.values())


def delete_topics(bootstrap: str, prefix: str) -> None:
    """Delete the topics whose names begin with `prefix`."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    names = [name for name in admin.list_topics(timeout=_READ_S).topics if name.startswith(prefix)]
    for future in admin.delete_topics(names).values() if names else ():
        future.result(_READ_S)


class Reader:
    """Counts what a read_committed consumer finds in topics, each time what is new."""

    def __init__(self, bootstrap: str, topics: Iterable[str]) -> None:
        self._bootstrap, self._topics = bootstrap, list(topics)
        self._next = {
            (topic, number): OFFSET_BEGINNING
            for topic in self._topics
            for number in range(PARTITIONS)
        }

    def count(self) -> int:
        """Read to the end and return how many records there were."""
        self._settle()
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": "benchmark",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "check.crcs": True,
            }
        )
        found, left, until_s = 0, set(self._next), time.monotonic() + _READ_S
        try:
            consumer.assign([TopicPartition(*at, self._next[at]) for at in self._next])
            while left and time.monotonic() < until_s:
                for message in consumer.consume(10_000, 0.2):
                    error = message.error()
                    at = (message.topic() or "", message.partition() or 0)
                    if error is None:
                        found += 1
                    elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - public
                        left.discard(at)
                        self._next[at] = message.offset() or 0
                    else:
                        raise SystemExit(f"cannot count what arrived: {error.str()}")
        finally:
            consumer.close()
        assert not left, f"{len(left)} partitions could not be read to their end in {_READ_S} s"
        return found

    def _settle(self) -> None:
        """Wait until no transaction is open.

        A commit is answered a little before all of it can be read, and librdkafka says "end of
        partition" at what can be read.
        """
        admin = AdminClient({"bootstrap.servers": self._bootstrap})
        until_s = time.monotonic() + _READ_S
        while True:
            end = offsets(admin, self._topics, isolation=IsolationLevel.READ_UNCOMMITTED)
            if offsets(admin, self._topics) >= end:
                return
            assert time.monotonic() < until_s, "a transaction stays open"
            time.sleep(0.05)


def machine_is_busy(load: float, cores: int) -> None:
    """Say so when others work on the machine: then rates are low, and ratios uncertain."""
    if load > cores / 2:
        print(f"load average {load:.1f} on {cores} cores: others are at work", file=sys.stderr)
