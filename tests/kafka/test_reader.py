"""`blueflow.kafka.read` over a real broker: each committed event, once, from where one says."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import defaultdict
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from blueflow.errors import (
    HeldBackError,
    KafkaUnavailableError,
    RecordsGoneError,
    SettingError,
    TopicError,
)
from blueflow.events import Position, encode_event
from blueflow.kafka import fetcher as module
from blueflow.kafka.connection import Connection
from blueflow.kafka.reader import read
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import TopicWishes, partitions_of
from blueflow.records import DATASETS, dataset_of
from blueflow.testing.faults import cancel_at
from blueflow.testing.samples import T0_US, contract_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from blueflow.events import Event
    from blueflow.kafka.reader import EventBatch, Reader
    from blueflow.testing.services.kafka import KafkaBroker

ROUTES = ("by-kind", "single")


class Topics:
    """The topics of one test, and ways to write to them."""

    def __init__(self, broker: KafkaBroker) -> None:
        self.bootstrap = broker.bootstrap
        self.prefix = f"reader-{secrets.token_hex(4)}."
        self.seq = 0

    def read(self, *datasets: str, **arguments: Any) -> Reader:
        arguments = {"connection": self.bootstrap, "topic_prefix": self.prefix} | arguments
        return read(*datasets, **arguments)

    async def write(self, *writes: Sequence[Event], route: str = "by-kind") -> None:
        """Write by the sink, each of the writes in a transaction of its own."""
        sink = KafkaSink(
            self.bootstrap,
            origin_source="relay",
            pipeline=self.prefix,
            topic_prefix=self.prefix,
            route=route,
            topics=TopicWishes(3, retention_s=math.inf),
        )
        try:
            await sink.resume()
            for events in writes:
                self.seq += 1
                await sink.write(events, through=Position("relay", self.seq, T0_US))
                await sink.flush()
            # A commit is answered before readers can see it. When the next one is done, they can.
            self.seq += 1
            await sink.write([], through=Position("relay", self.seq, T0_US))
            await sink.flush()
        finally:
            await sink.close()

    def producer(self, transactional_id: str | None = None) -> Producer:
        settings: dict[str, Any] = {"bootstrap.servers": self.bootstrap, "log_level": 0}
        if transactional_id:
            settings |= {"transactional.id": transactional_id, "transaction.timeout.ms": 60_000}
        producer = Producer(settings)
        if transactional_id:
            producer.init_transactions(30)
        return producer

    def put(self, producer: Producer, dataset: str, value: bytes | None) -> None:
        """Append a record to partition 0."""
        producer.produce(f"{self.prefix}{dataset}", value, b"key", partition=0)
        producer.flush(30)


@pytest.fixture
def topics(kafka: KafkaBroker) -> Topics:
    """The shared broker, and a prefix of this test's own."""
    return Topics(kafka)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    """Check that each reader ends all that it began."""
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


async def batches_of(reader: Reader, count: float = math.inf) -> list[EventBatch]:
    """Read to the end, or so many batches."""
    batches: list[EventBatch] = []
    with anyio.fail_after(30):
        async with reader:
            async for batch in reader:
                batches.append(batch)
                if len(batches) >= count:
                    break
    return batches


def events_of(batches: Sequence[EventBatch]) -> list[Event]:
    return [event for batch in batches for event in batch.events]


def lines(events: Sequence[Event]) -> list[bytes]:
    return sorted(map(encode_event, events))


@pytest.mark.parametrize("route", ROUTES)
async def test_all_events_come_once_and_those_of_a_partition_in_order(
    topics: Topics, route: str
) -> None:
    events = contract_events("relay", 200)
    await topics.write(events[:100], events[100:], route=route)
    reader = topics.read(until_end=True)
    batches = await batches_of(reader)
    assert lines(events_of(batches)) == lines(events)
    partitions: dict[tuple[str, int], list[int]] = defaultdict(list)
    by_account: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for batch in batches:
        assert len(batch.offsets) == len(batch.events)
        assert not batch.rejected
        partitions[batch.topic, batch.partition] += batch.offsets
        assert batch.next_offset == batch.offsets[-1] + 1
        for event in batch.events:
            by_account[batch.topic, event.did].append((event.seq, event.op_index))
    for offsets in partitions.values():
        assert offsets == sorted(set(offsets))
    for order in by_account.values():
        assert order == sorted(order)
    assert all(reader.positions[place] > offsets[-1] for place, offsets in partitions.items())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wanted", [("posts",), ("accounts", "likes")], ids="-".join)
async def test_some_data_sets_come_alone(
    topics: Topics, route: str, wanted: tuple[str, ...]
) -> None:
    events = contract_events("relay", 60)
    await topics.write(events, route=route)
    got = events_of(await batches_of(topics.read(*wanted, until_end=True)))
    assert lines(got) == lines([event for event in events if dataset_of(event) in wanted])
    assert got


async def test_both_routes_are_read_together(topics: Topics) -> None:
    events = contract_events("relay", 40)
    await topics.write(events[:20], route="by-kind")
    await topics.write(events[20:], route="single")
    assert lines(events_of(await batches_of(topics.read(until_end=True)))) == lines(events)


@pytest.mark.parametrize("route", ROUTES)
async def test_from_its_positions_a_reader_goes_on_without_loss_or_doubling(
    topics: Topics, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_EVENTS_MAX", 7)
    events = contract_events("relay", 60)
    await topics.write(events[:30], events[30:], route=route)
    for first in (1, 2, 5):
        got: list[Event] = []
        positions: dict[tuple[str, int], int] = {}
        for count in (first, first + 1, math.inf):
            reader = topics.read(until_end=True, positions=positions)
            got += events_of(await batches_of(reader, count))
            positions = reader.positions
        assert lines(got) == lines(events)
    again = topics.read(until_end=True, positions=positions)
    assert await batches_of(again) == []
    assert again.positions == positions


async def test_new_events_come_while_it_waits_and_stop_ends_it(topics: Topics) -> None:
    first, second = contract_events("relay", 20), contract_events("relay", 20, first_seq=21)
    await topics.write(first)
    reader = topics.read()
    got: list[Event] = []

    async def collect() -> None:
        async for batch in reader:
            got.extend(batch.events)

    task = asyncio.create_task(collect())
    with anyio.fail_after(30):
        while len(got) < len(first):
            await asyncio.sleep(0.02)
        await topics.write(second)
        while len(got) < len(first) + len(second):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        await reader.stop()
        await task
    assert lines(got) == lines(first + second)
    with pytest.raises(StopAsyncIteration):
        await anext(reader)
    await reader.stop()


async def test_until_end_means_the_end_at_the_start(topics: Topics) -> None:
    first, second = contract_events("relay", 20), contract_events("relay", 20, first_seq=21)
    await topics.write(first)
    reader = topics.read(until_end=True)
    async with reader:
        await topics.write(second)
        batches = [batch async for batch in reader]
    got = lines(events_of(batches))
    assert set(lines(first)) <= set(got) <= set(lines(first + second))
    rest = topics.read(until_end=True, positions=reader.positions)
    assert lines(events_of([*batches, *(await batches_of(rest))])) == lines(first + second)


async def test_from_the_newest_on(topics: Topics) -> None:
    old, new = contract_events("relay", 20), contract_events("relay", 20, first_seq=21)
    await topics.write(old)
    reader = topics.read(start="newest")
    got: list[Event] = []
    with anyio.fail_after(30):
        async with reader:
            await topics.write(new)
            while len(got) < len(new):
                got += (await anext(reader)).events
    assert lines(got) == lines(new)
    assert await batches_of(topics.read(start="newest", until_end=True)) == []


async def test_from_a_time_of_the_relay_on(topics: Topics) -> None:
    events = contract_events("relay", 60, step_us=1_000_000)
    await topics.write(events)
    start_us = T0_US + 30_000_000
    start = datetime.fromtimestamp(start_us / 1_000_000, UTC)
    got = events_of(await batches_of(topics.read(start=start, until_end=True)))
    assert lines(got) == lines([event for event in events if event.time_us >= start_us])
    late = datetime.fromtimestamp(T0_US / 1_000_000 + 10**6, UTC)
    assert await batches_of(topics.read(start=late, until_end=True)) == []


async def test_aborted_and_open_transactions_are_not_seen(topics: Topics) -> None:
    events = contract_events("relay", 20)
    await topics.write(events)
    aborting, opening = (topics.producer(f"{topics.prefix}{name}") for name in ("a", "o"))
    aborting.begin_transaction()
    topics.put(aborting, "posts", encode_event(contract_events("aborted", 1)[0]))
    aborting.abort_transaction(30)
    opening.begin_transaction()
    topics.put(opening, "posts", encode_event(contract_events("open", 1)[0]))
    read: list[Event] = []
    async with topics.read() as reader:
        while len(read) < len(events):
            read += (await anext(reader)).events
        with anyio.move_on_after(1):
            read += (await anext(reader)).events
    assert lines(read) == lines(events)
    opening.commit_transaction(30)
    rest = topics.read(until_end=True, positions=reader.positions)
    assert [event.source for event in events_of(await batches_of(rest))] == ["open"]


async def test_until_end_waits_for_a_transaction_that_is_open_now(topics: Topics) -> None:
    """A commit is answered a moment before it can be read: what was flushed is there."""
    events = contract_events("relay", 5)
    await topics.write(events)
    opening = topics.producer(f"{topics.prefix}o")
    opening.begin_transaction()
    topics.put(opening, "posts", encode_event(contract_events("open", 1)[0]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, _commit_later, opening)
        found = events_of(await batches_of(topics.read(until_end=True)))
    assert lines(found) == lines([*events, *contract_events("open", 1)[:1]])


async def test_until_end_leaves_out_what_is_behind_a_transaction_that_stays_open(
    topics: Topics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SETTLE_S", 0.5)
    events = contract_events("relay", 5)
    await topics.write(events)
    opening = topics.producer(f"{topics.prefix}o")
    opening.begin_transaction()
    topics.put(opening, "posts", encode_event(contract_events("open", 1)[0]))
    reader = topics.read(until_end=True)
    assert lines(events_of(await batches_of(reader))) == lines(events)
    (warning,) = [one for one in caplog.records if "is left out" in one.message]
    assert f"{topics.prefix}o" in vars(warning)["holder"]
    opening.commit_transaction(30)
    rest = topics.read(until_end=True, positions=reader.positions)
    assert [event.source for event in events_of(await batches_of(rest))] == ["open"]


def _commit_later(producer: Any) -> None:
    time.sleep(1)
    producer.commit_transaction(30)


async def test_positions_behind_an_open_transaction_are_not_gone(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLE_S", 0.2)
    await topics.write(contract_events("relay", 20))
    holder = topics.producer(f"{topics.prefix}open")
    holder.begin_transaction()
    topics.put(holder, "posts", b"{}")
    newest = topics.read("posts", start="newest", until_end=True)
    assert await batches_of(newest) == []
    again = topics.read("posts", positions=newest.positions, until_end=True)
    assert await batches_of(again) == []
    holder.abort_transaction(30)


async def test_a_topic_of_nothing_but_markers_has_an_end(topics: Topics) -> None:
    await topics.write([])
    producer = topics.producer(f"{topics.prefix}a")
    for _ in range(3):
        producer.begin_transaction()
        topics.put(producer, "posts", b"{}")
        producer.abort_transaction(30)
    reader = topics.read("posts", until_end=True)
    assert await batches_of(reader) == []
    assert reader.positions[f"{topics.prefix}posts", 0] == 6


@pytest.mark.parametrize("dataset", ["posts", "events"])
def test_a_batch_says_where_its_partition_goes_on(dataset: str) -> None:
    """Also behind records that are no events, or events that nobody asked for."""
    events = contract_events("relay", 20)
    values = [*map(encode_event, events), b"garbage"]
    records: Any = [
        SimpleNamespace(offset=10 + 2 * n, value=value) for n, value in enumerate(values)
    ]
    partition: Any = SimpleNamespace(topic=f"x.{dataset}", partition=1)
    end = 10 + 2 * len(events)
    batch = read("posts", topic_prefix="x.")._batch_of(partition, records)
    wanted = [e for e in events if dataset == "posts" or dataset_of(e) == "posts"]
    assert list(batch.events) == wanted
    assert list(batch.offsets) == [10 + 2 * events.index(event) for event in wanted]
    assert [(one.offset, one.value) for one in batch.rejected] == [
        (10 + 2 * len(events), b"garbage")
    ]
    assert (batch.partition, batch.next_offset) == (1, end + 1)


async def test_what_is_no_event_is_handed_over_as_such(
    topics: Topics, caplog: pytest.LogCaptureFixture
) -> None:
    event = next(e for e in contract_events("relay", 20) if dataset_of(e) == "posts")
    await topics.write([])
    producer = topics.producer()
    values = [None, b"", b"garbage", encode_event(event), b'{"did":"x"}', b"[" * 5000, b"\xff"]
    for value in values:
        topics.put(producer, "posts", value)
    batches = await batches_of(topics.read(until_end=True))
    assert events_of(batches) == [event]
    rejected = [one for batch in batches for one in batch.rejected]
    assert [one.value for one in rejected] == [v for v in values if v != encode_event(event)]
    assert [one.offset for one in rejected] == [0, 1, 2, 4, 5, 6]
    assert all(one.problem for one in rejected)
    assert batches[-1].next_offset == len(values)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert any("no event" in record.message for record in warnings)


async def test_who_holds_the_committed_records_back_is_named(
    topics: Topics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STALL_WARN_S", 0.5)
    events = contract_events("relay", 20)
    await topics.write(events)
    holder = topics.producer(f"{topics.prefix}sleeper")
    holder.begin_transaction()
    topics.put(holder, "posts", b"{}")
    reader = topics.read(stall_timeout_s=1.5)
    got: list[Event] = []

    async def collect() -> None:
        async with reader:
            async for batch in reader:
                got.extend(batch.events)

    with anyio.fail_after(30), pytest.raises(HeldBackError) as caught:
        await collect()
    error = caught.value
    assert f"{topics.prefix}sleeper" in error.holder
    assert (error.partition, error.retryable) == (f"{topics.prefix}posts/0", True)
    assert error.held_s >= 1.5
    assert error.offset == reader.positions[f"{topics.prefix}posts", 0]
    assert lines(got) == lines(events)
    told = [record for record in caplog.records if "open transaction" in record.message]
    assert len(told) == 1
    holder.abort_transaction(30)
    rest = topics.read(until_end=True, positions=reader.positions)
    assert await batches_of(rest) == []


@pytest.mark.parametrize("datasets", [("posts",), ()], ids=["one", "all"])
async def test_a_program_that_is_slow_with_its_batches_is_no_stall(
    topics: Topics, monkeypatch: pytest.MonkeyPatch, datasets: tuple[str, ...]
) -> None:
    events = contract_events("relay", 600)
    await topics.write(events)
    monkeypatch.setattr(module, "BATCH_EVENTS_MAX", 20)  # so partitions wait for their turn
    timeout_s = 0.7
    got: list[EventBatch] = []
    with anyio.fail_after(30):
        async with topics.read(*datasets, until_end=True, stall_timeout_s=timeout_s) as batches:
            async for batch in batches:
                got.append(batch)
                if len(got) < 4:
                    await anyio.sleep(1.5 * timeout_s)
    wanted = [event for event in events if not datasets or dataset_of(event) in datasets]
    assert lines(events_of(got)) == lines(wanted)
    assert len(got) > 4


@pytest.mark.parametrize("until_end", [False, True])
async def test_records_that_are_gone_are_told(topics: Topics, *, until_end: bool) -> None:
    await topics.write(contract_events("relay", 60))
    before = await batches_of(topics.read("posts", until_end=True))
    topic, number = before[0].topic, before[0].partition
    admin = AdminClient({"bootstrap.servers": topics.bootstrap, "log_level": 0})
    (deleted,) = admin.delete_records([TopicPartition(topic, number, 3)]).values()
    deleted.result(30)
    with pytest.raises(RecordsGoneError) as caught:
        await batches_of(topics.read(positions={(topic, number): 1}, until_end=until_end))
    assert caught.value.args == (f"{topic}/{number}", 1, 3, caught.value.end)
    assert caught.value.end > 3
    oldest = await batches_of(topics.read("posts", until_end=True))
    assert lines(events_of(oldest)) == lines(events_of(before)[3:])


@pytest.mark.parametrize("until_end", [False, True])
async def test_positions_beyond_the_end_are_of_a_topic_that_was_made_anew(
    topics: Topics, *, until_end: bool
) -> None:
    await topics.write(contract_events("relay", 20))
    await batches_of(reader := topics.read("posts", until_end=True))
    positions = dict.fromkeys(reader.positions, 10_000)
    with pytest.raises(RecordsGoneError) as caught:
        await batches_of(topics.read("posts", positions=positions, until_end=until_end))
    assert caught.value.partition.startswith(f"{topics.prefix}posts/")
    assert caught.value.args[1:3] == (10_000, 0)
    assert caught.value.end < 20 + 10  # events, and the end of a transaction or two


async def test_a_position_of_a_partition_that_is_not_there_is_refused(topics: Topics) -> None:
    await topics.write([])
    for place in ((f"{topics.prefix}posts", 3), ("elsewhere", 0)):
        with pytest.raises(SettingError, match="there is no partition"):
            await topics.read(positions={place: 0}).start()


async def test_positions_of_a_topic_that_has_gone_are_refused_unless_nobody_asks_for_it(
    topics: Topics,
) -> None:
    events = contract_events("relay", 20)
    await topics.write(events)
    await batches_of(reader := topics.read(until_end=True))
    admin = AdminClient({"bootstrap.servers": topics.bootstrap, "log_level": 0})
    (deleted,) = admin.delete_topics([f"{topics.prefix}posts"]).values()
    deleted.result(30)
    with anyio.fail_after(30):
        while await partitions_of(Connection(topics.bootstrap), [f"{topics.prefix}posts"]):
            await anyio.sleep(0.05)  # until the brokers have forgotten it
    with pytest.raises(SettingError, match=r"there is no partition .*posts"):
        await topics.read(until_end=True, positions=reader.positions).start()
    left = topics.read("likes", until_end=True, positions=reader.positions)
    assert await batches_of(left) == []


async def test_no_topic_and_no_broker_are_told(topics: Topics, free_tcp_port: int) -> None:
    with pytest.raises(TopicError, match="does not exist"):
        await topics.read().start()
    nowhere = f"127.0.0.1:{free_tcp_port}"
    with anyio.fail_after(30), pytest.raises(KafkaUnavailableError) as caught:
        await topics.read(connection=nowhere).start()
    assert caught.value.bootstrap == nowhere


async def test_cancelled_at_any_wait_it_loses_nothing(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_EVENTS_MAX", 3)
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    events = contract_events("relay", 60)
    await topics.write(events)
    got: list[Event] = []
    cancelled, suspension, ended = 0, 1, False
    reader = topics.read(until_end=True)

    async def step() -> None:
        nonlocal ended
        try:
            got.extend((await anext(reader)).events)
        except StopAsyncIteration:
            ended = True

    with anyio.fail_after(60):
        async with reader:
            while not ended:
                reached = await cancel_at(suspension, step)
                cancelled += reached
                suspension = suspension + 1 if reached else 1
    assert cancelled > 2
    assert lines(got) == lines(events)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((("post",), {}), "'post' is none of posts"),
        (((), {"start": 5}), "5 is neither oldest"),
        (((), {"positions": {("posts", 0): -5}}), "cannot begin at -5"),
        (((), {"positions": {("posts", 0): "5"}}), "cannot begin at '5'"),
        (((), {"start": "yesterday"}), "neither oldest, newest nor a datetime"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(arguments: Any, told: str) -> None:
    datasets, others = arguments
    with pytest.raises(SettingError, match=told):
        read(*datasets, **others)


def test_without_names_all_data_sets_are_read() -> None:
    assert read()._datasets == frozenset(DATASETS)
