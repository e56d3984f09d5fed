"""Where partitions end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio
from aiokafka import AIOKafkaConsumer

from blueflow.kafka.connection import REQUEST_TIMEOUT_S, bounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokafka import TopicPartition

    from blueflow.kafka.connection import Connection

STOP_S: Final = 2.0  # with a broker that does not answer nothing more comes of waiting


async def ends_of(
    connection: Connection, partitions: Sequence[TopicPartition], *, open_too: bool = True
) -> dict[TopicPartition, int]:
    """Return the offset behind the last record of each partition.

    The end of what is committed (the last stable offset) comes a moment after the commit was
    answered, so "what is there now" is the end with open transactions.

    Args:
        connection: the brokers.
        partitions: whose ends.
        open_too: open transactions included; otherwise up to the first of them.

    Raises:
        KafkaError, OSError, TimeoutError: no broker answers.
    """
    consumer = AIOKafkaConsumer(
        **connection.options("blueflow-ends"),
        isolation_level="read_uncommitted" if open_too else "read_committed",
        enable_auto_commit=False,
    )
    try:
        await bounded(consumer.start(), REQUEST_TIMEOUT_S)
        return dict(await bounded(consumer.end_offsets(list(partitions)), REQUEST_TIMEOUT_S))
    finally:
        await stop(consumer)


async def stop(consumer: AIOKafkaConsumer) -> None:
    """Disconnect a consumer, whatever else is cancelled."""
    with anyio.move_on_after(STOP_S, shield=True):
        await consumer.stop()
