"""Where partitions end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.offset import OffsetRequest, OffsetResetStrategy

from blueflow.kafka.connection import REQUEST_TIMEOUT_S, connecting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from aiokafka import AIOKafkaConsumer

    from blueflow.kafka.connection import Connection

_T = TypeVar("_T")

STOP_S: Final = 2.0  # with a broker that does not answer nothing more comes of waiting
_POLL_S: Final = 0.1
_READ_UNCOMMITTED, _READ_COMMITTED = 0, 1


async def ends_of(
    connection: Connection, partitions: Iterable[TopicPartition], *, open_too: bool = True
) -> dict[TopicPartition, int]:
    """Return the offset behind the last record of each partition.

    The end of what is committed (the last stable offset) comes a moment after the commit was
    answered, so "what is there now" is the end with open transactions.

    Args:
        connection: the brokers.
        partitions: whose ends.
        open_too: open transactions included; otherwise up to the first of them.

    Raises:
        KafkaError, OSError, TimeoutError: no broker answers, or it refuses.
    """
    wanted = list(partitions)
    topics = {partition.topic for partition in wanted}
    with anyio.fail_after(REQUEST_TIMEOUT_S):
        async with connected(connection, "blueflow-ends", topics) as client:
            return await until_answered(
                client, partial(ask_ends, client, wanted, open_too=open_too)
            )


@asynccontextmanager
async def connected(
    connection: Connection, client_id: str, topics: Iterable[str]
) -> AsyncIterator[AIOKafkaClient]:
    """Connect for a few requests of our own, and disconnect whatever happens.

    Args:
        connection: the brokers.
        client_id: what the broker's log calls it.
        topics: whose leaders it has to know.

    Raises:
        KafkaError, OSError: no broker answers.
    """
    client = AIOKafkaClient(**connection.options(client_id))
    try:
        await connecting(client.bootstrap())
        await client.set_topics(set(topics))
        yield client
    finally:
        with anyio.move_on_after(STOP_S, shield=True):
            await client.close()


async def ask_ends(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition], *, open_too: bool
) -> dict[TopicPartition, int]:
    """Ask the leaders once, as `ends_of`, over a client that knows the topics.

    Raises:
        KafkaError: a leader is unknown, does not answer, or refuses.
    """
    level = _READ_UNCOMMITTED if open_too else _READ_COMMITTED
    requests = [
        client.send(
            node,
            OffsetRequest(
                -1,
                level,
                [
                    (topic, [(number, OffsetResetStrategy.LATEST) for number in numbers])
                    for topic, numbers in topics.items()
                ],
            ),
        )
        for node, topics in by_leader(client, partitions).items()
    ]
    ends = {}
    for answer in await answers_of(requests):
        for topic, found in answer.topics:
            for number, code, _, end in found:
                raise_for(code, topic)
                ends[TopicPartition(topic, number)] = end
    return ends


async def until_answered(client: AIOKafkaClient, ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask until there is an answer, over leaders that move; the caller bounds the time.

    Raises:
        KafkaError: the brokers refuse.
    """
    while True:
        try:
            return await ask()
        except (kafka.KafkaError, OSError) as error:
            if not getattr(error, "retriable", True):
                raise
            client.force_metadata_update()
        await anyio.sleep(_POLL_S)


async def answers_of(
    requests: Iterable[Awaitable[_T]], *, without: tuple[type[Exception], ...] = ()
) -> list[_T]:
    """Wait for all answers, and return them or raise the first error; none goes on alone.

    Args:
        requests: sent together.
        without: errors that leave an answer out.
    """
    results = await asyncio.gather(*requests, return_exceptions=True)
    answers = []
    for result in results:
        if not isinstance(result, BaseException):
            answers.append(result)
        elif not isinstance(result, without):
            raise result
    return answers


def by_leader(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition]
) -> dict[int, dict[str, list[int]]]:
    """Return the partitions of each broker that leads some, by topic.

    Raises:
        KafkaError: a leader is not known.
    """
    found: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for partition in partitions:
        leader = client.cluster.leader_for_partition(partition)
        if leader is None or leader < 0:
            if partition.topic in client.cluster.unauthorized_topics:
                raise kafka.TopicAuthorizationFailedError(partition.topic)
            raise kafka.LeaderNotAvailableError(partition)
        found[leader][partition.topic].append(partition.partition)
    return found


def raise_for(code: int, topic: str) -> None:
    """Raise what an error code says of a topic."""
    error = kafka.for_code(code)
    if error is not kafka.NoError:
        raise error(topic)


async def stop(consumer: AIOKafkaConsumer) -> None:
    """Disconnect a consumer, whatever else is cancelled."""
    with anyio.move_on_after(STOP_S, shield=True):
        await consumer.stop()
