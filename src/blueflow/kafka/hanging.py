"""Transactions that stay open in a partition although their coordinator has ended them.

A coordinator that does not know the leader of a partition takes it for deleted, leaves its marker
out and calls the transaction complete: in Kafka since 4.1 also for the moment in which a restarted
broker is not yet the leader again. Readers wait there for ever then, and the records become part
of the next transaction that their producer id has in the partition, whichever way that one ends.
So a commit counts when it can be read, and a producer begins by ending what hangs.

Source: KAFKA-20734; KIP-664 for hanging transactions and the requests that find them.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient, CoordinationType

from blueflow.kafka.connection import REQUEST_TIMEOUT_S
from blueflow.kafka.offsets import STOP_S, ask_ends, by_leader, raise_for
from blueflow.kafka.protocol import (
    TRANSACTIONAL_ID_NOT_FOUND,
    DescribeProducers,
    DescribeTransactions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from blueflow.kafka.connection import Connection

_OTHERS_S: Final = 0.5  # a marker comes within milliseconds; later it is somebody else who holds
_POLL_MIN_S, _POLL_MAX_S = 0.003, 0.1
_COMMITS: Final = {"PrepareCommit", "CompleteCommit"}
_UNDECIDED: Final = {"Empty", "Dead"}
_NOT_TOLD: Final = (kafka.IncompatibleBrokerVersion, NotImplementedError)


class OpenTransaction(NamedTuple):
    """What a partition's leader knows of a transaction that is open in it.

    Attributes:
        offset: of its first record.
        producer_id: whose it is.
        last_ms: when its last record came, Unix milliseconds.
    """

    offset: int
    producer_id: int
    last_ms: int


async def open_transactions(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, list[OpenTransaction]]:
    """Ask the leaders once which transactions are open, over a client that knows the topics.

    Partitions of topics that we may not read are left out.

    Raises:
        KafkaError: a leader is unknown or refuses.
        NotImplementedError: the brokers do not know this request in a version that we do.
    """
    requests = [
        client.send(node, DescribeProducers(topics))
        for node, topics in by_leader(client, partitions).items()
    ]
    found = {}
    for answer in await asyncio.gather(*requests):
        for topic, described, _tags in answer.topics:
            for number, code, _message, producers, _tags in described:
                if kafka.for_code(code) is kafka.TopicAuthorizationFailedError:
                    continue
                raise_for(code, topic)
                # (id, epoch, last sequence, last timestamp, coordinator epoch, start, tags)
                found[TopicPartition(topic, number)] = [
                    OpenTransaction(offset=one[5], producer_id=one[0], last_ms=one[3])
                    for one in producers
                    if one[5] >= 0
                ]
    return found


async def until_readable(
    client: AIOKafkaClient, ends: Mapping[TopicPartition, int], producer_id: int
) -> None:
    """Wait until no transaction of a producer is open any more in front of these offsets.

    Args:
        client: knows the topics.
        ends: the offset behind the last record of the transaction, by partition.
        producer_id: whose transaction it is. Those of others are not waited for, provided that the
            brokers tell whose they are.

    Raises:
        KafkaError: the brokers refuse.
    """
    open_ends, poll_s = dict(ends), _POLL_MIN_S
    others_s = time.monotonic() + _OTHERS_S
    while True:
        try:
            stable = await ask_ends(client, open_ends, open_too=False)
            open_ends = {one: end for one, end in open_ends.items() if stable[one] < end}
            if open_ends and time.monotonic() > others_s:
                ours = await held_by(client, open_ends, producer_id)
                open_ends = {one: open_ends[one] for one in ours}
        except (kafka.KafkaError, OSError) as error:
            if not getattr(error, "retriable", True):
                raise
            client.force_metadata_update()
        if not open_ends:
            return
        await anyio.sleep(poll_s)
        poll_s = min(2 * poll_s, _POLL_MAX_S)


async def held_by(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition], producer_id: int
) -> set[TopicPartition]:
    """Return in which partitions a transaction of a producer is open, or may be: nobody tells.

    Raises:
        KafkaError: a leader is unknown.
    """
    asked = set(partitions)
    try:
        found = await open_transactions(client, asked)
    except _NOT_TOLD:
        return asked
    return {
        one
        for one in asked
        if one not in found or any(opened.producer_id == producer_id for opened in found[one])
    }


async def left_open(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition], producer_id: int
) -> set[TopicPartition]:
    """Return the partitions in which a transaction of a producer that has none hangs.

    Raises:
        KafkaError: a leader is unknown or refuses.
    """
    asked = list(partitions)
    stable = await ask_ends(client, asked, open_too=False)
    ends = await ask_ends(client, asked, open_too=True)
    suspects = [one for one in asked if stable[one] < ends[one]]
    return await held_by(client, suspects, producer_id) if suspects else set()


async def is_committed(connection: Connection, transactional_id: str) -> bool | None:
    """Return how the coordinator has decided on the last transaction of an id.

    To be asked before the next producer gets its id: that forgets it, and aborts what is undecided.

    Returns:
        None: there was none, it is forgotten, or nobody tells.

    Raises:
        KafkaError, OSError, TimeoutError: no broker answers, or the id may not be written with.
    """
    client = AIOKafkaClient(**connection.options("blueflow-decision"))
    try:
        with anyio.fail_after(REQUEST_TIMEOUT_S):
            await client.bootstrap()
            while True:
                try:
                    return await _decision(client, transactional_id)
                except _NOT_TOLD:
                    return None
                except kafka.KafkaError as error:  # e.g. the coordinator is loading
                    if not error.retriable:
                        raise
                await anyio.sleep(_POLL_MAX_S)
    finally:
        with anyio.move_on_after(STOP_S, shield=True):
            await client.close()


async def _decision(client: AIOKafkaClient, transactional_id: str) -> bool | None:
    try:
        node = await client.coordinator_lookup(CoordinationType.TRANSACTION, transactional_id)
    except kafka.TransactionalIdAuthorizationFailed as error:  # it does not say which
        raise kafka.TransactionalIdAuthorizationFailed(transactional_id) from error
    answer = await client.send(node, DescribeTransactions(transactional_id))
    code, _, state, *_ = answer.transaction_states[0]
    if code == TRANSACTIONAL_ID_NOT_FOUND:
        return None
    raise_for(code, transactional_id)
    return None if state in _UNDECIDED else state in _COMMITS
