"""Topics of a real broker: made when missing, checked when there, never altered."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,
    NewTopic,
)
from tests.kafka.readers import topics_of

from blueflow.errors import BlueflowError, Exit, TopicError
from blueflow.kafka.connection import Connection
from blueflow.kafka.topicnames import TopicNames
from blueflow.kafka.topics import TopicWishes, ensure_topics, partitions_of
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blueflow.kafka.topics import Topics
    from blueflow.testing.services.kafka import KafkaBroker

DAY_MS = 86_400_000
LARGE = 8 * 1024 * 1024


class Cluster:
    """The shared broker, and a prefix of this test's own."""

    def __init__(self, broker: KafkaBroker) -> None:
        self.bootstrap = broker.bootstrap
        self.connection = Connection(broker.bootstrap)
        self.admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
        self.prefix = f"topics-{secrets.token_hex(4)}."

    async def ensure(
        self, wishes: TopicWishes | None = None, *, route: str = "by-kind", prefix: str = ""
    ) -> Topics:
        names = TopicNames(prefix or self.prefix, route)
        with anyio.fail_after(30):
            return await ensure_topics(self.connection, names, wishes or TopicWishes())

    async def refused(self, **arguments: object) -> TopicError:
        with pytest.raises(TopicError) as caught:
            await self.ensure(**arguments)  # type: ignore[arg-type]
        return caught.value

    def make(self, name: str, partitions: int, config: Mapping[str, str] | None = None) -> None:
        new = NewTopic(self.prefix + name, partitions, 1, config=dict(config or {}))
        self.admin.create_topics([new])[self.prefix + name].result(30)
        while name not in self.counts():  # the controller knows it before the broker does
            time.sleep(0.02)

    def config(self, name: str) -> dict[str, str]:
        resource = ConfigResource(ConfigResource.Type.TOPIC, self.prefix + name)
        (answer,) = self.admin.describe_configs([resource]).values()
        return {key: entry.value for key, entry in answer.result(30).items()}

    def counts(self) -> dict[str, int]:
        topics = topics_of(self.bootstrap, self.prefix)
        return {name.removeprefix(self.prefix): count for name, count in topics.items()}


@pytest.fixture
def cluster(kafka: KafkaBroker) -> Cluster:
    """The shared broker, and a prefix of this test's own."""
    return Cluster(kafka)


async def test_missing_topics_are_made_as_wished_and_then_found(cluster: Cluster) -> None:
    wishes = TopicWishes(3, retention_s=86_400.0)
    made = await cluster.ensure(wishes)
    assert (made.partitions, made.retention_s) == (3, 86_400.0)
    assert made.shortest.startswith(cluster.prefix)
    assert cluster.counts() == {**dict.fromkeys(DATASETS, 3), "cursor": 1, "dlq": 1}
    for name in (*DATASETS, "dlq"):
        config = cluster.config(name)
        assert config["retention.ms"] == str(DAY_MS)
        assert config["max.message.bytes"] == str(LARGE)
        assert config["cleanup.policy"] == "delete"
    assert cluster.config("cursor")["cleanup.policy"] == "compact"
    before = {name: cluster.config(name) for name in cluster.counts()}
    assert await cluster.ensure(wishes) == made
    assert await cluster.ensure(TopicWishes(9, retention_s=math.inf)) == made
    assert {name: cluster.config(name) for name in cluster.counts()} == before


async def test_one_topic_for_all_that_keeps_for_ever(cluster: Cluster) -> None:
    made = await cluster.ensure(TopicWishes(2, 1, math.inf), route="single")
    assert (made.partitions, made.retention_s) == (2, math.inf)
    assert cluster.counts() == {"events": 2, "cursor": 1, "dlq": 1}
    assert cluster.config("events")["retention.ms"] == "-1"


async def test_several_that_start_at_once_find_the_same_topics(cluster: Cluster) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cluster.ensure(TopicWishes(4))) for _ in range(4)]
    assert {task.result().partitions for task in tasks} == {4}
    assert cluster.counts() == {**dict.fromkeys(DATASETS, 4), "cursor": 1, "dlq": 1}


async def test_several_with_different_wishes_use_the_partitions_that_there_are(
    cluster: Cluster,
) -> None:
    """Else the events of an account are where neither a reader nor the next start expects them."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cluster.ensure(TopicWishes(n))) for n in (5, 2, 3, 4)]
    counts = {cluster.counts()[name] for name in DATASETS}
    assert {task.result().partitions for task in tasks} == counts
    assert len(counts) == 1


async def test_missing_topics_get_as_many_partitions_as_those_that_are_there(
    cluster: Cluster,
) -> None:
    cluster.make("likes", 5, {"max.message.bytes": str(LARGE), "retention.ms": "60000"})
    made = await cluster.ensure(TopicWishes(3, retention_s=86_400.0))
    assert made.partitions == 5
    assert cluster.counts() == {**dict.fromkeys(DATASETS, 5), "cursor": 1, "dlq": 1}
    assert (made.shortest, made.retention_s) == (f"{cluster.prefix}likes", 60.0)


async def test_unequal_numbers_of_partitions_are_refused_and_nothing_is_made(
    cluster: Cluster,
) -> None:
    cluster.make("likes", 5)
    cluster.make("posts", 3)
    error = await cluster.refused()
    assert error.topic == f"{cluster.prefix}posts"
    assert "has 3 partitions" in error.problem
    assert f"{cluster.prefix}likes 5" in error.problem
    assert error.exit_code == Exit.REFUSED
    assert cluster.counts() == {"likes": 5, "posts": 3}


@pytest.mark.parametrize(
    ("name", "partitions", "config", "problem"),
    [
        ("cursor", 1, {"cleanup.policy": "delete"}, "is not only compacted"),
        ("cursor", 2, {"cleanup.policy": "compact"}, "has 2 partitions instead of one"),
        ("posts", 2, {"max.message.bytes": "1048588"}, "takes records up to 1,048,588 bytes"),
        (
            "posts",
            2,
            {"cleanup.policy": "compact", "max.message.bytes": str(LARGE)},
            "is compacted, so it would keep one record",
        ),
        ("dlq", 1, {"max.message.bytes": "1000"}, "takes records up to 1,000 bytes"),
        ("dlq", 1, {"cleanup.policy": "compact"}, "is compacted, so it would keep one record"),
    ],
    ids=["cursor-deleted", "cursor-partitions", "small", "compacted", "dlq-small", "dlq-compacted"],
)
async def test_a_topic_that_is_not_as_it_has_to_be_is_refused(
    cluster: Cluster, name: str, partitions: int, config: dict[str, str], problem: str
) -> None:
    cluster.make(name, partitions, config)
    error = await cluster.refused(wishes=TopicWishes(2))
    assert error.topic == cluster.prefix + name
    assert problem in error.problem
    assert cluster.config(name).items() >= config.items()  # and it was not altered


async def test_a_topic_that_counts_from_the_arrival_keeps_old_events_too(cluster: Cluster) -> None:
    sizes = {"max.message.bytes": str(LARGE), "retention.ms": "3600000"}
    cluster.make("posts", 2, {**sizes, "message.timestamp.type": "LogAppendTime"})
    cluster.make("likes", 2, {**sizes, "retention.ms": "7200000"})
    topics = await ensure_topics(cluster.connection, TopicNames(cluster.prefix), TopicWishes(2))
    assert (topics.shortest, topics.retention_s) == (f"{cluster.prefix}likes", 7200)


async def test_a_cursor_that_is_compacted_and_deleted_too_is_refused(cluster: Cluster) -> None:
    """Retention removes the newest record of a pipeline that rested: its position."""
    cluster.make("cursor", 1, {"cleanup.policy": "compact,delete"})
    error = await cluster.refused(wishes=TopicWishes(2))
    assert error.topic == f"{cluster.prefix}cursor"


async def test_what_the_broker_says_about_replicas_is_told(cluster: Cluster) -> None:
    error = await cluster.refused(wishes=TopicWishes(2, replication=3))
    assert error.topic.startswith(cluster.prefix)
    assert "cannot be created: " in error.problem
    assert "replication factor" in error.problem.lower()
    assert not error.problem.endswith(".")
    assert cluster.counts() == {}


@pytest.mark.parametrize("prefix", ["blue sky.", "a/b.", "x" * 249, "ä."])
async def test_a_prefix_that_kafka_does_not_take_is_told(cluster: Cluster, prefix: str) -> None:
    error = await cluster.refused(prefix=prefix)
    assert error.topic.startswith(prefix)


async def test_partitions_of_topics_that_are_there(cluster: Cluster) -> None:
    cluster.make("posts", 3)
    names = [f"{cluster.prefix}{name}" for name in ("posts", "likes")]
    assert await partitions_of(cluster.connection, names) == {names[0]: 3}


async def test_no_broker_is_told_by_what_the_sink_understands(free_tcp_port: int) -> None:
    connection = Connection(f"127.0.0.1:{free_tcp_port}")
    with pytest.raises(Exception, match=r".") as caught:
        await ensure_topics(connection, TopicNames("x."), TopicWishes())
    assert not isinstance(caught.value, BlueflowError)
