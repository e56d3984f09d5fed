"""Transactions that stay open in a partition although their coordinator has ended them.

A coordinator that does not know the leader of a partition takes it for deleted, leaves its marker
out and calls the transaction complete: in Kafka since 4.1 also for the moment in which a restarted
broker is not yet the leader again. Readers wait there for ever then, and the records become part
of the next transaction that their producer id has in the partition, whichever way that one ends.
So a commit counts when it can be read, and a producer begins by ending what hangs.

Source: KAFKA-20734; KIP-664 for hanging transactions and the requests that find them.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import CoordinationType

from blueflow.kafka.connection import REQUEST_TIMEOUT_S
from blueflow.kafka.offsets import (
    answers_of,
    ask_ends,
    by_leader,
    connected,
    raise_for,
    until_answered,
)
from blueflow.kafka.protocol import (
    TRANSACTIONAL_ID_NOT_FOUND,
    DescribeProducers,
    DescribeTransactions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiokafka.client import AIOKafkaClient

    from blueflow.kafka.connection import Connection

_OTHERS_S: Final = 0.5  # a marker comes within milliseconds; later it is somebody else who holds
_UNTOLD_S: Final = 3.0  # when nobody tells whose it is
_POLL_MIN_S, _POLL_MAX_S = 0.003, 0.1
_COMMITS: Final = {"PrepareCommit", "CompleteCommit"}
_UNDECIDED: Final = {"Empty", "Dead"}
_TOO_OLD: Final = (kafka.IncompatibleBrokerVersion, NotImplementedError)


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


class LeftOpen(NamedTuple):
    """Where transactions of a producer hang that has none.

    Attributes:
        ours: where the brokers say so.
        in_doubt: where one is open and they do not say whose, for want of the right to read the
            topic, or since they are older than the question.
    """

    ours: set[TopicPartition]
    in_doubt: set[TopicPartition]


async def open_transactions(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, list[OpenTransaction]]:
    """Ask the leaders once which transactions are open, over a client that knows the topics.

    Partitions of which they do not tell are left out: we may not read the topic, or they are older
    than the question.

    Raises:
        KafkaError: a leader is unknown, does not answer, or refuses.
    """
    requests = [
        client.send(node, DescribeProducers(topics))
        for node, topics in by_leader(client, partitions).items()
    ]
    found = {}
    for answer in await answers_of(requests, without=_TOO_OLD):
        for topic, described, _tags in answer.topics:
            for number, code, _message, producers, _more_tags in described:
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

    An open transaction of somebody else is not waited for; if the brokers do not tell whose it is,
    for 3 s.

    Args:
        client: knows the topics.
        ends: the offset behind the last record of the transaction, by partition; -1 is the end.
        producer_id: whose transaction it is.

    Raises:
        KafkaError: the brokers refuse.
    """
    left, poll_s, began_s = dict(ends), _POLL_MIN_S, time.monotonic()
    while True:
        waited_s = time.monotonic() - began_s
        ask = partial(_not_readable, client, left, producer_id, waited_s)
        left = await until_answered(client, ask)
        if not left:
            return
        await anyio.sleep(poll_s)
        poll_s = min(2 * poll_s, _POLL_MAX_S)


async def _not_readable(
    client: AIOKafkaClient, ends: dict[TopicPartition, int], producer_id: int, waited_s: float
) -> dict[TopicPartition, int]:
    if unknown := [one for one, end in ends.items() if end < 0]:
        ends = {**ends, **await ask_ends(client, unknown, open_too=True)}
    stable = await ask_ends(client, ends, open_too=False)
    ends = {one: end for one, end in ends.items() if stable[one] < end}
    if not ends or waited_s < _OTHERS_S:
        return ends
    found = await open_transactions(client, ends)
    left = {}
    for partition, end in ends.items():
        opened = found.get(partition)
        if opened is None:
            others_only = waited_s >= _UNTOLD_S
        else:  # without any the leader has the marker, and its replicas do not yet
            others_only = bool(opened) and not _has(opened, producer_id)
        if not others_only:
            left[partition] = end
    return left


async def left_open(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition], producer_id: int
) -> LeftOpen:
    """Return where transactions of a producer hang that has none; the caller bounds the time.

    Raises:
        KafkaError: the brokers refuse.
    """
    asked = list(partitions)

    async def ask() -> LeftOpen:
        stable = await ask_ends(client, asked, open_too=False)
        ends = await ask_ends(client, asked, open_too=True)
        suspects = {one for one in asked if stable[one] < ends[one]}
        found = await open_transactions(client, suspects) if suspects else {}
        ours = {one for one, opened in found.items() if _has(opened, producer_id)}
        return LeftOpen(ours, suspects - set(found))

    return await until_answered(client, ask)


async def until_ended(
    client: AIOKafkaClient, partitions: Iterable[TopicPartition], producer_id: int
) -> None:
    """Wait until the brokers say of none of these that a transaction of a producer is open.

    Raises:
        KafkaError: the brokers refuse.
    """
    asked = set(partitions)

    async def ask() -> bool:
        found = await open_transactions(client, asked)
        return not any(_has(opened, producer_id) for opened in found.values())

    while not await until_answered(client, ask):  # noqa: ASYNC110 - only asking tells
        await anyio.sleep(_POLL_MAX_S)


async def is_committed(
    connection: Connection, transactional_id: str, partitions: Iterable[TopicPartition]
) -> bool | None:
    """Return how the coordinator has decided on the last transaction of an id.

    To be asked before the next producer gets its id: that aborts what is undecided, and forgets
    the decision. So this comes back only when all leaders answer, and what hangs can be found.

    Args:
        connection: the brokers.
        transactional_id: whose last transaction.
        partitions: where it may hang.

    Returns:
        None: there was none, it is forgotten, or nobody tells.

    Raises:
        KafkaError, OSError, TimeoutError: no broker answers, or the id may not be written with.
    """
    asked = list(partitions)
    topics = {partition.topic for partition in asked}
    with anyio.fail_after(REQUEST_TIMEOUT_S):
        async with connected(connection, "blueflow-decision", topics) as client:
            await until_answered(client, partial(ask_ends, client, asked, open_too=True))
            return await until_answered(client, partial(_decision, client, transactional_id))


async def _decision(client: AIOKafkaClient, transactional_id: str) -> bool | None:
    try:
        node = await client.coordinator_lookup(CoordinationType.TRANSACTION, transactional_id)
        answer = await client.send(node, DescribeTransactions(transactional_id))
    except kafka.TransactionalIdAuthorizationFailed as error:  # it does not say which
        raise kafka.TransactionalIdAuthorizationFailed(transactional_id) from error
    except _TOO_OLD:
        return None
    code, _, state, *_ = answer.transaction_states[0]
    if code == TRANSACTIONAL_ID_NOT_FOUND:
        return None
    raise_for(code, transactional_id)
    return None if state in _UNDECIDED else state in _COMMITS


def _has(opened: Iterable[OpenTransaction], producer_id: int) -> bool:
    return any(one.producer_id == producer_id for one in opened)
