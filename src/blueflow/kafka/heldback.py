"""Who holds a partition back: the open transaction in front of everything that was committed."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import anyio
from aiokafka.errors import KafkaError

from blueflow.kafka.connection import REQUEST_TIMEOUT_S
from blueflow.kafka.hanging import open_transactions
from blueflow.kafka.offsets import connected
from blueflow.kafka.protocol import ListTransactions

if TYPE_CHECKING:
    from aiokafka import TopicPartition
    from aiokafka.client import AIOKafkaClient

    from blueflow.kafka.connection import Connection

UNKNOWN = "a transaction of an unknown producer"

_logger = logging.getLogger(__name__)


async def holder_of(connection: Connection, partition: TopicPartition) -> str:
    """Say whose open transaction comes first in a partition, as well as the brokers know it.

    Never raises for want of rights, of an answer, or of a broker that knows these requests.
    """
    try:
        with anyio.move_on_after(REQUEST_TIMEOUT_S):
            async with connected(connection, "blueflow-held-back", [partition.topic]) as client:
                return await _holder(client, partition)
    except (KafkaError, OSError, TimeoutError, ValueError, NotImplementedError):
        _logger.debug("the brokers do not say who holds a partition back", exc_info=True)
    return UNKNOWN


async def _holder(client: AIOKafkaClient, partition: TopicPartition) -> str:
    opened = (await open_transactions(client, [partition])).get(partition)
    if not opened:
        return UNKNOWN
    first = min(opened)
    name = await _transactional_id(client, first.producer_id)
    quiet_s = time.time() - first.last_ms / 1000
    return f"{name}, producer id {first.producer_id}, whose last record came {quiet_s:.0f} s ago"


async def _transactional_id(client: AIOKafkaClient, producer_id: int) -> str:
    for broker in client.cluster.brokers():  # each coordinates some of the transactional ids
        answer = await client.send(broker.nodeId, ListTransactions(producer_id))
        for transactional_id, found, *_ in answer.transaction_states:
            if found == producer_id:
                return f"transactional id {transactional_id!r}"
    return "a producer without a transactional id that may be shown"
