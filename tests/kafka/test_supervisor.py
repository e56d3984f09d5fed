"""What the sink decides from one producer's life to the next, over a broker in memory."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka

from blueflow.backoff import Backoff
from blueflow.errors import (
    FencedError,
    KafkaRefusesError,
    OtherSourceError,
    SettingError,
    TopicError,
)
from blueflow.events import Position, encode_event
from blueflow.kafka import supervisor as module
from blueflow.kafka.cursorrecord import CursorTable, CursorValue, cursor_record
from blueflow.kafka.hanging import LeftOpen
from blueflow.kafka.producer import BatchError, Sent
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import Topics
from blueflow.testing.samples import contract_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from blueflow.events import Event
    from blueflow.kafka.transaction import Partition

NOW_US = time.time_ns() // 1000
# What becomes of a transaction.
LOST = "lost"  # it took place, and its producer does not know
REFUSED = "refused"  # nothing was written
HUNG = "hung"  # committed, says the coordinator, but without a marker anywhere
PARTLY = "partly"  # as HUNG, but the events have theirs
HIDDEN = "hidden"  # as HUNG, but the cursor has its own
UNDONE = "undone"  # aborted, but without markers where the events are
# What becomes of ending what hangs.
AGAIN = "again"  # the markers are left out again
NEVER = "never"  # it does not arrive
INTERRUPTED = "interrupted"  # it is aborted in the middle


class Broker:
    """The topics, who holds the transactional id, and what happens to the next commits."""

    def __init__(self) -> None:
        self.cursor: list[tuple[bytes, bytes]] = []
        self.events: list[bytes] = []
        self.dead_letters: list[bytes] = []
        self.holder: object = None
        self.plan: list[str | None] = []
        self.begun = 0
        self.before_start: Callable[[], None] = lambda: None
        self.refuses: Callable[[Partition, Any], bool] = lambda *_: False
        self.refuses_alone = True
        self.hanging: list[tuple[Partition, Any]] = []
        self.decision: bool | None = None  # of the coordinator; a new producer makes it forget
        self.asked_in_vain = 0  # so many lives end before they know what hangs
        self.endings: list[str] = []
        self.sizes = {"bluesky.posts": 2, "bluesky.cursor": 1}

    def say(self, value: CursorValue, pipeline: str = "default") -> None:
        """Write a cursor record, as another process would."""
        self.cursor.append(cursor_record(pipeline, value))

    def table(self, pipeline: str) -> CursorTable:
        table = CursorTable(pipeline)
        for key, value in self.cursor:
            table.take(key, value)
        return table

    def commit(self, holder: object, records: Any, last: Any) -> Sent:
        if holder is not self.holder:
            raise kafka.ProducerFenced
        assert not self.hanging, "what hangs becomes part of this transaction"
        fate = self.plan.pop(0) if self.plan else None
        self.decision = fate not in {REFUSED, UNDONE}
        if fate == REFUSED:
            raise kafka.NotEnoughReplicasError
        for partition, group in records.items():
            if any(self.refuses(partition, record) for record in group):
                raise BatchError(partition, kafka.PolicyViolationError())
        for partition, group in {**records, **last}.items():
            is_cursor = partition.topic.endswith("cursor")
            for record in group:
                if fate == HUNG or fate in ({PARTLY} if is_cursor else {HIDDEN, UNDONE}):
                    self.hanging.append((partition, record))
                elif self.decision:
                    self.take(partition, record)
        if fate is not None:
            raise TimeoutError
        return Sent(len(records), [], {}, 0.0)

    def take(self, partition: Partition, record: Any) -> None:
        """Make a record readable."""
        if partition.topic.endswith("cursor"):
            self.cursor.append((record[1], record[2]))
        elif partition.topic.endswith("dlq"):
            self.dead_letters.append(record[2])
        else:
            self.events.append(record[2])

    def end_hanging(self, *, commit: bool) -> None:
        fate = self.endings.pop(0) if self.endings else None
        if fate in {None, INTERRUPTED}:
            for partition, record in self.hanging if commit and fate is None else []:
                self.take(partition, record)
            self.hanging = []
        if fate != NEVER:
            self.decision = commit and fate != INTERRUPTED
        if fate is not None:
            raise TimeoutError


class Life:
    """What the sink takes for a producer."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def start(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._broker.before_start()
        self._broker.begun += 1
        self._broker.holder = self
        self._broker.decision = None

    async def left_open(self, partitions: list[TopicPartition]) -> LeftOpen:
        await anyio.lowlevel.checkpoint()
        if self._broker.asked_in_vain:
            self._broker.asked_in_vain -= 1
            raise kafka.LeaderNotAvailableError
        assert len(partitions) == sum(self._broker.sizes.values())
        return LeftOpen({TopicPartition(*place) for place, _ in self._broker.hanging}, set())

    async def end_hanging(self, partitions: set[TopicPartition], *, commit: bool) -> None:
        await anyio.lowlevel.checkpoint()
        assert partitions == {place for place, _ in self._broker.hanging}
        self._broker.end_hanging(commit=commit)

    async def commit(self, records: Any, last: Any) -> Sent:
        await anyio.lowlevel.checkpoint()
        return self._broker.commit(self, records, last)

    async def trial(self, records: Any) -> dict[Partition, BaseException]:
        await anyio.lowlevel.checkpoint()
        return {
            partition: kafka.PolicyViolationError()
            for partition, group in records.items()
            if self._broker.refuses_alone
            and any(self._broker.refuses(partition, one) for one in group)
        }

    async def abort(self) -> None:
        pass

    async def discard(self) -> None:
        pass


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """A broker in the place of the real one."""
    broker = Broker()

    async def ensure_topics(*_: object) -> Topics:
        return Topics(2, float("inf"), "bluesky.posts", broker.sizes)

    async def read_cursors(_: object, __: str, pipeline: str, **___: object) -> CursorTable:
        return broker.table(pipeline)

    async def is_committed(_: object, transactional_id: str, __: object) -> bool | None:
        assert transactional_id == "blueflow.default"
        return broker.decision

    monkeypatch.setattr(module, "Producer", lambda *_, **__: Life(broker))
    monkeypatch.setattr(module, "is_committed", is_committed)
    monkeypatch.setattr(module, "ensure_topics", ensure_topics)
    monkeypatch.setattr(module, "read_cursors", read_cursors)
    monkeypatch.setattr(module, "_BACKOFF", Backoff(base_s=0.0, cap_s=0.0))
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    return broker


@pytest.fixture
async def sink(broker: Broker) -> AsyncIterator[KafkaSink]:
    sink = made()
    yield sink
    await sink.close()


def made(**settings: Any) -> KafkaSink:
    return KafkaSink("broker:9092", origin_source="relay", commit_interval_s=0.01, **settings)


def outcomes(sink: KafkaSink) -> dict[str, float]:
    return {
        name: sink._metrics.transactions[name].total
        for name in ("committed", "recovered", "failed")
    }


async def write(sink: KafkaSink, events: list[Event]) -> None:
    await sink.write(events, through=Position("relay", events[-1].seq, NOW_US))
    with anyio.fail_after(5):
        await sink.flush()


def at(broker: Broker) -> Position | None:
    return broker.table("default").positions.get("relay")


async def test_events_and_position_are_in_one_transaction(broker: Broker, sink: KafkaSink) -> None:
    assert await sink.resume() == {}
    events = contract_events("relay", 30)
    broker.plan = [REFUSED]
    await write(sink, events)
    assert sorted(broker.events) == sorted(map(encode_event, events))
    assert at(broker) == Position("relay", 30, NOW_US) == sink.durable["relay"]
    newest = broker.table("default").newest
    assert newest
    assert (newest.commit, newest.instance) == (1, sink._supervisor._instance.current)
    assert await made().resume() == {"relay": Position("relay", 30, NOW_US)}


# Each list is what becomes of the next commits: of events, and of the claims between them.
@pytest.mark.parametrize(
    ("fates", "recovered"),
    [
        ([None], 0),
        ([REFUSED], 0),
        ([LOST], 1),
        ([REFUSED, REFUSED, REFUSED], 0),
        ([REFUSED, None, REFUSED], 0),
        ([REFUSED, None, LOST], 1),
        ([LOST, REFUSED], 1),
        ([LOST, LOST], 1),
        ([LOST, LOST, REFUSED, LOST], 1),
        ([REFUSED, LOST, None, None], 0),
        ([REFUSED, LOST, LOST, LOST, REFUSED], 0),
        ([HUNG], 1),
        ([PARTLY], 1),
        ([HIDDEN], 1),
        ([UNDONE], 0),
        ([HIDDEN, LOST, HIDDEN], 1),
        ([HUNG, HUNG, PARTLY], 1),
        ([UNDONE, UNDONE, PARTLY, UNDONE], 0),
        ([UNDONE, None, PARTLY, REFUSED, HUNG], 1),
    ],
    ids=lambda value: "-".join(one or "ok" for one in value) if isinstance(value, list) else None,
)
async def test_whatever_becomes_of_commits_and_claims_each_event_is_there_once(
    broker: Broker, sink: KafkaSink, fates: list[str | None], recovered: int
) -> None:
    await sink.resume()
    first, second = contract_events("relay", 5), contract_events("relay", 5, first_seq=6)
    await write(sink, first)
    broker.plan = list(fates)
    await write(sink, second)
    assert not broker.plan
    assert sorted(broker.events) == sorted(map(encode_event, first + second))
    assert at(broker) == Position("relay", 10, NOW_US)
    assert outcomes(sink)["recovered"] == recovered


@pytest.mark.parametrize("fate", [HUNG, PARTLY, HIDDEN, UNDONE])
@pytest.mark.parametrize("endings", [[NEVER], [AGAIN], [AGAIN, NEVER, AGAIN]], ids="-".join)
async def test_what_hangs_is_ended_until_it_has_ended(
    broker: Broker, sink: KafkaSink, fate: str, endings: list[str]
) -> None:
    await sink.resume()
    events = contract_events("relay", 5)
    broker.plan, broker.endings = [fate], list(endings)
    await write(sink, events)
    assert not broker.endings
    assert sorted(broker.events) == sorted(map(encode_event, events))


@pytest.mark.parametrize(("fate", "times"), [(HUNG, 1), (PARTLY, 2), (UNDONE, 1)])
async def test_an_end_that_is_aborted_in_the_middle_loses_nothing(
    broker: Broker, sink: KafkaSink, fate: str, times: int
) -> None:
    await sink.resume()
    events = contract_events("relay", 5)
    broker.plan, broker.endings = [fate], [INTERRUPTED]
    await write(sink, events)
    assert sorted(broker.events) == sorted(times * list(map(encode_event, events)))


async def test_events_that_such_an_end_loses_end_the_sink(broker: Broker, sink: KafkaSink) -> None:
    await sink.resume()
    broker.plan, broker.endings = [HIDDEN], [INTERRUPTED]
    with pytest.raises(TopicError, match="aborted what was committed elsewhere"):
        await write(sink, contract_events("relay", 5))


@pytest.mark.parametrize(("fate", "times"), [(HUNG, 1), (PARTLY, 2), (HIDDEN, 1), (UNDONE, 2)])
async def test_where_nobody_knows_the_decision_nothing_is_lost(
    broker: Broker, sink: KafkaSink, fate: str, times: int
) -> None:
    await sink.resume()
    events = contract_events("relay", 5)
    broker.plan, broker.asked_in_vain = [fate], sys.maxsize
    with anyio.move_on_after(0.1) as given_up:
        await write(sink, events)
    assert given_up.cancelled_caught
    assert broker.hanging
    await sink.close()
    broker.asked_in_vain, broker.decision = 0, None  # it died with no more than its producer id
    successor = made()
    position = (await successor.resume()).get("relay")
    if position is None or position.seq < events[-1].seq:
        await write(successor, events)
    assert sorted(broker.events) == sorted(times * list(map(encode_event, events)))
    await successor.close()


async def test_how_a_transaction_was_decided_is_known_beyond_a_life_that_came_to_nothing(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    events = contract_events("relay", 5)
    broker.plan, broker.asked_in_vain = [PARTLY], 2
    await write(sink, events)
    assert not broker.asked_in_vain
    assert sorted(broker.events) == sorted(map(encode_event, events))
    assert outcomes(sink)["recovered"] == 1


async def test_an_event_that_comes_late_does_not_move_the_position_and_is_not_taken_for_written(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    through = Position("relay", 10, NOW_US)
    events = contract_events("relay", 10)
    for one in (events[:-1], events[-1:]):
        broker.plan = [REFUSED]  # the position alone would say that it is there
        await sink.write(one, through=through)
        with anyio.fail_after(5):
            await sink.flush()
    assert sorted(broker.events) == sorted(map(encode_event, events))
    assert outcomes(sink)["recovered"] == 0


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_a_cursor_topic_that_lost_commits_ends_the_sink_before_it_writes(
    broker: Broker, sink: KafkaSink, lost: int
) -> None:
    await sink.resume()
    for first_seq in (1, 6, 11):
        await write(sink, contract_events("relay", 5, first_seq=first_seq))
    del broker.cursor[-lost:]  # a replica that was behind became the leader
    written = list(broker.cursor)
    broker.plan = [REFUSED]
    with pytest.raises(TopicError, match=rf"committed \({lost}\)"):
        await write(sink, contract_events("relay", 5, first_seq=16))
    assert broker.cursor == written
    left = at(broker)
    assert await made().resume() == ({"relay": left} if left else {})


async def test_a_cursor_topic_that_was_made_anew_gets_the_position_again(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    await write(sink, contract_events("relay", 5))
    await write(sink, contract_events("relay", 5, first_seq=6))
    broker.cursor.clear()
    broker.plan = [REFUSED]
    await write(sink, contract_events("relay", 5, first_seq=11))
    assert at(broker) == Position("relay", 15, NOW_US)


async def test_who_was_taken_over_from_ends_without_fencing_its_successor(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    successor = made()
    await successor.resume()
    begun = broker.begun
    with pytest.raises(FencedError) as caught:
        await write(sink, contract_events("relay", 3))
    assert caught.value.instance == successor._supervisor._instance.current
    assert broker.begun == begun  # it asked for no producer id: that would fence the successor
    assert broker.events == []
    await write(successor, contract_events("relay", 3))
    assert len(broker.events) == len(contract_events("relay", 3))
    await successor.close()


async def test_who_was_fenced_and_finds_no_successor_goes_on(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    broker.holder = "somebody who died before it could claim"
    await write(sink, contract_events("relay", 3))
    assert at(broker) == Position("relay", 3, NOW_US)


async def test_a_successor_that_claims_in_the_last_moment_is_noticed(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    broker.plan = [REFUSED]
    broker.before_start = lambda: broker.say(CursorValue("relay", 1, 0, "other.1"))
    with pytest.raises(FencedError, match=r"other\.1"):
        await write(sink, contract_events("relay", 3))
    assert broker.events == []


async def test_a_claim_keeps_the_position(broker: Broker) -> None:
    broker.say(CursorValue("relay", 7, NOW_US, "before.1", 4))
    sink = made()
    assert await sink.resume() == {"relay": Position("relay", 7, NOW_US)}
    assert at(broker) == Position("relay", 7, NOW_US)
    assert broker.table("default").instance == sink._supervisor._instance.current
    await sink.close()


async def test_a_number_of_another_process_is_none_of_ours(broker: Broker, sink: KafkaSink) -> None:
    broker.say(CursorValue("relay", 7, NOW_US, "before.1", 1))
    await sink.resume()
    broker.plan = [REFUSED]
    await write(sink, contract_events("relay", 3))
    assert outcomes(sink)["recovered"] == 0
    assert len(broker.events) == len(contract_events("relay", 3))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (CursorValue("relay", 7, 0, "x.1", simulated=True), "simulated data"),
        (CursorValue("other", 7, 0, "x.1"), "other"),
    ],
)
async def test_other_data_is_refused_before_anything_is_claimed(
    broker: Broker, value: CursorValue, told: str
) -> None:
    broker.say(value)
    sink = made()
    with pytest.raises(OtherSourceError, match=told):
        await sink.resume()
    assert len(broker.cursor) == 1
    await sink.close()


async def test_what_is_too_large_is_in_the_dead_letters_of_the_same_transaction(
    broker: Broker, sink: KafkaSink
) -> None:
    await sink.resume()
    assert sink._assembler
    sink._assembler._value_bytes_max = 300
    broker.plan = [REFUSED]
    events = contract_events("relay", 30)
    await write(sink, events)
    assert len(broker.events) + len(broker.dead_letters) == len(events)
    assert broker.dead_letters
    assert sink._metrics.dead_letters["too_large"].total == len(broker.dead_letters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delivery", "exactly-once"),
        ("route", "by_kind"),
        ("compression", "gzip"),
        ("pipeline", "a|b"),
        ("pipeline", ""),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_and_not_read_as_another(
    name: str, value: str
) -> None:
    with pytest.raises(SettingError, match=name) as caught:
        made(**{name: value})
    assert repr(value) in str(caught.value)


async def test_another_pipeline_with_a_longer_name_is_another(broker: Broker) -> None:
    broker.say(CursorValue("relay", 7, 0, "x.1"), "default.b")
    sink = made()
    assert await sink.resume() == {}
    await sink.close()


async def test_what_is_refused_alone_becomes_a_dead_letter(broker: Broker, sink: KafkaSink) -> None:
    events = contract_events("relay", 20)
    odd = encode_event(events[7])
    broker.refuses = lambda _, record: record[2] == odd
    await sink.resume()
    await write(sink, events)
    assert [json.loads(letter)["seq"] for letter in broker.dead_letters] == [events[7].seq]
    assert sorted(broker.events) == sorted(set(map(encode_event, events)) - {odd})
    assert at(broker) == Position("relay", events[-1].seq, NOW_US)


async def test_a_topic_that_takes_nothing_is_not_emptied_into_the_dead_letters(
    broker: Broker, sink: KafkaSink
) -> None:
    broker.refuses = lambda partition, _: partition.topic == "bluesky.posts"
    await sink.resume()
    with pytest.raises(KafkaRefusesError, match=r"bluesky\.posts"):
        await write(sink, contract_events("relay", 50))
    assert (broker.dead_letters, broker.events, at(broker)) == ([], [], None)


async def test_a_refusal_without_an_end_that_no_record_explains_ends_the_sink(
    broker: Broker, sink: KafkaSink
) -> None:
    broker.refuses, broker.refuses_alone = (lambda *_: True), False
    await sink.resume()
    with pytest.raises(KafkaRefusesError):
        await write(sink, contract_events("relay", 5))
    assert (broker.dead_letters, broker.events, at(broker)) == ([], [], None)
