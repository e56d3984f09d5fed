"""The mock cluster serves aiokafka, and its planned errors fire and are seen."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    RequestTimedOutError,
)

from blueflow.testing import mockcluster
from blueflow.testing.kafkacodes import ApiKey, ErrorCode
from blueflow.testing.mockcluster import MockCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

PATIENCE_S = 10


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster(topics={"posts": 2}) as cluster:
        yield cluster


@asynccontextmanager
async def producing(cluster: MockCluster) -> AsyncIterator[AIOKafkaProducer]:
    """Give a transactional producer that was not started."""
    producer = AIOKafkaProducer(
        bootstrap_servers=cluster.bootstrap,
        transactional_id="blueflow.test",
        acks="all",
        request_timeout_ms=500,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield producer
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await producer.stop()


async def send(producer: AIOKafkaProducer, value: bytes) -> int:
    """Send one record of a batch, and return its offset when the broker has it."""
    batch = producer.create_batch()
    batch.append(key=b"did:plc:a", value=value, timestamp=None)
    batch.close()
    sent = await (await producer.send_batch(batch, "posts", partition=0))
    return sent.offset


async def commit(producer: AIOKafkaProducer, value: bytes) -> None:
    await producer.begin_transaction()
    await send(producer, value)
    await producer.commit_transaction()


async def read(cluster: MockCluster) -> list[bytes]:
    """Return the values in partition 0 of `posts`."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=cluster.bootstrap,
        isolation_level="read_committed",
        check_crcs=False,
    )
    await consumer.start()
    values: list[bytes] = []
    try:
        partition = TopicPartition("posts", 0)
        consumer.assign([partition])
        consumer.seek(partition, 0)
        end = (await consumer.end_offsets([partition]))[partition]
        while await consumer.position(partition) < end:
            for records in (await consumer.getmany(timeout_ms=100)).values():
                values += [record.value for record in records]
    finally:
        await consumer.stop()
    return values


async def test_transactions_commit_and_abort_and_isolate_nothing(cluster: MockCluster) -> None:
    async with producing(cluster) as producer:
        await producer.start()
        await commit(producer, b"committed")
        await producer.begin_transaction()
        await send(producer, b"aborted")
        await producer.abort_transaction()
        await producer.begin_transaction()
        await send(producer, b"open")
        assert await read(cluster) == [b"committed", b"aborted", b"open"]
        await producer.abort_transaction()
    assert [cluster.requests(api) for api in ApiKey if "TXN" in api.name] == [3, 0, 3, 0]
    assert cluster.requests(ApiKey.INIT_PRODUCER_ID) == 1
    assert cluster.requests() > cluster.requests(ApiKey.API_VERSIONS) > 0


async def test_a_second_producer_does_not_fence_the_first(cluster: MockCluster) -> None:
    async with producing(cluster) as first, producing(cluster) as second:
        await first.start()
        await first.begin_transaction()
        await second.start()
        await send(first, b"zombie")
        await first.commit_transaction()


async def test_an_error_at_start_is_raised_or_retried(cluster: MockCluster) -> None:
    api = ApiKey.INIT_PRODUCER_ID
    cluster.fail(api, [ErrorCode.REQUEST_TIMED_OUT])
    async with producing(cluster) as producer:
        with pytest.raises(RequestTimedOutError):
            await producer.start()
    cluster.fail(api, [ErrorCode.CONCURRENT_TRANSACTIONS, ErrorCode.DISCONNECT])
    async with producing(cluster) as producer:
        await producer.start()
    assert (cluster.fired(api), cluster.requests(api)) == (3, 4)


@pytest.mark.parametrize(
    "api", [ApiKey.ADD_PARTITIONS_TO_TXN, ApiKey.PRODUCE, ApiKey.END_TXN], ids=lambda api: api.name
)
async def test_an_error_in_a_transaction_is_raised_or_retried(
    cluster: MockCluster, api: ApiKey
) -> None:
    async with producing(cluster) as producer:
        await producer.start()
        cluster.fail(api, [ErrorCode.NOT_COORDINATOR, ErrorCode.DISCONNECT])
        await commit(producer, b"after two tries")
        assert (cluster.fired(api), cluster.requests(api)) == (2, 3)
        cluster.fail(api, [ErrorCode.INVALID_PRODUCER_EPOCH])
        with pytest.raises(ProducerFenced):
            await commit(producer, b"fenced")
    assert (cluster.fired(api), cluster.requests(api)) == (3, 4)


async def test_a_commit_raises_what_is_not_retried_and_ends_the_producer(
    cluster: MockCluster,
) -> None:
    async with producing(cluster) as producer:
        await producer.start()
        cluster.fail(ApiKey.END_TXN, [ErrorCode.KAFKA_STORAGE_ERROR])
        with pytest.raises(KafkaError, match="Unexpected error during batch delivery"):
            await commit(producer, b"unknown")
        with pytest.raises(AssertionError, match="FATAL_ERROR -> "):
            await producer.begin_transaction()
    assert cluster.fired(ApiKey.END_TXN) == 1


async def test_a_transaction_commits_without_a_batch_that_failed(cluster: MockCluster) -> None:
    cluster.fail(ApiKey.PRODUCE, [ErrorCode.MESSAGE_TOO_LARGE])
    async with producing(cluster) as producer:
        await producer.start()
        await producer.begin_transaction()
        with pytest.raises(MessageSizeTooLargeError):
            await send(producer, b"lost")
        await producer.commit_transaction()
    assert await read(cluster) == []
    assert cluster.fired(ApiKey.PRODUCE) == 1


async def test_an_error_lasts_until_it_is_cleared(cluster: MockCluster) -> None:
    async with producing(cluster) as producer:
        await producer.start()
        cluster.fail(ApiKey.PRODUCE, [ErrorCode.NOT_ENOUGH_REPLICAS] * 1_000)
        sending = asyncio.create_task(commit(producer, b"late"))
        while cluster.fired(ApiKey.PRODUCE) < 3:
            await asyncio.sleep(0.01)
        assert not sending.done()
        cluster.clear(ApiKey.PRODUCE)
        await sending
        assert cluster.requests(ApiKey.PRODUCE) == cluster.fired(ApiKey.PRODUCE) + 1
        await commit(producer, b"cleared")
    assert await read(cluster) == [b"late", b"cleared"]


async def test_a_late_answer_has_its_effect_and_the_retry_is_a_duplicate(
    cluster: MockCluster,
) -> None:
    cluster.fail_after(ApiKey.PRODUCE, [(ErrorCode.NONE, 1_000)])
    async with producing(cluster) as producer:
        await producer.start()
        await producer.begin_transaction()
        assert await send(producer, b"once") == -1  # the answer to the second try
        await producer.commit_transaction()
    assert await read(cluster) == [b"once"]
    assert (cluster.fired(ApiKey.PRODUCE), cluster.requests(ApiKey.PRODUCE)) == (1, 2)
    with pytest.raises(ValueError, match="fail_after was used"):
        cluster.fail(ApiKey.PRODUCE, [ErrorCode.REQUEST_TIMED_OUT])


async def test_a_cluster_that_is_down_refuses_until_it_is_up(cluster: MockCluster) -> None:
    async with producing(cluster) as producer:
        await producer.start()
        cluster.set_rtt(20)
        cluster.down()
        host, port = cluster.bootstrap.split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
        cluster.up()
        await commit(producer, b"after the outage")
    assert await read(cluster) == [b"after the outage"]


async def test_leader_coordinator_and_topic_are_set() -> None:
    with MockCluster(brokers=2, topics={"posts": 1}) as cluster:
        assert cluster.bootstrap.count(":") == 2
        async with producing(cluster) as producer:
            await producer.start()
            for broker in (1, 2):
                cluster.set_leader("posts", 0, broker)
                cluster.set_coordinator("blueflow.test", broker)
                await commit(producer, b"wherever")
            cluster.fail_topic("posts", ErrorCode.INVALID_PRODUCER_EPOCH)
            with pytest.raises(ProducerFenced):
                await commit(producer, b"no topic")
        for wrong in (lambda: cluster.down(broker=9), lambda: cluster.set_leader("posts", 9, 1)):
            with pytest.raises(ValueError, match="refuses"):
                wrong()


def test_it_is_used_while_it_runs() -> None:
    cluster = MockCluster()
    with cluster:
        assert cluster.requests() == 0
    for _ in range(2):
        with pytest.raises(ValueError, match="while it runs"):
            cluster.requests()
        cluster.stop()
    broken = MockCluster(topics={"posts": "four"})  # type: ignore[dict-item]
    with pytest.raises(ctypes.ArgumentError):
        broken.start()
    with pytest.raises(ValueError, match="while it runs"):
        broken.requests()


def test_without_the_library_the_way_to_get_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "confluent_kafka" / ".dylibs" / "librdkafka.1.dylib"
    library.parent.mkdir(parents=True)
    (tmp_path / "confluent_kafka" / "__init__.py").touch()
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "confluent_kafka", raising=False)  # another test's import
    assert mockcluster._path() == str(library)
    library.unlink()
    monkeypatch.setattr(mockcluster, "find_library", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install confluent-kafka"):
        mockcluster._path()


def test_no_kafka_client_is_imported() -> None:
    code = (
        "import sys, blueflow.testing.mockcluster, blueflow.testing.kafkaproxy\n"
        "print(*(name for name in sys.modules if 'kafka' in name and 'blueflow' not in name))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
