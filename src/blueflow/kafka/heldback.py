"""Who holds a partition back: the open transaction in front of everything that was committed.

Source: KIP-664, the requests DescribeProducers and ListTransactions, which aiokafka does not have.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import anyio
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

from blueflow.kafka.connection import REQUEST_TIMEOUT_S

if TYPE_CHECKING:
    from aiokafka import TopicPartition

    from blueflow.kafka.connection import Connection

_logger = logging.getLogger(__name__)

UNKNOWN = "a transaction of an unknown producer"
_TAGS = ("tags", TaggedFields)


class _DescribeProducersResponse(Response):
    API_KEY = 61
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition_index", Int32),
                        ("error_code", Int16),
                        ("error_message", CompactString("utf-8")),
                        (
                            "active_producers",
                            CompactArray(
                                ("producer_id", Int64),
                                ("producer_epoch", Int32),
                                ("last_sequence", Int32),
                                ("last_timestamp", Int64),
                                ("coordinator_epoch", Int32),
                                ("current_txn_start_offset", Int64),
                                _TAGS,
                            ),
                        ),
                        _TAGS,
                    ),
                ),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class _DescribeProducersStruct(RequestStruct):
    API_KEY = 61
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _DescribeProducersResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")), ("partition_indexes", CompactArray(Int32)), _TAGS
            ),
        ),
        _TAGS,
    )


class _DescribeProducers(Request[_DescribeProducersStruct]):
    API_KEY = 61

    def __init__(self, partition: TopicPartition) -> None:
        self._partition = partition

    def build(self, request_struct_class: type[_DescribeProducersStruct]) -> Any:
        return request_struct_class([(self._partition.topic, [self._partition.partition], {})], {})


class _ListTransactionsResponse(Response):
    API_KEY = 66
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("unknown_state_filters", CompactArray(CompactString("utf-8"))),
        (
            "transaction_states",
            CompactArray(
                ("transactional_id", CompactString("utf-8")),
                ("producer_id", Int64),
                ("transaction_state", CompactString("utf-8")),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class _ListTransactionsStruct(RequestStruct):
    API_KEY = 66
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _ListTransactionsResponse
    SCHEMA = Schema(
        ("state_filters", CompactArray(CompactString("utf-8"))),
        ("producer_id_filters", CompactArray(Int64)),
        _TAGS,
    )


class _ListTransactions(Request[_ListTransactionsStruct]):
    API_KEY = 66

    def __init__(self, producer_id: int) -> None:
        self._producer_id = producer_id

    def build(self, request_struct_class: type[_ListTransactionsStruct]) -> Any:
        return request_struct_class([], [self._producer_id], {})


async def holder_of(connection: Connection, partition: TopicPartition) -> str:
    """Say whose open transaction comes first in a partition, as well as the brokers know it.

    Never raises for want of rights, of an answer, or of a broker that knows these requests.
    """
    client = AIOKafkaClient(**connection.options("blueflow-held-back"))
    try:
        with anyio.move_on_after(REQUEST_TIMEOUT_S):
            return await _holder(client, partition)
    except (KafkaError, OSError, TimeoutError, ValueError, NotImplementedError):
        _logger.debug("the brokers do not say who holds a partition back", exc_info=True)
    finally:
        with anyio.move_on_after(REQUEST_TIMEOUT_S, shield=True):
            await client.close()
    return UNKNOWN


async def _holder(client: AIOKafkaClient, partition: TopicPartition) -> str:
    await client.bootstrap()
    await client.set_topics([partition.topic])
    leader = client.cluster.leader_for_partition(partition)
    answer = await client.send(leader, _DescribeProducers(partition))
    producers = answer.topics[0][1][0][3]
    # (start of its transaction, id, time of its last record)
    opened = [(one[5], one[0], one[3]) for one in producers if one[5] >= 0]
    if not opened:
        return UNKNOWN
    _, producer_id, last_ms = min(opened)
    name = await _transactional_id(client, producer_id)
    quiet_s = time.time() - last_ms / 1000
    return f"{name}, producer id {producer_id}, whose last record came {quiet_s:.0f} s ago"


async def _transactional_id(client: AIOKafkaClient, producer_id: int) -> str:
    for broker in client.cluster.brokers():  # each coordinates some of the transactional ids
        answer = await client.send(broker.nodeId, _ListTransactions(producer_id))
        for transactional_id, found, *_ in answer.transaction_states:
            if found == producer_id:
                return f"transactional id {transactional_id!r}"
    return "a producer without a transactional id that may be shown"
