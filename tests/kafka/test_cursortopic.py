"""The topic of the cursors is read to its end, or that is an error: never a part of it for all."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import OffsetOutOfRangeError
from anyio import to_thread
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from blueflow.events import Position
from blueflow.kafka import cursortopic as module
from blueflow.kafka.connection import Connection
from blueflow.kafka.cursorrecord import CursorValue, cursor_record
from blueflow.kafka.cursortopic import read_cursors

if TYPE_CHECKING:
    from blueflow.testing.services.kafka import KafkaBroker


def cursor_topic(bootstrap: str) -> str:
    """Make a topic with three positions."""
    topic = f"{secrets.token_hex(4)}.cursor"
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    admin.create_topics([NewTopic(topic, 1)])[topic].result(30)
    producer = Producer({"bootstrap.servers": bootstrap, "log_level": 0})
    for seq in (1, 2, 3):
        key, value = cursor_record("default", CursorValue("relay", seq, 0, "me.1", seq))
        producer.produce(topic, value, key)
    producer.flush(30)
    return topic


async def test_records_that_vanish_under_the_reader_are_no_empty_topic(
    kafka: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap = kafka.bootstrap
    topic = await to_thread.run_sync(cursor_topic, bootstrap)
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})

    class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
        async def beginning_offsets(self, partitions: list[object]) -> dict[object, int]:
            oldest: dict[object, int] = await super().beginning_offsets(partitions)
            (deleted,) = admin.delete_records([TopicPartition(topic, 0, 2)]).values()
            await to_thread.run_sync(deleted.result, 30)
            return oldest

    monkeypatch.setattr(module, "AIOKafkaConsumer", Consumer)
    connection = Connection(bootstrap)
    with pytest.raises(OffsetOutOfRangeError):
        await read_cursors(connection, topic, "default", wait_s=20)
    monkeypatch.undo()
    table = await read_cursors(connection, topic, "default", wait_s=20)
    assert table.positions == {"relay": Position("relay", 3, 0)}
