"""However often it is interrupted: what hangs ends as it was decided, and nothing is lost."""

from __future__ import annotations

from typing import Literal

import pytest
from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from blueflow.errors import TopicError
from blueflow.kafka.lasttransaction import LastTransaction

CURSOR = TopicPartition("cursor", 0)
EVENTS = (TopicPartition("likes", 0), TopicPartition("posts", 0), TopicPartition("posts", 1))
ALL = (CURSOR, *EVENTS)

Ending = Literal["done", "never arrived", "interrupted", "markers left out", "never tried"]
ENDINGS: tuple[Ending, ...] = (
    "done", "never arrived", "interrupted", "markers left out", "never tried",
)  # fmt: skip
some_partitions = st.sets(st.sampled_from(ALL))


class Brokers:
    """A transaction, in each partition: True is committed, False aborted, None hangs."""

    def __init__(self, decision: bool, hanging: set[TopicPartition]) -> None:  # noqa: FBT001
        self.state = {one: None if one in hanging else decision for one in ALL}
        self.decision: bool | None = decision
        self.ongoing: set[TopicPartition] = set()  # what the next producer aborts

    @property
    def hanging(self) -> set[TopicPartition]:
        return {one for one, state in self.state.items() if state is None}

    def begin(self, left_out: set[TopicPartition]) -> None:
        """Give a producer its id."""
        self.mark(self.ongoing - left_out, committed=False)
        self.ongoing, self.decision = set(), None

    def mark(self, partitions: set[TopicPartition], *, committed: bool) -> None:
        for one in partitions & self.hanging:
            self.state[one] = committed

    def end(self, how: Ending, *, committed: bool, left_out: set[TopicPartition]) -> None:
        if how == "interrupted":
            self.ongoing, self.decision = self.hanging, False
        elif how in {"done", "markers left out"}:
            self.mark(self.hanging - (left_out if how != "done" else set()), committed=committed)
            self.decision = committed


@given(
    decision=st.booleans(),
    hanging=st.sets(st.sampled_from(ALL), min_size=1),
    lives=st.lists(st.tuples(st.sampled_from(ENDINGS), some_partitions, st.booleans()), max_size=6),
)
def test_however_often_it_is_tried_nothing_is_lost(
    decision: bool,  # noqa: FBT001 - hypothesis gives it
    hanging: set[TopicPartition],
    lives: list[tuple[Ending, set[TopicPartition], bool]],
) -> None:
    brokers, last = Brokers(decision, hanging), LastTransaction(CURSOR)
    exact, interrupted = True, False
    for how, left_out, dies in [*lives, ("done", set[TopicPartition](), False)]:
        last.told(committed=brokers.decision)
        brokers.begin(left_out)
        if how != "never tried":
            try:
                committed = last.end(brokers.hanging)
            except TopicError:
                assert not exact
                return
            interrupted = how == "interrupted" and bool(brokers.hanging)
            if brokers.hanging:
                brokers.end(how, committed=committed, left_out=left_out)
                exact &= not interrupted
            if not brokers.hanging:
                last.ended()
        if dies and not interrupted:  # docs/reliability.md says what that would cost
            last, exact = LastTransaction(CURSOR), False  # and only the coordinator knows
    assert not brokers.hanging
    if brokers.state[CURSOR]:
        assert all(brokers.state.values()), "events are lost"
    if exact:
        assert set(brokers.state.values()) == {decision}


@pytest.mark.parametrize("decision", [True, False])
def test_a_process_that_can_ask_ends_it_as_decided(*, decision: bool) -> None:
    last = LastTransaction(CURSOR)
    last.told(committed=decision)
    assert last.end({CURSOR}) is decision


def test_where_nobody_knows_the_cursor_tells() -> None:
    assert LastTransaction(CURSOR).end({*EVENTS}) is True
    assert LastTransaction(CURSOR).end({CURSOR, *EVENTS}) is False


def test_what_is_lost_is_named() -> None:
    last = LastTransaction(CURSOR)
    last.told(committed=True)
    assert last.end({*EVENTS})
    last.told(committed=False)
    with pytest.raises(TopicError, match="likes/0, posts/0, posts/1"):
        last.end(set())


def test_nothing_is_done_where_nothing_hangs() -> None:
    last = LastTransaction(CURSOR)
    last.told(committed=True)
    assert last.end(set()) is False
    assert LastTransaction(CURSOR).end(set()) is False


@pytest.mark.parametrize("decision", [True, False])
def test_a_life_that_came_to_nothing_does_not_forget(*, decision: bool) -> None:
    last = LastTransaction(CURSOR)
    last.told(committed=decision)
    last.told(committed=None)
    assert last.end({CURSOR, *EVENTS}) is decision
