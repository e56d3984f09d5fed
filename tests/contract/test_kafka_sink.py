"""The sink contract over Kafka: a real broker, read by librdkafka."""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
from tests.kafka.readers import stored_events

from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import TopicWishes
from blueflow.testing.contracts import SinkContract

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.interfaces import Sink
    from blueflow.testing.services.kafka import KafkaBroker


class TestKafkaSink(SinkContract):
    route = "by-kind"
    commit_interval_s = 0.3
    commit_bytes_max = 8 * 1024 * 1024

    @pytest.fixture(autouse=True)
    def _new_prefix(self, kafka: KafkaBroker) -> None:
        self.bootstrap = kafka.bootstrap
        self.prefix = f"contract-{secrets.token_hex(4)}."

    async def make_sink(self) -> Sink:
        return KafkaSink(
            self.bootstrap,
            origin_source=self.source,
            simulated=True,
            topic_prefix=self.prefix,
            route=self.route,
            topics=TopicWishes(partitions=3, retention_s=math.inf),
            commit_interval_s=self.commit_interval_s,
            commit_bytes_max=self.commit_bytes_max,
        )

    async def stored_events(self) -> Sequence[Mapping[str, Any]]:
        return await anyio.to_thread.run_sync(stored_events, self.bootstrap, self.prefix)


class TestKafkaSinkToOneTopicThatCommitsEveryWrite(TestKafkaSink):
    route = "single"
    commit_bytes_max = 1
