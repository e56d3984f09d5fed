"""The event topics of a prefix, as whoever reads all of them sees them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from aiokafka import TopicPartition
from aiokafka import errors as kafka

from blueflow.errors import BlueflowError, KafkaRefusesError
from blueflow.kafka.connection import Failure, as_blueflow_error, kind_of_failure, told
from blueflow.kafka.cursortopic import read_cursors
from blueflow.kafka.offsets import ends_of
from blueflow.kafka.topicids import topic_ids
from blueflow.kafka.topicnames import SINGLE, TopicNames
from blueflow.kafka.topics import partitions_of
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from blueflow.kafka.connection import Connection

_T = TypeVar("_T")

_CURSORS_S: Final = 20.0


class Layout(msgspec.Struct, frozen=True):
    """What is there to be read.

    Attributes:
        partitions: of each topic that exists.
        ids: of each topic that exists; "" where the brokers are too old to tell.
    """

    partitions: dict[str, int]
    ids: dict[str, str]


class EventTopics:
    """The topics of both routes; which of them exist may change.

    All methods raise KafkaUnavailableError, KafkaLoginError (no way to the brokers),
    KafkaRightsError (the user may not describe a topic) and KafkaRefusesError.
    """

    def __init__(self, connection: Connection, prefix: str) -> None:
        self._connection = connection
        self._names = TopicNames(prefix)
        self.topics = [f"{prefix}{name}" for name in (*DATASETS, SINGLE)]

    async def layout(self) -> Layout:
        """Return which topics and partitions there are now."""
        return await self._named(self._layout())

    async def simulated(self) -> bool | None:
        """Tell whether the events are made up; None while there is none.

        The producer says so in the topic of the cursors. Events without one are of somebody else.
        """
        return await self._named(self._simulated())

    async def _named(self, call: Awaitable[_T]) -> _T:
        """Await a call; what it fails with becomes one of our errors."""
        began_s = time.monotonic()
        try:
            return await call
        except BlueflowError:
            raise
        except (kafka.KafkaError, OSError, TimeoutError) as error:
            if kind_of_failure(error) is Failure.AWAY:
                raise await self._connection.why_not(began_s) from error
            raise as_blueflow_error(error) or KafkaRefusesError(
                self._names.prefix, told(error)
            ) from error

    async def _layout(self) -> Layout:
        partitions = await partitions_of(self._connection, self.topics)
        ids = await topic_ids(self._connection, list(partitions)) if partitions else {}
        return Layout(partitions, ids)

    async def _simulated(self) -> bool | None:
        cursor = self._names.cursor
        found = await partitions_of(self._connection, [*self.topics, cursor])
        if found.pop(cursor, None):
            table = await read_cursors(
                self._connection, cursor, "", wait_s=_CURSORS_S, open_too=False
            )
            if table.kinds:
                return any(table.kinds)
        partitions = [
            TopicPartition(topic, number)
            for topic, count in found.items()
            for number in range(count)
        ]
        ends = await ends_of(self._connection, partitions) if partitions else {}
        return False if any(ends.values()) else None
