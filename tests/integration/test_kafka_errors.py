"""What a real broker refuses: events, users, topics. Told in one line, or kept as dead letters."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from tests.kafka.readers import cursors, dead_letters, stored_events

from blueflow.errors import KafkaRefusesError
from blueflow.events import Position, RepoOp
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import RECORD_BYTES_MAX, TopicWishes
from blueflow.metrics import Metrics
from blueflow.testing.samples import T0_US

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from tests.conftest import GuardedBroker

    from blueflow.events import Event

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 30  # less than three transactions take that wait for their timeout
SOURCE = "relay.example"
TEN_YEARS_MS = 10 * 365 * 86_400_000
COLLECTION = "app.bsky.feed.post"


def create(bootstrap: str, topics: dict[str, tuple[int, dict[str, str]]]) -> None:
    """Create topics: name to partitions and settings."""
    new = [NewTopic(name, count, config=config) for name, (count, config) in topics.items()]
    admin = AdminClient({"bootstrap.servers": bootstrap})  # alive until it is done
    for future in admin.create_topics(new).values():
        future.result(PATIENCE_S)


def events_topic(**config: str) -> dict[str, str]:
    """Return the settings of a topic for events that keeps them for ever."""
    fixed = {"retention.ms": "-1", "max.message.bytes": str(RECORD_BYTES_MAX)}
    return fixed | {name.replace("_", "."): value for name, value in config.items()}


def posts(count: int, *, accounts: int = 40) -> list[Event]:
    return [
        RepoOp(
            *(SOURCE, seq, 0, f"did:plc:account{seq % accounts}", T0_US + seq, "3lrev", "create"),
            *(COLLECTION, f"r{seq}", "bafyrei", {"$type": COLLECTION, "text": f"number {seq}"}),
        )
        for seq in range(1, count + 1)
    ]


def poisoned(events: Sequence[Event], seqs: Iterable[int]) -> list[Event]:
    """Return the events with those of some seqs so old that the topics refuse them."""
    return [
        msgspec.structs.replace(event, time_us=1) if event.seq in set(seqs) else event
        for event in events
    ]


class Trial:
    """A sink over topics that refuse records older than ten years."""

    def __init__(self, bootstrap: str, *, partitions: int = 3) -> None:
        self.bootstrap, self.prefix, self.metrics = bootstrap, f"{secrets.token_hex(4)}.", Metrics()
        picky = events_topic(message_timestamp_before_max_ms=str(TEN_YEARS_MS))
        create(bootstrap, {f"{self.prefix}events": (partitions, picky)})
        self.sink = KafkaSink(
            bootstrap,
            origin_source=SOURCE,
            topic_prefix=self.prefix,
            pipeline=self.prefix,
            route="single",
            topics=TopicWishes(retention_s=math.inf),
            metrics=self.metrics,
        )

    async def write(self, events: Sequence[Event]) -> Position:
        through = Position(SOURCE, events[-1].seq, T0_US + events[-1].seq)
        await self.sink.write(events, through=through)
        await self.sink.flush()
        return through

    async def judge(self, events: Sequence[Event], dead: Iterable[int]) -> list[dict[str, Any]]:
        """Check that all but the dead are there once and in order; return the dead letters."""
        run = anyio.to_thread.run_sync
        expected, found = defaultdict(list), defaultdict(list)
        for event in events:
            if event.seq not in set(dead):
                expected[event.did].append(event.seq)
        for stored in await run(stored_events, self.bootstrap, self.prefix):
            found[stored["did"]].append(stored["seq"])
        assert found == expected
        letters: list[dict[str, Any]] = await run(dead_letters, self.bootstrap, self.prefix)
        assert sorted(letter["seq"] for letter in letters) == sorted(dead)
        newest = (await run(cursors, self.bootstrap, self.prefix))[-1][1]
        assert newest["seq"] == events[-1].seq
        return letters

    def dead(self, reason: str) -> float | None:
        name = "blueflow_kafka_dead_letters_total"
        return self.metrics.registry.get_sample_value(name, {"reason": reason})


@asynccontextmanager
async def in_trial(guarded: GuardedBroker, *, partitions: int = 3) -> AsyncIterator[Trial]:
    trial = Trial(guarded.broker.bootstrap, partitions=partitions)
    before = asyncio.all_tasks()
    try:
        with anyio.fail_after(PATIENCE_S):
            await trial.sink.resume()
            yield trial
    finally:
        await trial.sink.close()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("dead", [[1_717], [1, 2, 500, 501, 999, 2_000]], ids=["one", "several"])
async def test_an_event_that_is_refused_becomes_a_dead_letter_and_all_others_arrive(
    guarded: GuardedBroker, dead: list[int]
) -> None:
    async with in_trial(guarded) as trial:
        events = poisoned(posts(2_000), dead)
        through = await trial.write(events)
        assert trial.sink.durable == {SOURCE: through}
        assert trial.dead("refused") == len(dead)
        after = [msgspec.structs.replace(e, seq=e.seq + 2_000) for e in posts(10)]
        await trial.write(after)
        letters = await trial.judge([*events, *after], dead)
    letter = letters[0]
    did = f"did:plc:account{letter['seq'] % 40}"
    assert letter["uri"] == f"at://{did}/{COLLECTION}/r{letter['seq']}"
    assert (letter["reason"], letter["source"], letter["op_index"]) == ("refused", SOURCE, 0)
    assert "timestamp" in letter["detail"]
    assert letter["topic"] == f"{trial.prefix}events"
    assert letter["event"]["commit"]["record"]["text"] == f"number {letter['seq']}"


async def test_when_more_than_a_hundred_are_refused_it_is_not_the_events(
    guarded: GuardedBroker,
) -> None:
    async with in_trial(guarded, partitions=12) as trial:
        through = await trial.write(posts(500))
        later = [msgspec.structs.replace(e, seq=e.seq + 500) for e in posts(200)]
        with pytest.raises(KafkaRefusesError, match=rf"BF-227.*{trial.prefix}events.*timestamp"):
            await trial.write(poisoned(later, range(501, 651)))
        assert trial.sink.durable == {SOURCE: through}
        await trial.judge(posts(500), [])


async def test_an_event_that_no_topic_takes_becomes_a_pointer(guarded: GuardedBroker) -> None:
    async with in_trial(guarded) as trial:
        events = posts(30)
        too_large = {"$type": COLLECTION, "text": "x" * (RECORD_BYTES_MAX + 1)}
        just_fits = {"$type": COLLECTION, "text": "\u1234" * (RECORD_BYTES_MAX // 3 - 300)}
        events[9] = msgspec.structs.replace(events[9], record=too_large)
        events[19] = msgspec.structs.replace(events[19], record=just_fits)
        await trial.write(events)
        assert (trial.dead("too_large"), trial.dead("refused")) == (1, 0)
        failed = {"outcome": "failed"}
        name = "blueflow_kafka_transactions_total"
        assert trial.metrics.registry.get_sample_value(name, failed) == 0
        (letter,) = await trial.judge(events, [10])
    assert (letter["reason"], letter["event"]) == ("too_large", None)
    assert letter["uri"] == f"at://did:plc:account10/{COLLECTION}/r10"
    assert letter["bytes"] > RECORD_BYTES_MAX
