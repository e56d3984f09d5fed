"""One life of a producer ends with the reason for its end, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import secrets
from typing import TYPE_CHECKING

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka

from blueflow.kafka import producer as module
from blueflow.kafka.connection import Connection, origin_of
from blueflow.kafka.offsets import ask_ends
from blueflow.kafka.producer import BatchError, Producer
from blueflow.kafka.transaction import KafkaRecord, Partition
from blueflow.testing.kafkacodes import ApiKey, ErrorCode
from blueflow.testing.mockcluster import MockCluster

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 10
PARTITIONS = 4  # of a topic that appears when it is asked for
CAUSES = {
    ErrorCode.INVALID_PRODUCER_EPOCH: kafka.ProducerFenced,
    ErrorCode.INVALID_TXN_STATE: kafka.InvalidTxnState,
    ErrorCode.TOPIC_AUTHORIZATION_FAILED: kafka.TopicAuthorizationFailedError,
    ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: kafka.TransactionalIdAuthorizationFailed,
    ErrorCode.KAFKA_STORAGE_ERROR: kafka.KafkaStorageError,
}
CAUSE_NAMES = [code.name for code in CAUSES]


@pytest.fixture(scope="module")
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        yield cluster


def a_producer(cluster: MockCluster, *, timeout_s: float = PATIENCE_S) -> Producer:
    name = secrets.token_hex(4)
    return Producer(
        Connection(cluster.bootstrap),
        client_id=name,
        transactional_id=name,
        compression="zstd",
        timeout_s=timeout_s,
    )


def records(topics: int = 1, each: int = 1) -> dict[Partition, list[KafkaRecord]]:
    """Return records for so many topics; each with so many batches in each partition."""
    record = (1_783_180_800_000, b"did:plc:a", bytes(300_000))
    return {
        Partition(f"topic{topic}", number): [record] * each
        for topic in range(topics)
        for number in range(PARTITIONS)
    }


@pytest.mark.parametrize(("code", "cause"), CAUSES.items(), ids=CAUSE_NAMES)
@pytest.mark.parametrize(
    "api", [ApiKey.ADD_PARTITIONS_TO_TXN, ApiKey.END_TXN], ids=lambda api: api.name
)
async def test_the_reason_is_what_the_broker_said_whatever_aiokafka_was_doing(
    cluster: MockCluster,
    caplog: pytest.LogCaptureFixture,
    api: ApiKey,
    code: ErrorCode,
    cause: type[Exception],
) -> None:
    before, fired = asyncio.all_tasks(), cluster.fired(api)
    producer = a_producer(cluster)
    await producer.start()
    cluster.fail(api, [code])
    # So many batches that some are still to be handed over when the transaction has failed.
    with pytest.raises((BatchError, kafka.KafkaError)) as raised:
        await producer.commit(records(topics=4, each=3), {})
    error = raised.value.cause if isinstance(raised.value, BatchError) else raised.value
    assert isinstance(origin_of(error), cause)
    assert cluster.fired(api) == fired + 1
    await producer.discard()
    assert asyncio.all_tasks() == before
    del producer, raised, error
    await asyncio.sleep(0)  # transports close in the next round
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_what_failed_twice_is_aborted_without_a_complaint(
    cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    producer = a_producer(cluster)
    await producer.start()
    for api in (ApiKey.ADD_PARTITIONS_TO_TXN, ApiKey.PRODUCE):
        cluster.fail(api, [ErrorCode.TOPIC_AUTHORIZATION_FAILED])
    with pytest.raises(BatchError):
        await producer.commit(records(), {})
    await producer.abort()
    await producer.discard()
    del producer
    await asyncio.sleep(0)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_producer_is_discarded_at_any_moment(
    cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    for wait_s in (0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.16):
        producer = a_producer(cluster)
        await producer.start()
        committing = asyncio.create_task(producer.commit(records(topics=2, each=3), {}))
        await asyncio.sleep(wait_s)
        committing.cancel()
        await asyncio.wait([committing])
        await producer.discard()
        await producer.discard()
        assert asyncio.all_tasks() == before
        del producer, committing
    await asyncio.sleep(0)  # transports close in the next round
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_producer_is_discarded_between_two_tries_of_a_batch(
    cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    producer = a_producer(cluster, timeout_s=0.5)
    await producer.start()
    cluster.fail(ApiKey.PRODUCE, [ErrorCode.KAFKA_STORAGE_ERROR] * 1_000)
    with pytest.raises(TimeoutError):
        await producer.commit(records(), {})
    accumulator = producer._producer._message_accumulator
    again = set(accumulator._pending_batches)
    for batch in again:  # as aiokafka does; it then waits while the partition has no leader
        accumulator.reenqueue(batch)
    await producer.discard()
    cluster.clear(ApiKey.PRODUCE)
    assert again
    await asyncio.sleep(0)
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_producer_that_never_started_is_discarded(cluster: MockCluster) -> None:
    before, fired = asyncio.all_tasks(), cluster.fired(ApiKey.INIT_PRODUCER_ID)
    producer = a_producer(cluster, timeout_s=0.3)
    cluster.fail(ApiKey.INIT_PRODUCER_ID, [ErrorCode.CONCURRENT_TRANSACTIONS] * 1_000)
    with pytest.raises(TimeoutError):
        await producer.start()
    cluster.clear(ApiKey.INIT_PRODUCER_ID)
    await producer.abort()
    await producer.discard()
    assert asyncio.all_tasks() == before
    assert cluster.fired(ApiKey.INIT_PRODUCER_ID) > fired + 1


async def test_a_commit_ends_when_all_of_it_can_be_read(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[tuple[dict[TopicPartition, int], int]] = []

    async def until_readable(_: object, ends: dict[TopicPartition, int], producer_id: int) -> None:
        await asyncio.sleep(0)
        waited.append((ends, producer_id))

    monkeypatch.setattr(module, "until_readable", until_readable)
    producer = a_producer(cluster)
    await producer.start()
    sent = records(topics=2, each=3)
    last = {Partition("cursor", 0): [(1_783_180_800_000, b"a", b"b")]}
    await producer.commit(sent, last)
    (ends, producer_id), client = waited.pop(), producer._producer.client
    assert set(ends) == {TopicPartition(*one) for one in [*sent, *last]}
    # The mock's brokers keep no transactions apart: the end is behind the marker.
    assert await ask_ends(client, ends, open_too=False) == {one: at + 1 for one, at in ends.items()}
    assert producer_id == producer._producer._txn_manager.producer_id
    await producer.discard()
