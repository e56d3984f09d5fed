"""`blueflow.kafka.read`: typed events out of Kafka, each committed one, from where you say."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from blueflow.errors import SettingError
from blueflow.events import Event, decode_line
from blueflow.kafka.connection import Connection
from blueflow.kafka.fetcher import STALL_TIMEOUT_S, Fetcher
from blueflow.kafka.topicnames import PREFIX, SINGLE
from blueflow.logs import Throttle
from blueflow.records import DATASETS, dataset_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiokafka import ConsumerRecord, TopicPartition

_LOCAL = "localhost:9092"

_logger = logging.getLogger(__name__)


class NoEvent(msgspec.Struct, frozen=True):
    """A record that is no event. `problem` is for people."""

    offset: int
    value: bytes | None
    problem: str


class EventBatch(msgspec.Struct, frozen=True):
    """Consecutive events of one partition.

    Attributes:
        topic: where they were.
        partition: its number.
        events: in the order of the partition.
        offsets: of each event; they rise, with gaps.
        next_offset: where the partition goes on behind this batch.
        rejected: records between them that are no events.
    """

    topic: str
    partition: int
    events: Sequence[Event]
    offsets: Sequence[int]
    next_offset: int
    rejected: Sequence[NoEvent] = ()


def read(
    *datasets: str,
    connection: str | Connection = _LOCAL,
    topic_prefix: str = PREFIX,
    start: str | datetime = "oldest",
    positions: Mapping[tuple[str, int], int] | None = None,
    until_end: bool = False,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> Reader:
    """Return the committed events of the topics that `blueflow produce` writes.

    ```python
    async with blueflow.kafka.read("posts", until_end=True) as batches:
        async for batch in batches:
            for post in batch.events:
                print(post.uri)
    ```

    There is no consumer group: you say where to begin, and keep `Reader.positions` with what you
    made of the events, in one transaction if you want each exactly once. Both routes are read, a
    topic for each data set and one for all.

    Args:
        datasets: posts, likes, reposts, follows, other, accounts; none is all.
        connection: the brokers: "HOST:PORT[,HOST:PORT]", or a `Connection` with credentials.
        topic_prefix: what the names of the topics begin with.
        start: where partitions begin that `positions` does not name: "oldest", "newest", or a
            time, compared with the relay time of the events.
        positions: (topic, partition) to the offset to begin at, as `Reader.positions` gives it,
            also that of a reader of more data sets.
        until_end: end where the committed records end now, instead of waiting for more. A
            transaction that is open at that moment has 5 s to end, since a commit is answered a
            little before it can be read; what comes behind it is left for the next time.
        stall_timeout_s: how long to wait for records that are there and cannot be read; the time
            that you take between two batches does not count.

    Raises:
        SettingError: there is no such data set, no such start, or an offset that cannot be.
    """
    for name in datasets:
        if name not in DATASETS:
            problem = f"{name!r} is none of {', '.join(DATASETS)}"
            raise SettingError("datasets", "blueflow.kafka.read", problem)
    if not isinstance(start, datetime) and start not in {"oldest", "newest"}:
        problem = f"{start!r} is neither oldest, newest nor a datetime"
        raise SettingError("start", "blueflow.kafka.read", problem)
    for place, offset in (positions or {}).items():
        if type(offset) is not int or offset < 0:
            problem = f"{place} cannot begin at {offset!r}"
            raise SettingError("positions", "blueflow.kafka.read", problem)
    return Reader(
        Connection(connection) if isinstance(connection, str) else connection,
        frozenset(datasets or DATASETS),
        topic_prefix,
        start,
        dict(positions or {}),
        until_end=until_end,
        stall_timeout_s=stall_timeout_s,
    )


class Reader(Fetcher[EventBatch]):
    """Batches of committed events. Made by `read()`, read once."""

    @cached_property
    def _rejects(self) -> Throttle:
        return Throttle()

    def _batch_of(self, partition: TopicPartition, records: list[ConsumerRecord]) -> EventBatch:
        events: list[Event] = []
        offsets: list[int] = []
        rejected: list[NoEvent] = []
        single = partition.topic == self._prefix + SINGLE
        for record in records:
            try:
                event = decode_line(record.value or b"", "", 0)
            except msgspec.MsgspecError as error:
                rejected.append(NoEvent(record.offset, record.value, str(error)))
                continue
            if not single or dataset_of(event) in self._datasets:
                events.append(event)
                offsets.append(record.offset)
        if rejected and self._rejects.admit(time.time()) is not None:
            extra = {
                "topic": partition.topic,
                "partition": partition.partition,
                "offset": rejected[0].offset,
                "problem": rejected[0].problem,
            }
            _logger.warning("a record is no event; see EventBatch.rejected", extra=extra)
        return EventBatch(
            partition.topic,
            partition.partition,
            events,
            offsets,
            records[-1].offset + 1,
            rejected,
        )
