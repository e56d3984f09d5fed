"""What a read_committed consumer would see of a mock cluster, which isolates nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.control_record import COMMIT_MARKER, ControlRecord
from aiokafka.record.memory_records import MemoryRecords

from blueflow.kafka.cursorrecord import CursorTable
from blueflow.testing.kafkacodes import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blueflow.kafka.connection import Connection

_BYTES_MAX = 1 << 25
_BROKER = 1


async def committed(bootstrap: str, topics: Mapping[str, int]) -> list[tuple[bytes, bytes]]:
    """Return key and value of each record behind which its producer's commit marker stands.

    What a producer left open counts as aborted: each life of one has a producer id of its own.
    """
    client = AIOKafkaClient(bootstrap_servers=bootstrap)
    await client.bootstrap()
    found: list[tuple[bytes, bytes]] = []
    try:
        for topic, count in topics.items():
            for partition in range(count):
                found += await _committed(client, topic, partition)
    finally:
        await client.close()
    return found


async def _committed(
    client: AIOKafkaClient, topic: str, partition: int
) -> list[tuple[bytes, bytes]]:
    found: list[tuple[bytes, bytes]] = []
    open_records: dict[int, list[tuple[bytes, bytes]]] = {}
    offset, end = 0, 1
    while offset < end:
        topics = [(topic, [(partition, offset, _BYTES_MAX)])]
        answer = await client.send(_BROKER, FetchRequest(0, 0, _BYTES_MAX, 0, topics))
        ((_, (fetched,)),) = answer.topics
        if fetched[1] == ErrorCode.UNKNOWN_TOPIC_OR_PARTITION:
            break
        end = fetched[2]
        records = MemoryRecords(fetched[-1])
        while records.has_next():
            batch = records.next_batch()
            offset = batch.next_offset
            group = [(record.key, record.value) for record in batch]
            if not batch.is_control_batch:
                open_records.setdefault(batch.producer_id, []).extend(group)
            elif ControlRecord.parse(group[0][0]) == COMMIT_MARKER:
                found += open_records.pop(batch.producer_id, [])
            else:
                open_records.pop(batch.producer_id, None)
    return found


async def read_cursors(
    connection: Connection, topic: str, pipeline: str, *, wait_s: float, open_too: bool = True
) -> CursorTable:
    """Stand in for `blueflow.kafka.cursortopic.read_cursors`."""
    table = CursorTable(pipeline)
    for key, value in await committed(connection.bootstrap, {topic: 1}):
        table.take(key, value)
    return table
