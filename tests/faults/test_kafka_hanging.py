"""Markers that a coordinator leaves out: readers see every event once, and wait no longer.

What a broker does by chance when it restarts in the wrong moment (KAFKA-20734) is done here at
will: partitions are written to that the coordinator was never told of. It ends the transaction
without them; their leaders take the records since they do not verify.
"""

from __future__ import annotations

import math
import secrets
import time
from typing import TYPE_CHECKING

import anyio.to_thread
import pytest
from aiokafka import TopicPartition
from aiokafka.producer.transaction_manager import TransactionManager
from anyio.from_thread import start_blocking_portal
from tests.faults.kafkaruns import CAMPAIGN
from tests.kafka.readers import cursors, stored_events

from blueflow.events import Position, encode_event
from blueflow.kafka.connection import Connection
from blueflow.kafka.cursorrecord import CursorValue, cursor_record
from blueflow.kafka.producer import Producer
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import TopicWishes
from blueflow.kafka.transaction import KafkaRecord, Partition
from blueflow.testing.samples import T0_US, contract_events
from blueflow.testing.services.kafka import KafkaBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blueflow.events import Event

SOURCE = "relay"
PARTITIONS = 2
TIMEOUT_S = 2.0
VERIFY = "transaction.partition.verification.enable"
LEFT_OUT: dict[str, Callable[[str], bool]] = {
    "everywhere": lambda topic: True,
    "from the cursor": lambda topic: topic.endswith("cursor"),
    "from the events": lambda topic: not topic.endswith("cursor"),
    "from one topic": lambda topic: topic.endswith("likes"),
}

pytestmark = CAMPAIGN


@pytest.fixture(scope="module")
def broker(kafka_jars: object) -> Iterator[KafkaBroker]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(KafkaBroker(properties={VERIFY: "false"})) as broker,
    ):
        yield broker


@pytest.fixture
def prefix() -> str:
    return f"hanging-{secrets.token_hex(4)}."


def a_sink(broker: KafkaBroker, prefix: str) -> KafkaSink:
    return KafkaSink(
        broker.bootstrap,
        origin_source=SOURCE,
        topic_prefix=prefix,
        topics=TopicWishes(partitions=PARTITIONS, retention_s=math.inf),
        commit_interval_s=0.05,
        transaction_timeout_s=TIMEOUT_S,
    )


def a_producer(broker: KafkaBroker, transactional_id: str) -> Producer:
    return Producer(
        Connection(broker.bootstrap),
        client_id="dies",
        transactional_id=transactional_id,
        compression="zstd",
        timeout_s=TIMEOUT_S,
    )


def leave_markers_out(
    monkeypatch: pytest.MonkeyPatch,
    prefix: str,
    topics: Callable[[str], bool],
    *,
    lives: int = 1,
) -> set[TopicPartition]:
    """Keep partitions from the coordinator, in so many lives of producers from now on.

    Returns which it were.
    """
    tell, left_out = TransactionManager.maybe_add_partition_to_txn, set[TopicPartition]()
    seen: list[TransactionManager] = []

    def tell_of_some(manager: TransactionManager, partition: TopicPartition) -> None:
        if manager not in seen:
            seen.append(manager)
        if manager not in seen[:lives] or not topics(partition.topic):
            tell(manager, partition)
            return
        manager._txn_partitions.add(partition)
        left_out.add(partition)
        tell(manager, TopicPartition(f"{prefix}dlq", 0))  # without any there is no transaction

    monkeypatch.setattr(TransactionManager, "maybe_add_partition_to_txn", tell_of_some)
    return left_out


async def write(sink: KafkaSink, events: list[Event]) -> None:
    await sink.write(events, through=Position(SOURCE, events[-1].seq, T0_US))
    with anyio.fail_after(30):
        await sink.flush()


async def stored(broker: KafkaBroker, prefix: str) -> list[tuple[int, int]]:
    """Return seq and number of each event that readers see, sorted."""
    events = await anyio.to_thread.run_sync(stored_events, broker.bootstrap, prefix)
    return sorted((event["seq"], event["op_index"]) for event in events)


def numbers(events: list[Event]) -> list[tuple[int, int]]:
    return sorted((event.seq, getattr(event, "op_index", 0)) for event in events)


def records_of(prefix: str, events: list[Event]) -> dict[Partition, list[KafkaRecord]]:
    """Return events and their position as a process would send them that dies behind that."""
    value = CursorValue(SOURCE, events[-1].seq, T0_US, "dead#1", commit=1)
    found = {Partition(f"{prefix}cursor", 0): [(T0_US // 1000, *cursor_record("default", value))]}
    for place, event in enumerate(events):
        record = (T0_US // 1000, event.did.encode(), encode_event(event))
        found.setdefault(Partition(f"{prefix}likes", place % PARTITIONS), []).append(record)
    return found


@pytest.mark.parametrize(
    ("topics", "lives"),
    [*((topics, 1) for topics in LEFT_OUT.values()), (LEFT_OUT["from the events"], 2)],
    ids=[*LEFT_OUT, "from the events, and again"],
)
async def test_a_commit_whose_markers_are_left_out_is_completed(
    monkeypatch: pytest.MonkeyPatch,
    broker: KafkaBroker,
    prefix: str,
    topics: Callable[[str], bool],
    lives: int,
) -> None:
    events, more = contract_events(SOURCE, 40), contract_events(SOURCE, 40, first_seq=41)
    sink = a_sink(broker, prefix)
    try:
        await sink.resume()
        left_out = leave_markers_out(monkeypatch, prefix, topics, lives=lives)
        await write(sink, events)
        assert left_out
        assert sink.durable[SOURCE].seq == events[-1].seq
        assert await stored(broker, prefix) == numbers(events)
        outcomes = sink._metrics.transactions
        assert {name: outcomes[name].total for name in ("failed", "hanging", "recovered")} == {
            "failed": 1,
            "hanging": 1,
            "recovered": 1,
        }
        await write(sink, more)
    finally:
        await sink.close()
    assert await stored(broker, prefix) == numbers(events + more)


@pytest.mark.parametrize("topics", LEFT_OUT.values(), ids=list(LEFT_OUT))
async def test_a_commit_of_a_dead_process_is_completed(
    monkeypatch: pytest.MonkeyPatch,
    broker: KafkaBroker,
    prefix: str,
    topics: Callable[[str], bool],
) -> None:
    events = contract_events(SOURCE, 40)
    await a_pipeline_without_events(broker, prefix)
    dying = a_producer(broker, f"blueflow.{prefix}|default")
    await dying.start()
    left_out = leave_markers_out(monkeypatch, prefix, topics)
    with pytest.raises(TimeoutError):
        await dying.commit(records_of(prefix, events), {})
    await dying.discard()
    assert left_out
    sink = a_sink(broker, prefix)
    try:
        assert (await sink.resume())[SOURCE].seq == events[-1].seq
        assert sink._metrics.transactions["hanging"].total == 1
    finally:
        await sink.close()
    assert await stored(broker, prefix) == numbers(events)


@pytest.mark.parametrize("topics", LEFT_OUT.values(), ids=list(LEFT_OUT))
async def test_a_transaction_that_was_aborted_never_becomes_part_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
    broker: KafkaBroker,
    prefix: str,
    topics: Callable[[str], bool],
) -> None:
    events = contract_events(SOURCE, 40)
    await a_pipeline_without_events(broker, prefix)
    dying = a_producer(broker, f"blueflow.{prefix}|default")
    await dying.start()
    left_out = leave_markers_out(monkeypatch, prefix, topics)
    await dying._producer.begin_transaction()
    await dying._send(records_of(prefix, events))
    await dying.discard()
    assert left_out
    sink = a_sink(broker, prefix)
    try:
        assert await sink.resume() == {}
        assert sink._metrics.transactions["hanging"].total == 1
        assert await stored(broker, prefix) == []
        await write(sink, events)
    finally:
        await sink.close()
    assert await stored(broker, prefix) == numbers(events)


async def test_an_open_transaction_of_somebody_else_is_neither_waited_for_nor_ended(
    broker: KafkaBroker, prefix: str
) -> None:
    events, theirs = contract_events(SOURCE, 40), contract_events(SOURCE, 40, first_seq=1001)
    await a_pipeline_without_events(broker, prefix)
    neighbour = a_producer(broker, "somebody else")
    await neighbour.start()
    records = records_of(prefix, theirs)
    del records[Partition(f"{prefix}cursor", 0)]
    await neighbour._producer.begin_transaction()
    await neighbour._send(records)
    sink = a_sink(broker, prefix)
    began_s = time.monotonic()
    try:
        await sink.resume()
        await write(sink, events)
    finally:
        await sink.close()
    assert time.monotonic() - began_s < TIMEOUT_S, "it waited for the neighbour"
    await neighbour._producer.commit_transaction()
    await neighbour.discard()
    assert sink._metrics.transactions["hanging"].total == 0
    assert await stored(broker, prefix) == numbers(events + theirs)
    newest = (await anyio.to_thread.run_sync(cursors, broker.bootstrap, prefix))[-1][1]
    assert newest["seq"] == events[-1].seq


async def a_pipeline_without_events(broker: KafkaBroker, prefix: str) -> None:
    sink = a_sink(broker, prefix)
    await sink.resume()
    await sink.close()
