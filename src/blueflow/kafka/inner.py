"""What needs the private parts of an aiokafka producer, in one place: foremost its end.

Its own `stop()` waits until every batch is delivered, and an idempotent batch is tried for ever:
with a broker away it does not return, and cancelling it leaves its tasks running.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
from aiokafka.errors import KafkaError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokafka import AIOKafkaProducer, TopicPartition

DISCARD_S: Final = 3.0


async def discard(producer: AIOKafkaProducer) -> None:
    """End all tasks of a producer, fail what it has not delivered, close its connections."""
    inner: Any = producer
    sender, accumulator, manager = inner._sender, inner._message_accumulator, inner._txn_manager
    with anyio.move_on_after(DISCARD_S, shield=True):
        while tasks := _tasks_of(sender):  # one that is cancelled may have started others
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        # A batch whose turn comes again has left this set, and its callback takes it out once more.
        accumulator._pending_batches.update(*accumulator._batches.values())
        accumulator.fail_all(KafkaError("the producer was discarded"))
        for batch in list(accumulator._pending_batches):
            consume(batch.future)
            consume(batch._drain_waiter)
        for waiter in (manager._transaction_waiter, manager._pid_waiter):
            if waiter is not None:
                consume(waiter)
        await inner.client.close()
    inner._closed = True


def why_ended(producer: AIOKafkaProducer) -> BaseException | None:
    """Return what ended the transaction: whoever sends next is told only that there is none.

    It counts as retrieved then; aiokafka forgets it over an abort.
    """
    inner: Any = producer
    ended: asyncio.Future[None] | None = inner._txn_manager._transaction_waiter
    if ended is None or not ended.done() or ended.cancelled():
        return None
    return ended.exception()


def producer_id_of(producer: AIOKafkaProducer) -> int:
    """Return the id that the brokers gave it.

    It is that of the life before, unless it was forgotten (by default after 7 days without use) or
    went through all its epochs.
    """
    inner: Any = producer
    return cast("int", inner._txn_manager.producer_id)


def add_partitions(producer: AIOKafkaProducer, partitions: Iterable[TopicPartition]) -> None:
    """Make partitions part of the open transaction without writing to them."""
    inner: Any = producer
    for partition in partitions:
        inner._txn_manager.maybe_add_partition_to_txn(partition)


def consume(future: asyncio.Future[Any]) -> None:
    """Take the exception that nobody will ask for, so that asyncio does not complain."""
    if not future.done():
        future.cancel()
    elif not future.cancelled():
        future.exception()


def _tasks_of(sender: object) -> set[asyncio.Task[Any]]:
    """Return the tasks that run methods of this sender; aiokafka keeps no list of them."""
    tasks = set()
    for task in asyncio.all_tasks():
        frame = getattr(task.get_coro(), "cr_frame", None)
        if frame is not None and frame.f_locals.get("self") is sender:
            tasks.add(task)
    return tasks
