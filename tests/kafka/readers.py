"""What foreign read_committed consumers see: librdkafka, so that we do not judge ourselves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message

PATIENCE_S = 60.0


def topics_of(bootstrap: str, prefix: str) -> dict[str, int]:
    """Return the number of partitions of each topic with the prefix."""
    described = AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=PATIENCE_S)
    return {
        name: len(topic.partitions)
        for name, topic in described.topics.items()
        if name.startswith(prefix)
    }


def committed(bootstrap: str, topics: dict[str, int]) -> Iterator[Message]:
    """Yield every record of the topics that a read_committed reader can see now, and end.

    A reader is told of the end at the last stable offset, and a commit is answered a moment before
    that moves; so this waits first until no transaction is open.
    """
    settle(bootstrap, topics)
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "judge",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
        }
    )
    try:
        partitions = [
            TopicPartition(topic, number, 0)
            for topic, count in topics.items()
            for number in range(count)
        ]
        if not partitions:
            return
        consumer.assign(partitions)
        left = {(partition.topic, partition.partition) for partition in partitions}
        deadline_s = time.monotonic() + PATIENCE_S
        while left:
            assert time.monotonic() < deadline_s, f"held back: {sorted(left)[:5]}"
            message = consumer.poll(1.0)
            if message is None:
                continue
            error = message.error()
            if error is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                left.discard((message.topic(), message.partition()))
            else:
                raise KafkaException(error)
    finally:
        consumer.close()


def settle(bootstrap: str, topics: dict[str, int]) -> None:
    """Wait until no transaction is open in the topics."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    deadline_s = time.monotonic() + PATIENCE_S
    while _ends(admin, topics, IsolationLevel.READ_COMMITTED) != _ends(
        admin, topics, IsolationLevel.READ_UNCOMMITTED
    ):
        assert time.monotonic() < deadline_s, "a transaction stays open"
        time.sleep(0.05)


def _ends(
    admin: AdminClient, topics: dict[str, int], isolation: IsolationLevel
) -> dict[tuple[str, int], int]:
    latest = OffsetSpec.latest()
    asked = {
        TopicPartition(topic, number): latest
        for topic, count in topics.items()
        for number in range(count)
    }
    if not asked:
        return {}
    futures = admin.list_offsets(asked, isolation_level=isolation)
    return {(at.topic, at.partition): future.result().offset for at, future in futures.items()}


def stored_events(bootstrap: str, prefix: str) -> list[dict[str, Any]]:
    """Return every event of all event topics, in the order of each partition."""
    topics = topics_of(bootstrap, prefix)
    events = {n: c for n, c in topics.items() if n not in {prefix + "cursor", prefix + "dlq"}}
    return [_json(message) for message in committed(bootstrap, events)]


def dead_letters(bootstrap: str, prefix: str) -> list[dict[str, Any]]:
    """Return every dead letter."""
    return [_json(m) for m in committed(bootstrap, {prefix + "dlq": 1})]


def cursors(bootstrap: str, prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """Return key and value of every cursor record."""
    records = committed(bootstrap, {prefix + "cursor": 1})
    return [((m.key() or b"").decode(), _json(m)) for m in records]


def _json(message: Message) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(message.value() or b"")
    return decoded
