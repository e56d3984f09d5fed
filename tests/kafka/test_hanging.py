"""What is open in front of readers, and whose it is; a real broker: tests/faults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka

from blueflow.kafka import hanging as module
from blueflow.kafka.hanging import OpenTransaction, held_by, left_open, until_readable

if TYPE_CHECKING:
    from collections.abc import Iterable

OURS, THEIRS = 7, 8
FIRST, SECOND = TopicPartition("posts", 0), TopicPartition("posts", 1)
WAITS_S = 0.3


class Leaders:
    """The brokers that lead the partitions: where each ends, and what is open in it."""

    def __init__(self) -> None:
        self.end = {FIRST: 100, SECOND: 200}
        self.open: dict[TopicPartition, list[OpenTransaction]] = {FIRST: [], SECOND: []}
        self.fails: list[Exception] = []
        self.asked = 0
        self.secret: set[TopicPartition] = set()  # nobody tells who writes there
        self.ends_after: int | None = None  # so many questions, whatever is open ends

    def begin(self, partition: TopicPartition, offset: int, producer_id: int) -> None:
        self.open[partition].append(OpenTransaction(offset, producer_id, 0))

    async def ask_ends(
        self, _: object, partitions: Iterable[TopicPartition], *, open_too: bool
    ) -> dict[TopicPartition, int]:
        await anyio.lowlevel.checkpoint()
        self.asked += 1
        if self.fails:
            raise self.fails.pop(0)
        if self.asked == self.ends_after:
            self.open = {one: [] for one in self.open}
        return {
            one: min([self.end[one], *(t.offset for t in self.open[one] if not open_too)])
            for one in partitions
        }

    async def open_transactions(
        self, _: object, partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, list[OpenTransaction]]:
        await anyio.lowlevel.checkpoint()
        return {one: self.open[one] for one in partitions if one not in self.secret}


class Client:
    """As much of a client as is used here."""

    def force_metadata_update(self) -> None:
        pass


CLIENT: Any = Client()


@pytest.fixture
def leaders(monkeypatch: pytest.MonkeyPatch) -> Leaders:
    leaders = Leaders()
    monkeypatch.setattr(module, "ask_ends", leaders.ask_ends)
    monkeypatch.setattr(module, "open_transactions", leaders.open_transactions)
    monkeypatch.setattr(module, "_OTHERS_S", 0.02)
    return leaders


async def waits(ends: dict[TopicPartition, int]) -> bool:
    with anyio.move_on_after(WAITS_S):
        await until_readable(CLIENT, ends, OURS)
        return False
    return True


async def test_what_nothing_stands_in_front_of_is_readable(leaders: Leaders) -> None:
    assert not await waits({FIRST: 100, SECOND: 200})
    assert leaders.asked == 1


async def test_a_transaction_is_readable_when_it_has_ended_everywhere(leaders: Leaders) -> None:
    leaders.begin(FIRST, 90, OURS)
    leaders.ends_after = 3
    assert not await waits({FIRST: 99, SECOND: 199})
    assert leaders.asked == 3


@pytest.mark.parametrize("partition", [FIRST, SECOND])
async def test_one_marker_that_is_missing_is_waited_for(
    leaders: Leaders, partition: TopicPartition
) -> None:
    leaders.begin(partition, 90, OURS)
    assert await waits({FIRST: 99, SECOND: 199})


async def test_nobody_waits_for_others(leaders: Leaders) -> None:
    leaders.begin(FIRST, 80, THEIRS)
    assert not await waits({FIRST: 99, SECOND: 199})


async def test_ours_behind_that_of_others_is_waited_for(leaders: Leaders) -> None:
    leaders.begin(FIRST, 80, THEIRS)
    leaders.begin(FIRST, 90, OURS)
    assert await waits({FIRST: 99})


async def test_what_nobody_tells_is_waited_for(leaders: Leaders) -> None:
    leaders.begin(FIRST, 80, THEIRS)
    leaders.secret = {FIRST}
    assert await waits({FIRST: 99})
    leaders.ends_after = leaders.asked + 2
    assert not await waits({FIRST: 99})


async def test_a_leader_that_moves_is_asked_again(leaders: Leaders) -> None:
    leaders.fails = [kafka.NotLeaderForPartitionError(), kafka.KafkaConnectionError(), OSError()]
    assert not await waits({FIRST: 99})
    assert leaders.asked == 4


async def test_a_refusal_is_told(leaders: Leaders) -> None:
    leaders.fails = [kafka.TopicAuthorizationFailedError("posts")]
    with pytest.raises(kafka.TopicAuthorizationFailedError):
        await until_readable(CLIENT, {FIRST: 99}, OURS)


async def test_only_what_is_ours_hangs(leaders: Leaders) -> None:
    assert await left_open(CLIENT, leaders.open, OURS) == set()
    leaders.begin(FIRST, 80, THEIRS)
    assert await left_open(CLIENT, leaders.open, OURS) == set()
    leaders.begin(SECOND, 190, OURS)
    assert await left_open(CLIENT, leaders.open, OURS) == {SECOND}
    leaders.secret = {FIRST}
    assert await left_open(CLIENT, leaders.open, OURS) == {FIRST, SECOND}


@pytest.mark.parametrize("error", [kafka.IncompatibleBrokerVersion(), NotImplementedError()])
async def test_brokers_that_cannot_tell_leave_everything_in_doubt(
    leaders: Leaders, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def unknown(*_: object) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    monkeypatch.setattr(module, "open_transactions", unknown)
    assert await held_by(CLIENT, [FIRST], OURS) == {FIRST}
