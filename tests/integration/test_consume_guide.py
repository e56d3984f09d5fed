"""The commands and programs of docs/guides/consume.md, against a broker with unfinished business.

The topics hold events, an aborted transaction between them and an open one behind them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import re
import secrets
import shlex
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from blueflow.events import Position, RepoOp
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import TopicWishes
from blueflow.testing.samples import contract_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blueflow.testing.services.kafka import KafkaBroker

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "consume.md").read_text(encoding="utf-8")
TOOLS = {
    "kafka-console-consumer.sh": "org.apache.kafka.tools.consumer.ConsoleConsumer",
    "kafka-transactions.sh": "org.apache.kafka.tools.TransactionsCommand",
}
SOURCE = "guide.example"
PARTITIONS = 3
EVENTS = contract_events(SOURCE, 66)
POSTS = [
    one for one in EVENTS if isinstance(one, RepoOp) and one.collection == "app.bsky.feed.post"
]
LINES = sorted(f"{post.did} {post.operation} {post.rkey}" for post in POSTS)
NEVER = b'{"did":"did:plc:never"}'


def blocks(language: str, part: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return [one for one in found if part in one]


def block(language: str, part: str) -> str:
    (found,) = blocks(language, part)
    return found


async def write(bootstrap: str, prefix: str) -> None:
    """Write the events as blueflow does, in two lives."""
    middle = len(EVENTS) // 2
    for some in (EVENTS[:middle], EVENTS[middle:]):
        sink = KafkaSink(
            bootstrap,
            origin_source=SOURCE,
            simulated=True,
            topic_prefix=prefix,
            topics=TopicWishes(partitions=PARTITIONS, retention_s=math.inf),
        )
        await sink.resume()
        await sink.write(some, through=Position(SOURCE, some[-1].seq, some[-1].time_us))
        await sink.flush()
        await sink.close()
        if some[-1] is not EVENTS[-1]:
            await anyio.to_thread.run_sync(begin, bootstrap, prefix, "aborted")


def begin(bootstrap: str, prefix: str, fate: str) -> Producer:
    """Write to every partition of the posts in a transaction that stays open or is aborted."""
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "transactional.id": f"{prefix}{fate}",
            "transaction.timeout.ms": 600_000,
        }
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    for partition in range(PARTITIONS):
        producer.produce(f"{prefix}posts", value=NEVER, key=b"did:plc:never", partition=partition)
    producer.flush(30)
    if fate == "aborted":
        producer.abort_transaction(30)
    return producer


class Place:
    """A broker, and topics that are not called as in the guide."""

    def __init__(self, broker: KafkaBroker, prefix: str) -> None:
        self.broker, self.prefix = broker, prefix

    def here(self, text: str) -> str:
        for patient, short in (("10000", "5000"), ("10_000", "5_000"), ("poll(10)", "poll(5)")):
            text = text.replace(patient, short)
        text = text.replace("localhost:9092", self.broker.bootstrap).replace(
            "bluesky.", self.prefix
        )
        text = text.replace(
            'read(\n    "posts"', f'read(\n    "posts", topic_prefix="{self.prefix}"'
        )
        return text.replace("my-posts", f"{self.prefix}group")

    async def shell(self, text: str) -> list[str]:
        """Run the commands of a block, Kafka's tools without their scripts; return the outputs."""
        outputs = []
        for command in self.here(text).splitlines():
            name, *arguments = shlex.split(command)
            if name in TOOLS:
                outputs.append(await self.broker.tool(TOOLS[name], *arguments))
            else:
                done = await anyio.run_process([name, *arguments])
                outputs.append(done.stdout.decode())
        return outputs

    async def python(self, text: str) -> list[str]:
        """Run a block and return the lines that it prints."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(self.here(text), "consume.md", "exec", flags=flags)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = types.FunctionType(code, {"__name__": "__main__"})()
            if result is not None:
                await result
        return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def written(kafka: KafkaBroker) -> Iterator[Place]:
    prefix = f"guide-{secrets.token_hex(4)}."
    anyio.run(write, kafka.bootstrap, prefix)
    producer = begin(kafka.bootstrap, prefix, "open")
    yield Place(kafka, prefix)
    producer.abort_transaction(30)


@pytest.fixture
def place(
    written: Place, kafka: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """Take the broker by its own name too, which tells that the test needs it."""
    assert written.broker is kafka
    monkeypatch.chdir(tmp_path)
    return written


def told(values: list[str]) -> list[str]:
    """Return wire JSON as the programs of the guide print it."""
    events = [json.loads(value) for value in values if value.startswith("{")]
    return sorted(
        f"{one['did']} {one['commit']['operation']} {one['commit']['rkey']}" for one in events
    )


async def test_what_is_not_committed_is_there(place: Place) -> None:
    """A reader that forgets read_committed would see it: so the other tests can fail."""
    command = block("sh", "console-consumer").replace("read_committed", "read_uncommitted")
    (output,) = await place.shell(command)
    assert output.count("did:plc:never") == 2 * PARTITIONS


async def test_the_console_consumer(place: Place) -> None:
    (output,) = await place.shell(block("sh", "console-consumer"))
    assert told(output.splitlines()) == LINES
    assert "never" not in output


@pytest.mark.needs("kcat")
async def test_kcat(place: Place) -> None:
    (output,) = await place.shell(block("sh", "kcat"))
    assert told(output.splitlines()) == LINES
    assert "never" not in output


async def test_confluent_kafka(place: Place) -> None:
    assert sorted(await place.python(block("python", "confluent_kafka"))) == LINES


def lags(place: Place, group: str, isolation: str) -> list[int]:
    settings = {"bootstrap.servers": place.broker.bootstrap, "group.id": group}
    consumer = Consumer(settings | {"isolation.level": isolation})
    partitions = [TopicPartition(f"{place.prefix}posts", n) for n in range(PARTITIONS)]
    found = [
        consumer.get_watermark_offsets(one, timeout=30)[1] - one.offset
        for one in consumer.committed(partitions, timeout=30)
        if one.offset >= 0
    ]
    consumer.close()
    assert found
    return found


async def test_the_lag_is_what_the_guide_says(place: Place) -> None:
    """Both groups have read everything that can be read."""
    text = block("python", "confluent_kafka").replace("my-posts", "my-posts-by-position")
    await place.python(text)
    by_position = f"{place.prefix}group-by-position"
    assert set(lags(place, by_position, "read_committed")) == {0}
    assert min(lags(place, by_position, "read_uncommitted")) >= 1  # the open transaction
    text = block("python", "confluent_kafka").replace("my-posts", "my-posts-by-record")
    text = text.replace(
        "        event =", "        consumer.commit(message, asynchronous=False)\n        event ="
    ).replace('"auto.offset', '"enable.auto.commit": False,\n    "auto.offset')
    await place.python(text)
    assert min(lags(place, f"{place.prefix}group-by-record", "read_committed")) >= 1


async def test_aiokafka(place: Place) -> None:
    assert sorted(await place.python(block("python", "AIOKafkaConsumer"))) == LINES


async def test_our_reader_and_its_positions(place: Place) -> None:
    text = block("python", "blueflow.kafka")
    assert sorted(await place.python(text)) == LINES
    assert await place.python(text) == []  # it goes on behind them


async def test_the_holder_can_be_found(place: Place) -> None:
    producers, transactions = await place.shell(block("sh", "describe-producers"))
    assert "CurrentTransactionStartOffset" in producers
    starts = [row.split()[-1] for row in producers.splitlines()[1:] if row.strip()]
    assert sum(start.isdigit() for start in starts) == 1
    assert f"{place.prefix}open" in transactions


def test_blocks_that_are_not_run_are_python() -> None:
    assert len(blocks("python", "")) == 4
    assert len(blocks("sh", "")) == 3
    compile(block("python", "spark"), "consume.md", "exec")


def keys_of(name: str) -> set[str]:
    path = Path(__file__).parents[2] / "docs" / "schema" / f"{name}.schema.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return set(found["properties"])


def test_fields_that_the_guide_names_are_in_the_schemas() -> None:
    assert {"seq", "instance"} <= keys_of("cursor")
    assert {"uri", "event", "topic", "reason"} <= keys_of("dead-letter")
