"""`--sink kafka://HOST:PORT`: wire JSON in Kafka, exactly once, keyed by author DID."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Final

import anyio

from blueflow import quantities
from blueflow.errors import InvariantError, RetentionError, SettingError
from blueflow.interfaces import Sink
from blueflow.kafka.connection import Connection
from blueflow.kafka.supervisor import Supervisor
from blueflow.kafka.topicnames import BY_KIND, PREFIX, ROUTES, TopicNames
from blueflow.kafka.topics import RECORD_BYTES_MAX, TopicWishes
from blueflow.kafka.transaction import Assembler, Transaction
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.events import Event, Position

EXACTLY_ONCE: Final = "exactly_once"
AT_LEAST_ONCE: Final = "at_least_once"
COMPRESSIONS: Final = ("zstd", "snappy", None)
COMMIT_INTERVAL_S: Final = 0.3
COMMIT_BYTES_MAX: Final = 8 * 1024 * 1024
TRANSACTION_TIMEOUT_S: Final = 15.0
CONNECT_WAIT_S: Final = 30.0
CLOSE_WAIT_S: Final = 5.0  # half of what a stop may take in all


class KafkaSink(Sink):
    """Writes every event to Kafka once, in transactions that hold the position as well.

    A reader with `isolation.level=read_committed` sees every event once, and those of an account
    in order within a topic. The position is in the topic `<prefix>cursor`.

    Whatever leaves a transaction uncertain (a timeout, a fenced producer, an error of any batch)
    ends the producer's life: the next one asks Kafka what became of it, and repeats it if nothing
    did. A broker that is away is waited for; `write` then waits when the buffer is full.

    Args:
        connection: the brokers: "HOST:PORT[,HOST:PORT]", or a `Connection` with credentials.
        origin_source: name of the source that will be written.
        simulated: whether the data is made up; topics hold one kind, and refuse the other.
        pipeline: whose positions these are; one process at a time writes for a pipeline.
        topic_prefix: what the names of all topics begin with.
        route: "by-kind", a topic for each data set, or "single", all events in one.
        delivery: "exactly_once", or "at_least_once" without transactions.
        topics: what missing topics are made with.
        compression: "zstd", "snappy" or None.
        commit_interval_s: age of the oldest uncommitted event that brings a commit.
        commit_bytes_max: uncommitted bytes of events that bring a commit. Twice as much can wait.
        transaction_timeout_s: after this the broker aborts the transaction of a dead producer.
        connect_wait_s: how long the first connection may take. Later ones are tried without end.
        metrics: where to count.

    Raises:
        SettingError: a name cannot be one, or there is no such choice.
    """

    def __init__(  # noqa: PLR0913 - what a deployment may want to differ in
        self,
        connection: str | Connection,
        *,
        origin_source: str,
        simulated: bool = False,
        pipeline: str = "default",
        topic_prefix: str = PREFIX,
        route: str = BY_KIND,
        delivery: str = EXACTLY_ONCE,
        topics: TopicWishes | None = None,
        compression: str | None = "zstd",
        commit_interval_s: float = COMMIT_INTERVAL_S,
        commit_bytes_max: int = COMMIT_BYTES_MAX,
        transaction_timeout_s: float = TRANSACTION_TIMEOUT_S,
        connect_wait_s: float = CONNECT_WAIT_S,
        metrics: Metrics | None = None,
    ) -> None:
        if isinstance(connection, str):
            connection = Connection(connection)
        _check_choice("route", route, ROUTES)
        _check_choice("delivery", delivery, (EXACTLY_ONCE, AT_LEAST_ONCE))
        _check_choice("compression", compression, COMPRESSIONS)
        quantities.argument("KafkaSink", "pipeline", pipeline, quantities.label)
        quantities.argument("KafkaSink", "topic_prefix", topic_prefix, quantities.topic_prefix)
        self._names = TopicNames(topic_prefix, route)
        self._pipeline = pipeline
        self._age_s, self._bytes_max = commit_interval_s, commit_bytes_max
        self._connect_wait_s = connect_wait_s
        self._metrics = (metrics or Metrics()).kafka
        self._supervisor = Supervisor(
            connection,
            self._names,
            topics or TopicWishes(),
            pipeline=pipeline,
            origin_source=origin_source,
            simulated=simulated,
            exactly_once=delivery == EXACTLY_ONCE,
            compression=compression,
            timeout_s=transaction_timeout_s,
            metrics=self._metrics,
        )
        self._assembler: Assembler | None = None
        self._durable: dict[str, Position] = {}
        self._pending = Transaction()
        self._in_flight: Transaction | None = None
        self._flushing = 0
        self._wake, self._moved = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    async def resume(self) -> Mapping[str, Position]:
        """Make or check the topics, fence older writers of the pipeline, return its positions.

        Raises:
            KafkaUnavailableError: no broker answered in time.
            KafkaLoginError, KafkaRightsError: credentials or rights are missing.
            TopicError: a topic is unsuitable.
            CursorTopicError: the topic of the cursors cannot be understood.
            OtherSourceError: the topics hold another kind of data, or the pipeline another source.
            FencedError: another process took over while this one started.
        """
        self._durable = dict(await self._supervisor.begin(self._connect_wait_s))
        partitions = self._supervisor.topics.partitions
        self._assembler = Assembler(self._names, partitions, RECORD_BYTES_MAX)
        self._task = asyncio.create_task(self._run(), name=f"kafka sink {self._pipeline}")
        return dict(self._durable)

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        """Take events; waits while as much as a transaction holds is waiting already.

        Cancelled, it has taken nothing.

        Raises:
            RetentionError: the events are older than what the topics keep.
            BlueflowError: the sink failed, now or since the last call.
        """
        while self._pending.is_full(self._bytes_max):
            await self._wait()
        self._check()
        self._check_age(through)
        clock_us, now_s = time.time_ns() // 1000, time.monotonic()
        if self._assembler is None:
            raise InvariantError("a sink is resumed before it is written to")
        pending = self._pending
        if not events and self._is_durable(through):
            return
        quiet = not pending.events
        too_large = len(pending.dead_letters)
        self._assembler.take(pending, events, through, now_s=now_s, clock_us=clock_us)
        self._metrics.dead_letters["too_large"].inc(len(pending.dead_letters) - too_large)
        self._note_pending()
        if quiet or pending.is_full(self._bytes_max):
            self._wake.set()

    async def flush(self) -> None:
        """Return when everything written is durable; raises what `write` raises."""
        self._flushing += 1
        self._wake.set()
        try:
            while self._pending or self._in_flight is not None:
                await self._wait()
            self._check()
        finally:
            self._flushing -= 1

    @property
    def durable(self) -> Mapping[str, Position]:
        """The positions of the last commit."""
        return dict(self._durable)

    async def close(self) -> None:
        """Abort what is not committed, and disconnect; in at most 5 s."""
        with anyio.move_on_after(CLOSE_WAIT_S / 2, shield=True):
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
                self._task = None
        with anyio.move_on_after(CLOSE_WAIT_S / 2, shield=True):
            await self._supervisor.close()

    # What runs in the background: one transaction after the other.

    async def _run(self) -> None:
        try:
            while True:
                await self._until_due()
                transaction, self._pending = self._pending, Transaction()
                self._in_flight = transaction
                self._notify()  # there is room again
                await self._supervisor.make_durable(transaction)
                self._durable.update(transaction.positions)
                self._in_flight = None
                self._note_pending()
                self._notify()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whoever calls next gets it
            self._failure = error
            self._notify()

    async def _until_due(self) -> None:
        while True:
            pending = self._pending
            if pending and (self._flushing or pending.is_full(self._bytes_max)):
                return
            wait_s = pending.due_s(self._age_s) - time.monotonic()
            if wait_s <= 0:
                return
            self._wake.clear()
            with anyio.move_on_after(wait_s if math.isfinite(wait_s) else None):
                await self._wake.wait()

    def _check_age(self, through: Position) -> None:
        """Refuse what the brokers would delete at once.

        By the position's time, not that of an event: one odd time costs nothing, since a segment
        is as old as its newest record.
        """
        topics = self._supervisor.topics
        if not through.time_us or math.isinf(topics.retention_s):
            return
        age_s = time.time() - through.time_us / 1_000_000
        if age_s > topics.retention_s:
            raise RetentionError(through.source, age_s, topics.shortest, topics.retention_s)

    def _is_durable(self, through: Position) -> bool:
        idle = not self._pending and self._in_flight is None
        return idle and self._durable.get(through.source) == through

    def _note_pending(self) -> None:
        in_flight = self._in_flight.bytes if self._in_flight else 0
        self._metrics.pending_bytes.set(self._pending.bytes + in_flight)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _wait(self) -> None:
        """Wait until the background has come further; raise what ended it."""
        self._check()
        await self._moved.wait()

    def _notify(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise SettingError(
            name, "KafkaSink", f"{value!r} is none of {', '.join(map(str, choices))}"
        )
