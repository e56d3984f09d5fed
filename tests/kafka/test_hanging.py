"""What is open in front of readers, and whose it is; a real broker: tests/faults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka

from blueflow.kafka import hanging as module
from blueflow.kafka import offsets
from blueflow.kafka.hanging import (
    LeftOpen,
    OpenTransaction,
    left_open,
    open_transactions,
    until_ended,
    until_readable,
)

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
        self.behind = 0  # so many records the replicas have not yet

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
            one: min(
                self.end[one] - self.behind,
                *(opened.offset for opened in self.open[one] if not open_too),
                self.end[one],
            )
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
    monkeypatch.setattr(offsets, "_POLL_S", 0.01)
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


async def test_a_marker_that_only_the_leader_has_is_waited_for(leaders: Leaders) -> None:
    leaders.behind = 5
    assert await waits({FIRST: 99})


async def test_where_nobody_tells_it_is_waited_for_a_while(
    leaders: Leaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaders.begin(FIRST, 80, THEIRS)
    leaders.secret = {FIRST}
    assert await waits({FIRST: 99})
    monkeypatch.setattr(module, "_UNTOLD_S", WAITS_S / 2)
    assert not await waits({FIRST: 99})


async def test_an_end_that_nobody_told_is_asked_for(leaders: Leaders) -> None:
    leaders.begin(FIRST, 90, OURS)
    leaders.ends_after = 4
    assert not await waits({FIRST: -1})
    assert leaders.asked == 4


async def test_a_leader_that_moves_is_asked_again(leaders: Leaders) -> None:
    leaders.fails = [kafka.NotLeaderForPartitionError(), kafka.KafkaConnectionError(), OSError()]
    assert not await waits({FIRST: 99})
    assert leaders.asked == 4


async def test_a_refusal_is_told(leaders: Leaders) -> None:
    for asking in (
        until_readable(CLIENT, {FIRST: 99}, OURS),
        left_open(CLIENT, leaders.open, OURS),
    ):
        leaders.fails = [kafka.TopicAuthorizationFailedError("posts")]
        with pytest.raises(kafka.TopicAuthorizationFailedError):
            await asking


async def test_only_what_is_ours_hangs(leaders: Leaders) -> None:
    assert await left_open(CLIENT, leaders.open, OURS) == LeftOpen(set(), set())
    leaders.begin(FIRST, 80, THEIRS)
    assert await left_open(CLIENT, leaders.open, OURS) == LeftOpen(set(), set())
    leaders.begin(SECOND, 190, OURS)
    leaders.fails = [kafka.LeaderNotAvailableError(FIRST)]
    assert await left_open(CLIENT, leaders.open, OURS) == LeftOpen({SECOND}, set())
    leaders.secret = {FIRST}
    assert await left_open(CLIENT, leaders.open, OURS) == LeftOpen({SECOND}, {FIRST})


async def test_an_end_counts_when_the_leaders_say_so(leaders: Leaders) -> None:
    leaders.begin(FIRST, 80, THEIRS)
    leaders.begin(FIRST, 90, OURS)
    with anyio.move_on_after(WAITS_S) as given_up:
        await until_ended(CLIENT, leaders.open, OURS)
    assert given_up.cancelled_caught
    leaders.open[FIRST].pop()
    with anyio.fail_after(WAITS_S):
        await until_ended(CLIENT, leaders.open, OURS)


class Cluster:
    """A client of two brokers; the first is too old for the question."""

    def __init__(self, answer: list[tuple[int, list[Any]]]) -> None:
        self.cluster = self
        self._answer = answer

    def leader_for_partition(self, partition: TopicPartition) -> int:
        return partition.partition

    async def send(self, node: int, _: object) -> Any:
        await anyio.lowlevel.checkpoint()
        if node == FIRST.partition:
            raise kafka.IncompatibleBrokerVersion
        partitions: list[Any] = [
            (number, code, "", who, {}) for number, (code, who) in enumerate(self._answer)
        ]
        return SimpleNamespace(topics=[("posts", partitions[1:], {})])


async def test_brokers_that_do_not_tell_do_not_hide_what_others_tell() -> None:
    producers: list[Any] = [(OURS, 0, 5, 1000, 0, 190, {}), (THEIRS, 0, 5, 1000, 0, -1, {})]
    client: Any = Cluster([(0, []), (0, producers)])
    assert await open_transactions(client, [FIRST, SECOND]) == {
        SECOND: [OpenTransaction(190, OURS, 1000)]
    }


async def test_topics_that_we_may_not_read_are_left_out() -> None:
    denied = kafka.TopicAuthorizationFailedError.errno
    client: Any = Cluster([(0, []), (denied, [])])
    assert await open_transactions(client, [SECOND]) == {}
