"""A transaction holds each event once, in the partition of its account, or as a dead letter."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.events import Account, Identity, Position, RepoOp, Sync, decode_line, encode_event
from blueflow.kafka.partition import partition_of
from blueflow.kafka.topicnames import TopicNames
from blueflow.kafka.transaction import (
    CLOCK_AHEAD_US,
    EVENTS_MAX,
    QUIET_S,
    RECORD_OVERHEAD,
    Assembler,
    KafkaRecord,
    Partition,
    Transaction,
    dead_letter,
    halves,
    without,
)
from blueflow.records import dataset_of
from blueflow.testing.samples import T0_US, contract_events, odd_events

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event

LARGE = 8 * 1024 * 1024
COLLECTIONS = ("app.bsky.feed.post", "app.bsky.feed.like", "app.bsky.graph.follow", "com.example.x")
PLACES = [Partition(topic, number) for topic in "ab" for number in range(2)]


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """Events of a few accounts in the order of their seqs, with times of every kind."""
    times = st.integers(-(2**63), 2**63 - 1) | st.integers(T0_US - 10**9, T0_US + 10**9)
    events: list[Event] = []
    for seq in range(1, draw(st.integers(0, 30)) + 1):
        did, time_us = f"did:plc:{draw(st.integers(0, 5))}", draw(times)
        match draw(st.integers(0, 9)):
            case 0:
                events.append(Identity("relay", seq, did, time_us, "t", "a.example"))
            case 1:
                events.append(Account("relay", seq, did, time_us, "t", active=True))
            case 2:
                events.append(Sync("relay", seq, did, time_us, "t", "3l", b"car"))
            case _:
                record = {"text": "x" * draw(st.sampled_from([0, 10, 1000]))}
                events += [
                    RepoOp(
                        "relay", seq, index, did, time_us, "3l", "create",
                        draw(st.sampled_from(COLLECTIONS)), "3l", "bafy", record,
                    )
                    for index in range(draw(st.integers(1, 3)))
                ]  # fmt: skip
    return events


def cut(data: st.DataObject, events: Sequence[Event]) -> list[Sequence[Event]]:
    """Cut a stream into writes; some are empty."""
    places = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=6)))
    return [
        events[begin:end] for begin, end in zip([0, *places], [*places, len(events)], strict=True)
    ]


def taken(
    events: Sequence[Event],
    *,
    partitions: int = 3,
    route: str = "by-kind",
    record_bytes_max: int = LARGE,
    clock_us: int = T0_US,
) -> Transaction:
    transaction = Transaction()
    assembler = Assembler(TopicNames("p.", route), partitions, record_bytes_max)
    assembler.take(transaction, events, Position("relay", 1), now_s=0.0, clock_us=clock_us)
    return transaction


@given(st.data(), st.integers(1, 8), st.sampled_from(["by-kind", "single"]))
def test_each_event_is_once_in_the_partition_of_its_account_and_in_order(
    data: st.DataObject, partitions: int, route: str
) -> None:
    events = data.draw(streams())
    transaction = Transaction()
    assembler = Assembler(TopicNames("p.", route), partitions, LARGE)
    writes = cut(data, events)
    for seq, write in enumerate(writes, start=1):
        through = Position(f"relay{seq % 2}", seq, seq)
        assembler.take(transaction, write, through, now_s=0.0, clock_us=T0_US)

    expected: dict[tuple[str, int], list[tuple[bytes, bytes]]] = defaultdict(list)
    for event in events:
        topic = "p." + (dataset_of(event) if route == "by-kind" else "events")
        key = event.did.encode()
        expected[topic, partition_of(key, partitions)].append((key, encode_event(event)))
    assert {
        tuple(place): [(record[1], record[2]) for record in group]
        for place, group in transaction.records.items()
    } == expected
    newest = {
        f"relay{seq % 2}": Position(f"relay{seq % 2}", seq, seq)
        for seq in range(1, len(writes) + 1)
    }
    assert transaction.positions == newest
    assert transaction.events == len(events)
    sizes = [len(r[1]) + len(r[2]) for group in transaction.records.values() for r in group]
    assert transaction.bytes == sum(sizes)
    assert not transaction.dead_letters


@given(streams(), st.integers(0, 2**61))
def test_no_timestamp_is_more_than_five_minutes_ahead(events: list[Event], clock_us: int) -> None:
    transaction = taken(events, partitions=1, route="single", clock_us=clock_us)
    latest_us = clock_us + 300_000_000
    assert [record[0] for group in transaction.records.values() for record in group] == [
        min(event.time_us, latest_us) // 1000 for event in events
    ]
    assert latest_us == clock_us + CLOCK_AHEAD_US


@given(streams(), st.integers(200, 1500))
def test_what_is_too_large_is_a_dead_letter_and_the_rest_goes_on(
    events: list[Event], record_bytes_max: int
) -> None:
    transaction = taken(events, partitions=2, record_bytes_max=record_bytes_max)
    kept = sorted(record[2] for group in transaction.records.values() for record in group)
    large: list[bytes] = []
    small: list[bytes] = []
    for event in events:
        line = encode_event(event)
        size = len(event.did) + len(line)
        (large if size > record_bytes_max - RECORD_OVERHEAD else small).append(line)
    assert kept == sorted(small)
    letters = [msgspec.json.decode(letter[2]) for letter in transaction.dead_letters]
    assert [letter["event"] for letter in letters] == list(map(msgspec.json.decode, large))
    assert {letter["reason"] for letter in letters} <= {"too_large"}
    assert transaction.events == len(events)  # their position moves on, too


def test_odd_events_and_every_kind_are_taken() -> None:
    events = [*contract_events("relay", 60), *odd_events("relay", 100)]
    transaction = taken(events)
    records = [record for group in transaction.records.values() for record in group]
    assert sorted(record[2] for record in records) == sorted(map(encode_event, events))
    latest_ms = (T0_US + CLOCK_AHEAD_US) // 1000
    assert max(record[0] for record in records) == latest_ms  # one claims year 148,000


def test_a_dead_letter_points_to_its_event() -> None:
    event = RepoOp(
        *("relay", 7, 2, "did:plc:a", T0_US, "3lrev", "create", "app.bsky.feed.post", "3lkey"),
        *("bafy", {"text": "x" * 3000}),
    )
    transaction = taken([event], partitions=12, record_bytes_max=2000)
    (letter,) = transaction.dead_letters
    line = encode_event(event)
    number = partition_of(b"did:plc:a", 12)
    assert (letter[0], letter[1]) == (T0_US // 1000, b"did:plc:a")
    assert msgspec.json.decode(letter[2]) == {
        "reason": "too_large",
        "detail": f"{len(line) + 9:,} bytes",
        "at_us": T0_US,
        "topic": "p.posts",
        "partition": number,
        "source": "relay",
        "seq": 7,
        "op_index": 2,
        "uri": "at://did:plc:a/app.bsky.feed.post/3lkey",
        "bytes": len(line),
        "event": msgspec.json.decode(line),
    }


@pytest.mark.parametrize(("text", "whole"), [(200_000, True), (300_000, False)])
def test_the_dead_letter_of_a_large_event_says_where_it_is_instead(
    text: int, *, whole: bool
) -> None:
    event = RepoOp(
        *("relay", 1, 0, "did:plc:a", T0_US, "3l", "create", "com.example.x", "k", "bafy"),
        {"text": "x" * text},
    )
    record = (1, b"did:plc:a", encode_event(event))
    letter = dead_letter(Partition("p.other", 3), record, "refused", "no", T0_US)
    told = msgspec.json.decode(letter[2])
    assert (told["event"] is not None) == whole
    assert (told["uri"], told["bytes"]) == ("at://did:plc:a/com.example.x/k", len(record[2]))
    assert len(letter[2]) < LARGE / 16  # so that it is never too large itself


@pytest.mark.parametrize(
    "event", contract_events("relay", 10)[-4:], ids=lambda event: type(event).__name__
)
def test_a_dead_letter_of_every_kind_names_the_account(event: Event) -> None:
    record = (1, event.did.encode(), encode_event(event))
    letter = dead_letter(Partition("p.x", 0), record, "refused", "no", T0_US)
    told = msgspec.json.decode(letter[2])
    assert told["uri"].startswith(f"at://{event.did}")
    assert decode_line(msgspec.json.encode(told["event"]), "", 0) == event


def test_it_is_due_when_its_first_event_is_old_or_a_position_has_waited() -> None:
    transaction, events = Transaction(), contract_events("relay", 3)
    assembler = Assembler(TopicNames(), 1, LARGE)
    assert not transaction
    assert transaction.due_s(0.3) == math.inf
    assembler.take(transaction, [], Position("relay", 1), now_s=100.0, clock_us=T0_US)
    assert transaction
    assert transaction.due_s(0.3) == 100.0 + QUIET_S
    assert transaction.due_s(60.0) == 160.0
    assembler.take(transaction, [], Position("relay", 2), now_s=101.0, clock_us=T0_US)
    assert transaction.due_s(0.3) == 100.0 + QUIET_S
    assembler.take(transaction, events[:1], Position("relay", 3), now_s=102.0, clock_us=T0_US)
    assert transaction.due_s(0.3) == 102.3
    assembler.take(transaction, events[1:], Position("relay", 4), now_s=103.0, clock_us=T0_US)
    assert transaction.due_s(0.3) == 102.3
    assert transaction.taken_s == [102.0, 103.0]


def test_only_dead_letters_are_due_as_events_are() -> None:
    transaction = Transaction()
    assembler = Assembler(TopicNames(), 1, RECORD_OVERHEAD)
    events = contract_events("relay", 1)
    assembler.take(transaction, events, Position("relay", 1), now_s=5.0, clock_us=T0_US)
    assert (transaction.records, len(transaction.dead_letters)) == ({}, 1)
    assert transaction.due_s(0.3) == 5.3


def test_it_is_full_by_bytes_or_by_events() -> None:
    transaction = Transaction()
    assert not transaction.is_full(1)
    transaction.bytes = 99
    assert not transaction.is_full(100)
    transaction.bytes = 100
    assert transaction.is_full(100)
    transaction.bytes, transaction.events = 0, EVENTS_MAX - 1
    assert not transaction.is_full(100)
    transaction.events = EVENTS_MAX
    assert transaction.is_full(100)


# Equal records are common: only their identity tells one from the other.
RECORDS = st.builds(lambda text: (0, b"k", b"v" + text.encode()), st.sampled_from(["", "1"]))


@given(st.lists(RECORDS, min_size=1, max_size=50))
def test_halves_are_the_whole_and_differ_by_one_at_most(records: list[KafkaRecord]) -> None:
    first, second = halves(records)
    assert [*map(id, first), *map(id, second)] == list(map(id, records))
    assert len(second) - len(first) in {0, 1}


@given(st.data())
def test_without_leaves_the_others_in_their_order(data: st.DataObject) -> None:
    groups = data.draw(st.dictionaries(st.sampled_from(PLACES), st.lists(RECORDS, min_size=1)))
    chosen = {
        place: [record for record in group if data.draw(st.booleans())]
        for place, group in groups.items()
        if data.draw(st.booleans())
    }
    left = without(groups, chosen)
    for place, group in groups.items():
        out = set(map(id, chosen.get(place, ())))
        kept = [record for record in group if id(record) not in out]
        assert [id(record) for record in left.get(place, [])] == [id(record) for record in kept]
    assert all(left.values())  # an empty group would be an empty batch
    assert without(groups, {}) == groups
    assert without(groups, groups) == {}
