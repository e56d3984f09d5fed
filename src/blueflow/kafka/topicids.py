"""Which topic a name stands for: one that was deleted and made anew has another id.

Source: KIP-516.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import anyio
from aiokafka import errors as kafka

from blueflow.kafka.connection import REQUEST_TIMEOUT_S
from blueflow.kafka.offsets import connected, until_answered
from blueflow.kafka.protocol import DescribeTopics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokafka.client import AIOKafkaClient

    from blueflow.kafka.connection import Connection


async def topic_ids(connection: Connection, names: Sequence[str]) -> dict[str, str]:
    """Return the id of each topic that exists; "" from brokers older than ids (Kafka 2.8).

    Raises:
        KafkaError, OSError, TimeoutError: no broker answers, or it refuses.
    """
    with anyio.fail_after(REQUEST_TIMEOUT_S):
        async with connected(connection, "blueflow-topics", names) as client:

            async def ask() -> dict[str, str]:
                return await _ask(client, names)

            return await until_answered(client, ask)


async def _ask(client: AIOKafkaClient, names: Sequence[str]) -> dict[str, str]:
    try:
        answer = await client.send(client.get_random_node(), DescribeTopics(names))
    except (kafka.IncompatibleBrokerVersion, NotImplementedError):
        return dict.fromkeys(names, "")
    found = {}
    for code, name, topic_id, *_ in answer.topics:
        error = kafka.for_code(code)
        if error is kafka.NoError:
            found[name] = str(UUID(bytes=topic_id))
        elif error is not kafka.UnknownTopicOrPartitionError:
            raise error(name)
    return found
