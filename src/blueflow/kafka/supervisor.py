"""One transaction after the other is made durable, over as many producers as that takes.

Whatever leaves a transaction uncertain ends the producer's life. The next life fences the one
before, asks the cursor topic what became of the transaction, and repeats it if nothing did.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
import time
from typing import TYPE_CHECKING, Final

import anyio
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from blueflow.backoff import Backoff
from blueflow.errors import (
    BlueflowError,
    FencedError,
    InvariantError,
    KafkaRefusesError,
    OtherSourceError,
    TopicError,
)
from blueflow.events import family
from blueflow.kafka.connection import (
    REQUEST_TIMEOUT_S,
    Failure,
    as_blueflow_error,
    kind_of_failure,
    told,
)
from blueflow.kafka.cursorrecord import CursorValue, Instance, cursor_record
from blueflow.kafka.cursortopic import CLEANUP_S, read_cursors
from blueflow.kafka.hanging import is_committed
from blueflow.kafka.lasttransaction import LastTransaction
from blueflow.kafka.producer import BatchError, Producer
from blueflow.kafka.topics import ensure_topics
from blueflow.kafka.transaction import Partition, dead_letter, halves, without
from blueflow.logs import Throttle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.events import Position
    from blueflow.kafka.connection import Connection
    from blueflow.kafka.cursorrecord import CursorTable
    from blueflow.kafka.producer import Records, Sent
    from blueflow.kafka.topicnames import TopicNames
    from blueflow.kafka.topics import Topics, TopicWishes
    from blueflow.kafka.transaction import KafkaRecord, Transaction
    from blueflow.metrics import KafkaMetrics

_BACKOFF: Final = Backoff(base_s=0.2, cap_s=15.0)
_GRACE_S = 2.0  # a successor has fenced us before it can say so in the cursor topic
_BISECT_AFTER = 3  # failures at one cursor
_SEARCHES_MAX = 3  # for records that are refused; more, and it is not the records
_REFUSED_MAX = 100  # of one transaction; more, and it is not the records
_FEW = 3  # refused records that may be all there are of a partition
# What aiokafka raises, its assertions and its parser's errors included.
_FAILURES = (BlueflowError, BatchError, KafkaError, OSError, AssertionError, ValueError)
_REASONS = {Failure.AWAY: "away", Failure.FENCED: "fenced", Failure.SUSPECT: "refused"}

_logger = logging.getLogger(__name__)


class Supervisor:
    """Makes transactions durable for one pipeline.

    Args:
        connection: the brokers.
        names: the topics.
        wishes: what missing topics are made with.
        pipeline: whose transactions these are.
        origin_source: name of the source that is written.
        simulated: whether its data is made up.
        exactly_once: by transactions; else each event at least once.
        compression: "zstd", "snappy" or None.
        timeout_s: the transaction timeout.
        metrics: where to count.
    """

    def __init__(  # noqa: PLR0913 - the sink's own, handed on
        self,
        connection: Connection,
        names: TopicNames,
        wishes: TopicWishes,
        *,
        pipeline: str,
        origin_source: str,
        simulated: bool,
        exactly_once: bool,
        compression: str | None,
        timeout_s: float,
        metrics: KafkaMetrics,
    ) -> None:
        self._connection, self._names, self._wishes = connection, names, wishes
        self._pipeline, self._origin_source = pipeline, origin_source
        self._simulated, self._exactly_once = simulated, exactly_once
        self._compression, self._timeout_s = compression, timeout_s
        self._metrics = metrics
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._instance = Instance(name)
        self._commits = 0
        self._failures = 0  # in a row
        self._throttle = Throttle()
        self._topics: Topics | None = None
        self._producer: Producer | None = None
        self._last = LastTransaction(TopicPartition(names.cursor, 0))

    @property
    def topics(self) -> Topics:
        """What the topics are like; known from `begin` on."""
        if self._topics is None:
            raise InvariantError("a sink is resumed before it is written to")
        return self._topics

    async def begin(self, wait_s: float) -> Mapping[str, Position]:
        """Begin the first life, and return the positions of the pipeline.

        Raises:
            BlueflowError: as `KafkaSink.resume`; `KafkaUnavailableError` after `wait_s` seconds.
        """
        began_s = time.monotonic()
        while True:
            patience_s = wait_s - (time.monotonic() - began_s)
            try:
                return (await self._begin(max(1.0, patience_s))).positions
            except _FAILURES as error:
                await self._discard()
                kind, waited_s = kind_of_failure(_cause(error)), time.monotonic() - began_s
                if isinstance(error, BlueflowError) or kind is Failure.FATAL:
                    raise self._named(error) from error
                late = waited_s >= wait_s
                if kind is not Failure.AWAY and late:
                    raise KafkaRefusesError(self._names.cursor, told(_cause(error))) from error
                if kind is Failure.AWAY:
                    answer = await self._connection.why_not(began_s)
                    if late or not answer.retryable:
                        raise answer from error
                await anyio.sleep(self._wait_s(kind))

    async def make_durable(self, transaction: Transaction) -> None:
        """Commit a transaction; return when it is durable.

        Raises:
            BlueflowError: an operator has to act; the transaction took place or it did not.
        """
        refusals = searches = 0
        self._commits += 1
        while True:
            sending = False
            try:
                if self._producer is None:
                    table = await self._begin()
                    if self._instance.commits_in(table.newest) >= self._commits:
                        self._metrics.transactions["recovered"].inc()
                        break
                if refusals >= _BISECT_AFTER:
                    refusals, searches = 0, searches + 1
                    await self._sort_out(transaction)
                    continue
                sending = True
                await self._commit(transaction)
                break
            except _FAILURES as error:
                kind = await self._fail(error, sending=sending)
                refusals += kind is Failure.SUSPECT
                if refusals >= _BISECT_AFTER and searches >= _SEARCHES_MAX:
                    topic = error.partition.topic if isinstance(error, BatchError) else "*"
                    raise KafkaRefusesError(topic, told(_cause(error))) from error
        if self._failures:
            _logger.info("Kafka takes transactions again", extra={"failures": self._failures})
        self._failures = 0

    async def _commit(self, transaction: Transaction) -> None:
        producer = self._producer
        if producer is None:
            raise InvariantError("a commit needs a producer")
        began_s = time.monotonic()
        records = self._with_dead_letters(transaction)
        sent = await producer.commit(records, self._cursors(transaction.positions))
        self._count(transaction, sent, began_s)

    async def _begin(self, patience_s: float = REQUEST_TIMEOUT_S) -> CursorTable:
        """Begin a producer's life: fence, read the cursors, claim the pipeline.

        Args:
            patience_s: how long a broker may take to answer at all.
        """
        known = self._topics
        with anyio.fail_after(patience_s):
            topics = self._topics = await ensure_topics(self._connection, self._names, self._wishes)
        if known is not None:
            if topics.partitions != known.partitions:
                problem = f"has {topics.partitions} partitions now, and had {known.partitions}"
                raise TopicError(self._names.events[0], problem, "start again")
            await self._check_successor()
        if self._exactly_once:
            with anyio.fail_after(patience_s):
                await self._ask_decision(topics)
        producer = self._producer = self._new_producer()
        await producer.start()
        if self._exactly_once:
            await self._end_hanging(producer, topics)
        table = await self._read_cursors()
        self._check_instance(table)
        self._check_kind(table)
        self._check_kept(table)
        position = table.positions.get(table.source or "")
        claim = CursorValue(
            source=position.source if position else self._origin_source,
            seq=position.seq if position else None,
            time_us=position.time_us if position else 0,
            commit=self._instance.commits_in(table.newest),
            instance=self._instance.claim(table.newest),
            simulated=self._simulated,
        )
        await producer.commit({}, self._cursor_records([claim]))
        return table

    async def _fail(self, error: Exception, *, sending: bool) -> Failure:
        """End the producer's life, and wait before the next one; raise what ends the sink."""
        cause = _cause(error)
        kind = kind_of_failure(cause)
        if sending:
            self._metrics.transactions["failed"].inc()
        if self._producer is not None and kind in {Failure.FATAL, Failure.SUSPECT}:
            await self._producer.abort()  # else readers wait for the next life, or for the timeout
        await self._discard()
        if kind is Failure.FATAL:
            raise self._named(error) from error
        self._metrics.rebuilds[_REASONS[kind]].inc()
        wait_s = self._wait_s(kind)
        if (left_out := self._throttle.admit(time.time())) is not None:
            extra = {
                "reason": _REASONS[kind],
                "problem": told(cause),
                "again_in_s": round(wait_s, 2),
                "left_out": left_out,
            }
            what = "a transaction failed and is repeated" if sending else "still no producer"
            _logger.warning(what, extra=extra)
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
        for partition, entries in failing.items():
            if len(entries) == len(transaction.records[partition]) > _FEW:
                raise KafkaRefusesError(partition.topic, entries[0][1])  # it is the topic
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
        await self._check_successor()
        self._producer = self._new_producer()
        await self._producer.start()
        try:
            return await self._producer.trial(records)
        finally:
            await self._discard()

    async def close(self) -> None:
        """Abort the open transaction, and disconnect."""
        if self._producer is not None:
            await self._producer.abort()
        await self._discard()

    async def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.discard()

    def _new_producer(self) -> Producer:
        name = self._names.transactional_id(self._pipeline)
        return Producer(
            self._connection,
            client_id=name,
            transactional_id=name if self._exactly_once else None,
            compression=self._compression,
            timeout_s=self._timeout_s,
        )

    async def _ask_decision(self, topics: Topics) -> None:
        """Ask what became of the last transaction, as long as its coordinator still knows."""
        name = self._names.transactional_id(self._pipeline)
        committed = await is_committed(self._connection, name, _partitions(topics))
        self._last.told(committed=committed)

    async def _end_hanging(self, producer: Producer, topics: Topics) -> None:
        """End what the brokers left open of the last transaction, the way it was decided."""
        hanging, in_doubt = await producer.left_open(_partitions(topics))
        commit = self._last.end(hanging)
        if in_doubt:  # to end what is not there changes nothing
            _logger.info(
                "the brokers do not tell whose transactions are open; ours end, if there are any",
                extra={"partitions": len(in_doubt), "remedy": "the right to read the topics"},
            )
        if hanging:
            extra = {"partitions": len(hanging), "outcome": "committed" if commit else "aborted"}
            _logger.warning("the brokers left a transaction open, and it is ended now", extra=extra)
        if hanging or in_doubt:
            await producer.end_hanging(hanging | in_doubt, commit=commit)
        if hanging:
            self._metrics.transactions["hanging"].inc()
        self._last.ended()

    async def _read_cursors(self, *, open_too: bool = True) -> CursorTable:
        wait_s = self._timeout_s + CLEANUP_S
        topic = self._names.cursor
        return await read_cursors(
            self._connection, topic, self._pipeline, wait_s=wait_s, open_too=open_too
        )

    async def _check_successor(self) -> None:
        """Stop before we fence the one that took over from us.

        Without waiting for open transactions: the last one of our own may be among them.
        """
        self._check_instance(await self._read_cursors(open_too=False))

    def _check_instance(self, table: CursorTable) -> None:
        if self._exactly_once and self._instance.superseded_by(table.newest):
            raise FencedError(self._pipeline, table.instance or "")

    def _check_kept(self, table: CursorTable) -> None:
        """Stop when transactions of ours are gone that were committed: their events may be, too.

        A replica that was behind became the leader, or records were deleted. To go on would put
        the position behind events that nobody has. A topic without a record of ours was deleted;
        the next commit writes the position again.
        """
        if not self._exactly_once or table.newest is None or not self._instance.wrote(table.newest):
            return
        if (lost := self._commits - 1 - table.newest.commit) > 0:
            problem = f"no longer has transactions that were committed ({lost})"
            how = "look after the brokers' replicas, then start again: it goes on from what is left"
            raise TopicError(self._names.cursor, problem, how)

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
        records = [(now_ms, *cursor_record(self._pipeline, value)) for value in values]
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

    def _named(self, error: Exception) -> Exception:
        return as_blueflow_error(_cause(error), self._pipeline) or error

    def _wait_s(self, kind: Failure) -> float:
        """Return how long to wait after one more failure in a row."""
        self._failures += 1
        wait_s = _BACKOFF.delay_s(self._failures, random.random())  # noqa: S311 - jitter
        return wait_s + (_GRACE_S if kind is Failure.FENCED else 0.0)


def _partitions(topics: Topics) -> list[TopicPartition]:
    return [
        TopicPartition(name, number)
        for name, size in topics.sizes.items()
        for number in range(size)
    ]


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, BatchError) else error
