"""Reading the topic of the cursors to its very end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition

from blueflow.errors import CursorTopicError, HeldBackError
from blueflow.kafka.connection import REQUEST_TIMEOUT_S, bounded, connecting
from blueflow.kafka.cursorrecord import CursorTable
from blueflow.kafka.heldback import holder_of
from blueflow.kafka.offsets import ends_of, stop

if TYPE_CHECKING:
    from blueflow.kafka.connection import Connection

CLEANUP_S: Final = 15.0  # a broker looks for transactions past their timeout every 10 s
_POLL_S: Final = 0.5

_logger = logging.getLogger(__name__)


async def read_cursors(
    connection: Connection, topic: str, pipeline: str, *, wait_s: float, open_too: bool = True
) -> CursorTable:
    """Return what the topic says at this moment.

    The mark is the end that a read_uncommitted reader sees, taken now; then everything before it
    is read read_committed. An open transaction of somebody else can hold that up until the broker
    ends it.

    Args:
        connection: the brokers.
        topic: of the cursors; it has one partition.
        pipeline: whose positions to look for.
        wait_s: how long an open transaction may take to end.
        open_too: wait for open transactions to end; otherwise read up to the first of them.

    Raises:
        CursorTopicError: a record of this topic is no cursor.
        TimeoutError: the end could not be read in time.
        KafkaError, OSError: no broker answers.
    """
    partition = TopicPartition(topic, 0)
    mark = (await ends_of(connection, [partition], open_too=open_too))[partition]
    table = CursorTable(pipeline)
    if not mark:
        return table
    consumer = AIOKafkaConsumer(
        **connection.options(f"blueflow-cursor-{pipeline}"),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",  # else it begins at the end when the beginning has gone
        fetch_max_wait_ms=100,
    )
    try:
        with anyio.move_on_after(wait_s):
            await connecting(consumer.start())
            consumer.assign([partition])
            beginning = (await consumer.beginning_offsets([partition]))[partition]
            consumer.seek(partition, beginning)
            while await consumer.position(partition) < mark:
                got = await consumer.getmany(partition, timeout_ms=int(_POLL_S * 1000))
                for record in got.get(partition, ()):
                    try:
                        table.take(record.key, record.value)
                    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                        raise CursorTopicError(topic, record.offset, str(error)) from error
            return table
        raise await _why_late(connection, consumer, partition, wait_s)
    finally:
        await stop(consumer)


async def _why_late(
    connection: Connection, consumer: AIOKafkaConsumer, partition: TopicPartition, wait_s: float
) -> Exception:
    if consumer.assignment() and consumer.highwater(partition) is not None:
        offset = await bounded(consumer.position(partition), REQUEST_TIMEOUT_S)
        holder = await holder_of(connection, partition)
        extra = {
            "topic": partition.topic,
            "offset": offset,
            "stable": consumer.last_stable_offset(partition),
            "end": consumer.highwater(partition),
            "waited_s": wait_s,
            "holder": holder,
        }
        _logger.warning("the end of the cursor topic cannot be read", extra=extra)
        return HeldBackError(f"{partition.topic}/{partition.partition}", offset, wait_s, holder)
    return TimeoutError()
