"""One life of an aiokafka producer: from its producer id to the first failure, never beyond.

After an error that is not retried, or a commit without an answer, aiokafka's producer is in no
state that can be trusted, so it is discarded and the next life asks Kafka what became of it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import IllegalOperation, KafkaError

from blueflow.kafka.connection import Failure, kind_of_failure
from blueflow.kafka.hanging import left_open, until_ended, until_readable
from blueflow.kafka.inner import add_partitions, consume, discard, producer_id_of, why_ended
from blueflow.kafka.recordbatch import Batches

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from blueflow.kafka.connection import Connection
    from blueflow.kafka.hanging import LeftOpen
    from blueflow.kafka.recordbatch import RecordBatch
    from blueflow.kafka.transaction import KafkaRecord, Partition

    Records = Mapping[Partition, Sequence[KafkaRecord]]

ABORT_S: Final = 2.0
_END_S: Final = 5.0


class BatchError(Exception):
    """A batch was not taken. `cause` is what the broker, or aiokafka, said."""

    def __init__(self, partition: Partition, cause: BaseException) -> None:
        super().__init__(partition, cause)
        self.partition, self.cause = partition, cause


class Sent(NamedTuple):
    """What a transaction was on the wire. Sizes are compressed."""

    records: int
    batches: Sequence[tuple[int, int]]  # records, bytes
    ends: Mapping[TopicPartition, int]  # the offset behind its last record; -1 is not known
    send_s: float


class Producer:
    """Sends transactions, or with `transactional_id=None` idempotent batches.

    Args:
        connection: the brokers.
        client_id: what the broker's log calls it.
        transactional_id: fences older producers of the same id; None is at least once.
        compression: "zstd", "snappy" or None.
        timeout_s: the transaction timeout; also how long one call here may take.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        client_id: str,
        transactional_id: str | None,
        compression: str | None,
        timeout_s: float,
    ) -> None:
        self._transactional = transactional_id is not None
        self._timeout_s = timeout_s
        self._in_transaction = False
        self._producer = AIOKafkaProducer(
            **connection.options(client_id),
            transactional_id=transactional_id,
            enable_idempotence=True,
            transaction_timeout_ms=int(timeout_s * 1000),
        )
        self._batches = Batches(compression, transactional=self._transactional)

    async def start(self) -> None:
        """Connect and get a producer id: older producers of the transactional id are fenced."""
        with anyio.fail_after(self._timeout_s):
            await self._producer.start()

    async def commit(self, records: Records, last: Records) -> Sent:
        """Send everything, and make it readable. `last` goes behind `records`, if that matters.

        Returns when the transaction has ended in every partition, so that read_committed readers
        get it as soon as no transaction of somebody else is open in front of it.

        Raises:
            BatchError: a batch was not taken.
            KafkaError, TimeoutError: anything else; what became of the transaction is unknown.
        """
        began_s = time.monotonic()
        with anyio.fail_after(self._timeout_s):
            if not self._transactional:
                sent = await self._send(records)
                end = await self._send(last)
                took_s = time.monotonic() - began_s
                count, batches = sent.records + end.records, [*sent.batches, *end.batches]
                return Sent(count, batches, {**sent.ends, **end.ends}, took_s)
            await self._producer.begin_transaction()
            self._in_transaction = True
            sent = await self._send({**records, **last})
            await self._producer.commit_transaction()
            self._in_transaction = False
            producer_id = producer_id_of(self._producer)
            await until_readable(self._producer.client, sent.ends, producer_id)
            return sent

    async def left_open(self, partitions: Iterable[TopicPartition]) -> LeftOpen:
        """Return where a transaction of an earlier life hangs, or may do so.

        Raises:
            KafkaError, OSError, TimeoutError: no broker answers.
        """
        asked, client = list(partitions), self._producer.client
        with anyio.fail_after(self._timeout_s):
            await client.set_topics({partition.topic for partition in asked})
            return await left_open(client, asked, producer_id_of(self._producer))

    async def end_hanging(self, partitions: Iterable[TopicPartition], *, commit: bool) -> None:
        """End what hangs in partitions, by a transaction without records that has them in it.

        Raises:
            KafkaError, TimeoutError: what became of it is unknown.
        """
        asked = set(partitions)
        # Nobody may interrupt this: half of it would be aborted, and what was committed with it.
        with anyio.fail_after(_END_S, shield=True):
            await self._producer.begin_transaction()
            add_partitions(self._producer, asked)
            if commit:
                await self._producer.commit_transaction()
            else:
                await self._producer.abort_transaction()
        with anyio.fail_after(self._timeout_s):
            await until_ended(self._producer.client, asked, producer_id_of(self._producer))

    async def trial(self, records: Records) -> dict[Partition, BaseException]:
        """Send records in a transaction that is aborted; return what the brokers refuse, and why.

        Afterwards this producer is only good for being discarded.
        """
        refused: dict[Partition, BaseException] = {}
        with anyio.fail_after(self._timeout_s):
            if self._transactional:
                await self._producer.begin_transaction()
                self._in_transaction = True
            for partition, group in records.items():
                try:
                    await self._send({partition: group})
                except BatchError as error:
                    if kind_of_failure(error.cause) is not Failure.SUSPECT:
                        raise
                    refused[partition] = error.cause
        await self.abort()
        return refused

    async def abort(self) -> None:
        """Abort the open transaction, if there is one, in a short time or not at all.

        The next producer of this transactional id would do it too; until then, or for the time of
        the transaction timeout, readers are held back.
        """
        if not self._in_transaction:
            return
        self._in_transaction = False
        why_ended(self._producer)
        with anyio.move_on_after(ABORT_S, shield=True), suppress(KafkaError, AssertionError):
            await self._producer.abort_transaction()

    async def discard(self) -> None:
        """End all that aiokafka runs for this producer, whatever state it is in."""
        await discard(self._producer)

    async def _send_batch(self, batch: RecordBatch, partition: Partition) -> asyncio.Future[Any]:
        try:
            future: asyncio.Future[Any] = await self._producer.send_batch(
                batch, partition.topic, partition=partition.number
            )
        except IllegalOperation as told:
            reason = why_ended(self._producer) or told
            raise reason from reason.__cause__  # what the broker said
        return future

    async def _send(self, records: Records) -> Sent:
        began_s = time.monotonic()
        queues = [
            [(partition, batch) for batch in self._batches.of(group)]
            for partition, group in records.items()
        ]
        futures: dict[asyncio.Future[Any], tuple[Partition, RecordBatch]] = {}
        try:
            # Round by round: a partition takes its next batch when the one before has left.
            for turn in zip_longest(*queues):
                for entry in filter(None, turn):
                    partition, batch = entry
                    futures[await self._send_batch(batch, partition)] = entry
            if futures:
                await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
            for future, (partition, _) in futures.items():
                if future.done() and (error := future.exception()) is not None:
                    raise BatchError(partition, error)
        finally:
            for future in futures:
                consume(future)
        batches, ends = [], {}
        for future, (partition, batch) in futures.items():  # in order, within a partition
            count, offset = batch.record_count(), future.result().offset
            batches.append((count, batch.size()))
            ends[TopicPartition(*partition)] = offset + count if offset >= 0 else -1
        total = sum(count for count, _ in batches)
        return Sent(total, batches, ends, time.monotonic() - began_s)
