"""What every reader of our topics does: assign, begin, fetch, and never stand still in silence."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import anyio
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka

from blueflow.errors import (
    BlueflowError,
    HeldBackError,
    KafkaRefusesError,
    RecordsGoneError,
    SettingError,
    TopicError,
)
from blueflow.kafka.connection import (
    REQUEST_TIMEOUT_S,
    Failure,
    as_blueflow_error,
    bounded,
    connecting,
    kind_of_failure,
    told,
)
from blueflow.kafka.heldback import holder_of
from blueflow.kafka.offsets import ends_of, stop
from blueflow.kafka.stall import StallWatch
from blueflow.kafka.topicnames import SINGLE
from blueflow.kafka.topics import partitions_of
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime
    from types import TracebackType
    from typing import Self

    from aiokafka import ConsumerRecord

    from blueflow.kafka.connection import Connection

STALL_TIMEOUT_S: Final = 60.0
STALL_WARN_S: Final = 10.0
BATCH_EVENTS_MAX: Final = 10_000
_POLL_S = 0.5
_SETTLE_S = 5.0

_logger = logging.getLogger(__name__)


class Placed(Protocol):
    """What every batch says of its place."""

    @property
    def topic(self) -> str:
        """Where its records were."""

    @property
    def partition(self) -> int:
        """The number of the partition."""

    @property
    def next_offset(self) -> int:
        """Where the partition goes on behind it."""


_Batch = TypeVar("_Batch", bound=Placed)


class Fetcher(ABC, Generic[_Batch]):
    """Batches of committed records of our topics, read once; what a batch is, the subclass says.

    Args:
        connection: the brokers.
        datasets: which topics; the one for all events is read in any case.
        topic_prefix: what their names begin with.
        start: where partitions begin that `positions` does not name.
        positions: (topic, partition) to the offset to begin at.
        until_end: end where the committed records end now.
        stall_timeout_s: how long to wait for records that are there and cannot be read.
        wanted: which partitions, by topic and number; an account has the same number in each.
    """

    def __init__(
        self,
        connection: Connection,
        datasets: frozenset[str],
        topic_prefix: str,
        start: str | datetime,
        positions: dict[tuple[str, int], int],
        *,
        until_end: bool = False,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        wanted: Callable[[str, int], bool] | None = None,
    ) -> None:
        self._connection, self._datasets, self._prefix = connection, datasets, topic_prefix
        self._start, self._given = start, positions
        self._until_end, self._stall_timeout_s = until_end, stall_timeout_s
        self._consumer: AIOKafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._wanted = wanted or (lambda _topic, _number: True)
        self._ready: deque[_Batch] = deque()
        self._watch: StallWatch[TopicPartition] = StallWatch()
        self._stopped = False
        # What its program does between two batches is no stall: until then nobody looks, and
        # partitions that have come already wait for their turn.
        self._away_s, self._left_s = 0.0, time.monotonic()

    @property
    def positions(self) -> dict[tuple[str, int], int]:
        """(topic, partition) to the offset behind the batches handed over, for `read` again."""
        return {
            (partition.topic, partition.partition): offset
            for partition, offset in self._positions.items()
        }

    def ends(self) -> dict[tuple[str, int], tuple[int | None, int | None]]:
        """(topic, partition) to where it ended when its broker answered last, and when that was.

        The end includes open transactions; the time is in milliseconds since 1970, by our clock.
        None: no answer yet.
        """
        consumer = self._consumer
        return {
            (one.topic, one.partition): (
                (consumer.highwater(one), consumer.last_poll_timestamp(one))
                if consumer
                else (None, None)
            )
            for one in self._positions
        }

    async def start(self) -> Self:
        """Connect, for where no `async with` does it; then `stop` is yours to call.

        Raises:
            KafkaUnavailableError, KafkaLoginError, KafkaRightsError: no way to the brokers.
            TopicError: there is no topic to read.
        """
        if self._consumer is not None or self._stopped:
            return self
        began_s = time.monotonic()
        self._consumer = AIOKafkaConsumer(
            **self._connection.options("blueflow-reader"),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=1024 * 1024,
        )
        try:
            await bounded(connecting(self._consumer.start()), REQUEST_TIMEOUT_S)
            await self._assign(self._consumer)
        except BaseException as error:
            await self._disconnect()
            if isinstance(error, BlueflowError) or not isinstance(error, Exception):
                raise
            if kind_of_failure(error) is Failure.AWAY:
                raise await self._connection.why_not(began_s) from error
            raise as_blueflow_error(error) or KafkaRefusesError(
                self._prefix, told(error)
            ) from error
        return self

    async def stop(self) -> None:
        """Disconnect."""
        self._stopped = True
        await self._disconnect()

    async def _disconnect(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await stop(consumer)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def __aiter__(self) -> AsyncIterator[_Batch]:
        return self

    async def __anext__(self) -> _Batch:
        """Return the next batch; the positions are behind it from then on.

        Raises:
            HeldBackError: committed records wait behind somebody's open transaction for too long.
            RecordsGoneError: retention removed records before they were read.
            KafkaUnavailableError: no broker answered for `stall_timeout_s`.
        """
        while True:
            batch = await self.poll()
            if batch is not None:
                return batch
            if self._consumer is None:
                raise StopAsyncIteration

    async def poll(self) -> _Batch | None:
        """Return the next batch, None when none has come within half a second; as `__anext__`."""
        self._away_s += time.monotonic() - self._left_s
        try:
            await self.start()
            if not self._ready:
                if self._consumer is None or self._at_end():
                    await self.stop()
                    return None
                await self._fetch(self._consumer)
        finally:
            self._left_s = time.monotonic()
        if not self._ready:
            return None
        batch = self._ready.popleft()
        self._positions[TopicPartition(batch.topic, batch.partition)] = batch.next_offset
        return batch

    async def _assign(self, consumer: AIOKafkaConsumer) -> None:
        names = [f"{self._prefix}{name}" for name in sorted({*self._datasets, SINGLE})]
        found = await partitions_of(self._connection, names)
        if not found:
            how = "start `blueflow produce`, or name another topic_prefix"
            raise TopicError(f"{self._prefix}*", "does not exist", how)
        partitions = [
            TopicPartition(topic, number)
            for topic, count in found.items()
            for number in range(count)
            if self._wanted(topic, number)
        ]
        others = {f"{self._prefix}{name}" for name in DATASETS} - set(names)
        there = {(partition.topic, partition.partition) for partition in partitions}
        unknown = {place for place in self._given if place[0] not in others} - there
        if unknown:
            problem = f"there is no partition {min(unknown)}"
            raise SettingError("positions", "blueflow.kafka.read", problem)
        consumer.assign(partitions)
        begin = await bounded(self._beginnings(consumer, partitions), REQUEST_TIMEOUT_S)
        ends: dict[TopicPartition, int] = {}
        if self._until_end:
            ends = await ends_of(self._connection, partitions)
            self._ends = await self._settled(ends)
        for partition, offset in begin.items():
            given = self._given.get((partition.topic, partition.partition))
            self._positions[partition] = offset if given is None else given
            consumer.seek(partition, self._positions[partition])
        for partition, end in ends.items():
            if self._positions[partition] > end:  # it counts as read, so no broker would tell
                raise await self._gone(consumer, partition, self._positions[partition])

    async def _settled(self, ends: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
        """Return where the committed records end, once open transactions had time to end."""
        until_s = time.monotonic() + _SETTLE_S
        while True:
            stable = await ends_of(self._connection, list(ends), open_too=False)
            held = [partition for partition, end in ends.items() if stable[partition] < end]
            if not held:
                return ends
            if time.monotonic() >= until_s:
                extra = {
                    "topic": held[0].topic,
                    "partition": held[0].partition,
                    "partitions": len(held),
                    "holder": await holder_of(self._connection, held[0]),
                }
                _logger.warning("what is behind an open transaction is left out", extra=extra)
                return {partition: min(end, stable[partition]) for partition, end in ends.items()}
            await anyio.sleep(_POLL_S / 5)

    async def _beginnings(
        self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]
    ) -> dict[TopicPartition, int]:
        if self._start == "oldest":
            return dict(await consumer.beginning_offsets(partitions))
        ends = await ends_of(self._connection, partitions)
        if isinstance(self._start, str):
            return ends
        at_ms = max(0, int(self._start.timestamp() * 1000))
        found = await consumer.offsets_for_times(dict.fromkeys(partitions, at_ms))
        return {
            partition: found[partition].offset if found.get(partition) else ends[partition]
            for partition in partitions
        }

    def _at_end(self) -> bool:
        return self._until_end and all(
            self._positions[partition] >= end for partition, end in self._ends.items()
        )

    async def _fetch(self, consumer: AIOKafkaConsumer) -> None:
        try:
            got = await consumer.getmany(
                timeout_ms=int(_POLL_S * 1000), max_records=BATCH_EVENTS_MAX
            )
        except kafka.OffsetOutOfRangeError as error:
            offsets: dict[TopicPartition, int] = error.args[0]
            raise await self._gone(consumer, *next(iter(offsets.items()))) from error
        except kafka.KafkaError as error:
            raise as_blueflow_error(error) or KafkaRefusesError(
                self._prefix, told(error)
            ) from error
        for partition, records in got.items():
            if records:
                self._ready.append(self._batch_of(partition, records))
        with_records = {partition for partition, records in got.items() if records}
        for partition in self._positions:
            if partition not in with_records:
                # Markers and aborted records move it too.
                self._positions[partition] = await consumer.position(partition)
        await self._check_stall(consumer, with_records)

    @abstractmethod
    def _batch_of(self, partition: TopicPartition, records: list[ConsumerRecord]) -> _Batch:
        """Make a batch of consecutive records of one partition."""

    async def _check_stall(self, consumer: AIOKafkaConsumer, moving: set[TopicPartition]) -> None:
        now_s = time.monotonic() - self._away_s
        for partition, offset in self._positions.items():
            end = consumer.highwater(partition)
            behind = end is not None and offset < end and partition not in moving
            asked_ms = consumer.last_poll_timestamp(partition)
            self._watch.note(partition, offset, behind=behind, answered_ms=asked_ms, now_s=now_s)
        held = self._watch.longest_held(now_s)
        if held is not None:
            partition, held_s = held
            if held_s >= STALL_WARN_S and self._watch.warn(partition):
                await self._tell(partition, held_s)
            if held_s >= self._stall_timeout_s:
                raise await self._held_back(partition, held_s)
        silent_s = self._watch.silent_s(now_s)
        if silent_s >= self._stall_timeout_s:
            raise await self._connection.why_not(now_s - silent_s)

    async def _tell(self, partition: TopicPartition, held_s: float) -> None:
        error = await self._held_back(partition, held_s)
        extra = {
            "topic": partition.topic,
            "partition": partition.partition,
            "offset": error.offset,
            "held_s": round(held_s, 1),
            "holder": error.holder,
        }
        _logger.warning("committed records wait behind an open transaction", extra=extra)

    async def _held_back(self, partition: TopicPartition, held_s: float) -> HeldBackError:
        holder = await holder_of(self._connection, partition)
        name = f"{partition.topic}/{partition.partition}"
        return HeldBackError(name, self._positions[partition], held_s, holder)

    async def _gone(
        self, consumer: AIOKafkaConsumer, partition: TopicPartition, wanted: int
    ) -> BlueflowError:
        oldest = await bounded(consumer.beginning_offsets([partition]), REQUEST_TIMEOUT_S)
        ends = await bounded(consumer.end_offsets([partition]), REQUEST_TIMEOUT_S)
        name = f"{partition.topic}/{partition.partition}"
        return RecordsGoneError(name, wanted, oldest[partition], ends[partition])
