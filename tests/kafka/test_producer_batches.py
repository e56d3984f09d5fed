"""What one life of a producer sends, and when it does not commit; over a mock cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiokafka import errors as kafka

from blueflow.kafka.connection import Connection
from blueflow.kafka.producer import BatchError, Producer
from blueflow.kafka.transaction import KafkaRecord, Partition
from blueflow.testing.kafkacodes import ApiKey, ErrorCode
from blueflow.testing.mockcluster import MockCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

POSTS, LIKES, CURSOR = Partition("posts", 0), Partition("likes", 1), Partition("cursor", 0)
LAST = {CURSOR: [(1, b"p|relay", b"{}")]}


def records(count: int, size: int = 100) -> list[KafkaRecord]:
    return [(n, b"did:plc:a", b"%d" % n + b"x" * size) for n in range(count)]


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    """A mock cluster with three topics."""
    with MockCluster(topics={"posts": 2, "likes": 2, "cursor": 1}) as cluster:
        yield cluster


@pytest.fixture(params=["blueflow.x", None], ids=["exactly-once", "at-least-once"])
async def producer(cluster: MockCluster, request: pytest.FixtureRequest) -> AsyncIterator[Producer]:
    """A producer that has begun."""
    producer = Producer(
        Connection(cluster.bootstrap),
        client_id="x",
        transactional_id=request.param,
        compression=None,
        timeout_s=10.0,
    )
    await producer.start()
    yield producer
    await producer.abort()
    await producer.discard()


async def test_everything_is_sent_and_then_committed(
    cluster: MockCluster, producer: Producer
) -> None:
    for _ in range(2):
        sent = await producer.commit({POSTS: records(5), LIKES: records(3)}, LAST)
        assert sent.records == 9
        assert sorted(count for count, _ in sent.batches) == [1, 3, 5]
        assert all(size > 0 for _, size in sent.batches)
    ends = 2 if producer._transactional else 0
    assert cluster.requests(ApiKey.END_TXN) == ends


async def test_a_batch_that_is_refused_is_told_and_nothing_is_committed(
    cluster: MockCluster, producer: Producer
) -> None:
    await producer.commit({}, LAST)
    before = cluster.requests(ApiKey.END_TXN)
    cluster.fail(ApiKey.PRODUCE, [ErrorCode.MESSAGE_TOO_LARGE])
    with pytest.raises(BatchError) as caught:
        await producer.commit({POSTS: records(5)}, LAST)
    assert isinstance(caught.value.cause, kafka.MessageSizeTooLargeError)
    assert caught.value.partition in {POSTS, CURSOR}
    assert cluster.fired(ApiKey.PRODUCE) == 1
    assert cluster.requests(ApiKey.END_TXN) == before


async def test_records_are_cut_into_batches_in_their_order(producer: Producer) -> None:
    many = records(5000, 300)
    sent = await producer.commit({POSTS: many}, LAST)
    assert sent.records == len(many) + 1
    assert len(sent.batches) > 3
    assert sum(count for count, _ in sent.batches) == len(many) + 1


async def test_a_record_larger_than_a_batch_goes_alone(producer: Producer) -> None:
    sent = await producer.commit({POSTS: [*records(1), *records(1, 500_000), *records(1)]}, LAST)
    assert [count for count, _ in sent.batches] == [1, 1, 1, 1]
