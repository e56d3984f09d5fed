"""`--sink kafka://HOST:PORT`: wire JSON in Kafka, exactly once, keyed by author DID."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import secrets
import socket
import time
from typing import TYPE_CHECKING, Final

import anyio

from blueflow.backoff import Backoff
from blueflow.errors import (
    BlueflowError,
    FencedError,
    InvariantError,
    KafkaRefusesError,
    OtherSourceError,
    RetentionError,
)
from blueflow.events import Position, family
from blueflow.interfaces import Sink
from blueflow.kafka.connection import (
    Connection,
    Failure,
    as_blueflow_error,
    kind_of_failure,
    told,
)
from blueflow.kafka.cursorrecord import CursorValue, Instance, cursor_record
from blueflow.kafka.cursortopic import CLEANUP_S, read_cursors
from blueflow.kafka.producer import BatchError, Producer
from blueflow.kafka.topicnames import BY_KIND, PREFIX, TopicNames
from blueflow.kafka.topics import RECORD_BYTES_MAX, TopicWishes, ensure_topics
from blueflow.kafka.transaction import (
    Assembler,
    KafkaRecord,
    Partition,
    Transaction,
    dead_letter,
    halves,
    without,
)
from blueflow.logs import Throttle
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.events import Event
    from blueflow.kafka.cursorrecord import CursorTable
    from blueflow.kafka.producer import Records, Sent
    from blueflow.kafka.topics import Topics

EXACTLY_ONCE: Final = "exactly_once"
AT_LEAST_ONCE: Final = "at_least_once"
COMMIT_INTERVAL_S: Final = 0.3
COMMIT_BYTES_MAX: Final = 8 * 1024 * 1024
TRANSACTION_TIMEOUT_S: Final = 15.0
CONNECT_WAIT_S: Final = 30.0
CLOSE_WAIT_S: Final = 5.0  # half of what a stop may take in all

_BACKOFF: Final = Backoff(base_s=0.2, cap_s=15.0)
_GRACE_S = 2.0  # a successor has fenced us before it can say so in the cursor topic
_BISECT_AFTER = 3  # failures at one cursor
_REFUSED_MAX = 100  # of one transaction; more, and it is not the records
_REASONS = {Failure.AWAY: "away", Failure.FENCED: "fenced", Failure.SUSPECT: "refused"}

_logger = logging.getLogger(__name__)


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
    """

    def __init__(
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
        self._connection = Connection(connection) if isinstance(connection, str) else connection
        self._origin_source, self._simulated, self._pipeline = origin_source, simulated, pipeline
        self._names = TopicNames(topic_prefix, route)
        self._wishes = topics or TopicWishes()
        self._exactly_once = delivery == EXACTLY_ONCE
        self._compression = compression
        self._age_s, self._bytes_max = commit_interval_s, commit_bytes_max
        self._timeout_s, self._connect_wait_s = transaction_timeout_s, connect_wait_s
        self._metrics = (metrics or Metrics()).kafka
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._instance = Instance(name)
        self._failures = 0  # in a row
        self._throttle = Throttle()
        self._topics: Topics | None = None
        self._assembler: Assembler | None = None
        self._producer: Producer | None = None
        self._durable: dict[str, Position] = {}
        self._pending = Transaction()
        self._in_flight: Transaction | None = None
        self._commits = 0
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
        table = await self._first_begin()
        self._durable = dict(table.positions)
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
        pending, in_flight = self._pending, self._in_flight
        if not events and not pending and in_flight is None:
            if self._durable.get(through.source) == through:
                return  # nothing has changed
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
        with anyio.move_on_after(CLOSE_WAIT_S, shield=True):
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
                self._task = None
            if self._producer is not None:
                await self._producer.abort()
            await self._discard()

    async def _first_begin(self) -> CursorTable:
        began_s = time.monotonic()
        while True:
            try:
                return await self._begin()
            except Exception as error:
                await self._discard()
                kind, waited_s = kind_of_failure(_cause(error)), time.monotonic() - began_s
                if isinstance(error, BlueflowError) or kind is Failure.FATAL:
                    raise self._named(error) from error
                late = waited_s >= self._connect_wait_s
                if kind is Failure.SUSPECT and late:
                    raise KafkaRefusesError(self._names.cursor, told(_cause(error))) from error
                if kind is Failure.AWAY:
                    answer = await self._connection.why_not(waited_s)
                    if late or not answer.retryable:
                        raise answer from error
                await anyio.sleep(self._wait_s(kind))

    # What runs in the background: one transaction after the other.

    async def _run(self) -> None:
        try:
            while True:
                await self._until_due()
                transaction, self._pending = self._pending, Transaction()
                self._in_flight = transaction
                self._notify()  # there is room again
                self._commits += 1
                await self._make_durable(transaction)
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

    async def _make_durable(self, transaction: Transaction) -> None:
        """Commit, over as many producers as it takes."""
        refusals = 0
        name = self._instance.current
        while True:
            try:
                if self._producer is None:
                    table = await self._begin()
                    newest = table.newest
                    if newest and (newest.instance, newest.commit) == (name, self._commits):
                        self._metrics.transactions["recovered"].inc()
                        return
                    name = self._instance.current
                if refusals >= _BISECT_AFTER:
                    refusals = 0
                    await self._sort_out(transaction)
                    continue
                await self._commit(transaction)
            except Exception as error:
                kind = await self._fail(error)
                refusals += kind is Failure.SUSPECT
            else:
                self._failures = 0
                return

    async def _commit(self, transaction: Transaction) -> None:
        producer = self._producer
        if producer is None:
            raise InvariantError("a commit needs a producer")
        began_s = time.monotonic()
        records = self._with_dead_letters(transaction)
        sent = await producer.commit(records, self._cursors(transaction.positions))
        self._count(transaction, sent, began_s)

    async def _begin(self) -> CursorTable:
        """Begin a producer's life: fence, read the cursors, claim the pipeline."""
        if self._topics is None:
            self._topics = await ensure_topics(self._connection, self._names, self._wishes)
            self._assembler = Assembler(self._names, self._topics.partitions, RECORD_BYTES_MAX)
        else:  # a successor must not be fenced by the one that it took over from
            self._check_instance(await self._read_cursors())
        producer = self._producer = self._new_producer()
        await producer.start()
        table = await self._read_cursors()
        self._check_instance(table)
        self._check_kind(table)
        instance = self._instance.claim(table.instance)
        position = table.positions.get(table.source or "")
        value = CursorValue(
            source=position.source if position else self._origin_source,
            seq=position.seq if position else None,
            time_us=position.time_us if position else 0,
            instance=instance,
            simulated=self._simulated,
        )
        await producer.commit({}, self._cursor_records([value]))
        return table

    async def _fail(self, error: Exception) -> Failure:
        """End the producer's life, and wait before the next one; raise what ends the sink."""
        cause = _cause(error)
        kind = kind_of_failure(cause)
        self._metrics.transactions["failed"].inc()
        if kind is Failure.FATAL:
            if self._producer is not None:
                await self._producer.abort()
            await self._discard()
            raise self._named(error) from error
        await self._discard()
        self._metrics.rebuilds[_REASONS[kind]].inc()
        wait_s = self._wait_s(kind)
        if (left_out := self._throttle.admit(time.time())) is not None:
            extra = {
                "reason": _REASONS[kind],
                "problem": told(cause),
                "again_in_s": round(wait_s, 2),
                "left_out": left_out,
            }
            _logger.warning("a transaction failed and is repeated", extra=extra)
        await anyio.sleep(wait_s)
        return kind

    async def _sort_out(self, transaction: Transaction) -> None:
        """Find the records that are refused, and put dead letters in their place.

        By transactions that are aborted, so that the position moves once, behind the whole.
        """
        failing = await self._refused(transaction.records)
        count = sum(map(len, failing.values()))
        if not count:
            return  # it is not the records; the next commits will tell
        clock_us = time.time_ns() // 1000
        for partition, entries in failing.items():
            for record, detail in entries:
                letter = dead_letter(partition, record, "refused", detail, clock_us)
                transaction.dead_letters.append(letter)
            self._metrics.dead_letters["refused"].inc(len(entries))
        out = {partition: [record for record, _ in some] for partition, some in failing.items()}
        transaction.records = without(transaction.records, out)
        _logger.error(
            "Kafka refuses events; they go to the dead letters",
            extra={"topic": self._names.dlq, "events": count},
        )

    async def _refused(self, records: Records) -> dict[Partition, list[tuple[KafkaRecord, str]]]:
        """Return the records that are refused when they come alone, with what was said."""
        failing: dict[Partition, list[tuple[KafkaRecord, str]]] = {}
        suspects = [(partition, group) for partition, group in records.items()]
        while suspects:
            # One group of each partition: behind a batch that failed its sequence is broken.
            trial: dict[Partition, Sequence[KafkaRecord]] = {}
            later = []
            for partition, group in suspects:
                if partition in trial:
                    later.append((partition, group))
                else:
                    trial[partition] = group
            for partition, error in (await self._trial(trial)).items():
                group = trial[partition]
                if len(group) > 1:
                    later += [(partition, half) for half in halves(group)]
                    continue
                failing.setdefault(partition, []).append((group[0], told(error)))
                if sum(map(len, failing.values())) > _REFUSED_MAX:
                    raise KafkaRefusesError(partition.topic, told(error))
            suspects = later
        return failing

    async def _trial(self, records: Records) -> dict[Partition, BaseException]:
        await self._discard()
        self._check_instance(await self._read_cursors())
        self._producer = self._new_producer()
        await self._producer.start()
        try:
            return await self._producer.trial(records)
        finally:
            await self._discard()

    async def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.discard()

    def _new_producer(self) -> Producer:
        name = f"blueflow.{self._pipeline}"
        return Producer(
            self._connection,
            client_id=name,
            transactional_id=name if self._exactly_once else None,
            compression=self._compression,
            timeout_s=self._timeout_s,
        )

    async def _read_cursors(self) -> CursorTable:
        wait_s = self._timeout_s + CLEANUP_S
        return await read_cursors(
            self._connection, self._names.cursor, self._pipeline, wait_s=wait_s
        )

    def _check_instance(self, table: CursorTable) -> None:
        if self._exactly_once and self._instance.superseded_by(table.instance):
            raise FencedError(self._pipeline, table.instance or "")

    def _check_kind(self, table: CursorTable) -> None:
        """Refuse to mix live and simulated data, or two sources in one pipeline."""
        where = f"{self._names.prefix}* at {self._connection.bootstrap}"
        if (not self._simulated) in table.kinds:
            kinds = ("live data", "simulated data")
            raise OtherSourceError(where, kinds[not self._simulated], kinds[self._simulated])
        source = table.source
        if source is not None and family(source) != family(self._origin_source):
            stored = f"events of {source} by pipeline {self._pipeline}"
            raise OtherSourceError(where, stored, f"events of {self._origin_source}")

    def _check_age(self, through: Position) -> None:
        """Refuse what the brokers would delete at once.

        By the position's time, not that of an event: one odd time costs nothing, since a segment
        is as old as its newest record.
        """
        topics = self._topics
        if topics is None or not through.time_us or math.isinf(topics.retention_s):
            return
        age_s = time.time() - through.time_us / 1_000_000
        if age_s > topics.retention_s:
            raise RetentionError(through.source, age_s, topics.shortest, topics.retention_s)

    def _cursors(self, positions: Mapping[str, Position]) -> Records:
        return self._cursor_records(
            [
                CursorValue(
                    source=position.source,
                    seq=position.seq,
                    time_us=position.time_us,
                    instance=self._instance.current,
                    commit=self._commits,
                    simulated=self._simulated,
                )
                for position in positions.values()
            ]
        )

    def _cursor_records(self, values: Sequence[CursorValue]) -> Records:
        now_ms = time.time_ns() // 1_000_000
        records = [KafkaRecord(now_ms, *cursor_record(self._pipeline, value)) for value in values]
        return {Partition(self._names.cursor, 0): records}

    def _with_dead_letters(self, transaction: Transaction) -> Records:
        if not transaction.dead_letters:
            return transaction.records
        return {**transaction.records, Partition(self._names.dlq, 0): transaction.dead_letters}

    def _count(self, transaction: Transaction, sent: Sent, began_s: float) -> None:
        metrics, now_s = self._metrics, time.monotonic()
        metrics.transactions["committed"].inc()
        metrics.records.inc(sent.records)
        for records, size in sent.batches:
            metrics.record_bytes.inc(size)
            metrics.batch_records.observe(records)
            metrics.batch_bytes.observe(size)
        metrics.send_seconds.observe(sent.send_s)
        metrics.transaction_seconds.observe(now_s - began_s)
        for taken_s in transaction.taken_s:
            metrics.latency_seconds.observe(now_s - taken_s)
        newest_us = max(position.time_us for position in transaction.positions.values())
        if newest_us and transaction.events:
            metrics.end_to_end_seconds.observe(max(0.0, time.time() - newest_us / 1_000_000))

    def _note_pending(self) -> None:
        in_flight = self._in_flight.bytes if self._in_flight else 0
        self._metrics.pending_bytes.set(self._pending.bytes + in_flight)

    def _named(self, error: Exception) -> Exception:
        return as_blueflow_error(_cause(error), self._pipeline) or error

    def _wait_s(self, kind: Failure) -> float:
        """Return how long to wait after one more failure in a row."""
        self._failures += 1
        wait_s = _BACKOFF.delay_s(self._failures, random.random())  # noqa: S311 - jitter
        return wait_s + (_GRACE_S if kind is Failure.FENCED else 0.0)

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


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, BatchError) else error
