"""The event topics of a prefix, as whoever reads all of them sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from aiokafka import TopicPartition

from blueflow.kafka.cursortopic import read_cursors
from blueflow.kafka.offsets import ends_of
from blueflow.kafka.topicids import topic_ids
from blueflow.kafka.topicnames import SINGLE, TopicNames
from blueflow.kafka.topics import partitions_of
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from blueflow.kafka.connection import Connection

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

    All methods raise KafkaError, OSError, TimeoutError (no broker answers, or it refuses) and
    KafkaRightsError (the user may not describe a topic).
    """

    def __init__(self, connection: Connection, prefix: str) -> None:
        self._connection = connection
        self._names = TopicNames(prefix)
        self.topics = [f"{prefix}{name}" for name in (*DATASETS, SINGLE)]

    async def layout(self) -> Layout:
        """Return which topics and partitions there are now."""
        partitions = await partitions_of(self._connection, self.topics)
        ids = await topic_ids(self._connection, list(partitions)) if partitions else {}
        return Layout(partitions, ids)

    async def simulated(self) -> bool | None:
        """Tell whether the events are made up; None while there is none.

        The producer says so in the topic of the cursors. Events without one are of somebody else.
        """
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
