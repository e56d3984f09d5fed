"""Cursor records are read as they were written, and of several processes one goes on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from blueflow.events import Position
from blueflow.kafka.cursorrecord import CursorTable, CursorValue, Instance, cursor_record

PIPELINES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INTS = st.integers(-(2**63), 2**63 - 1)
VALUES = st.builds(
    CursorValue, TEXTS, st.none() | INTS, INTS, TEXTS, st.integers(0, 2**63 - 1), st.booleans()
)


def table_of(pipeline: str, *records: tuple[str, CursorValue]) -> CursorTable:
    table = CursorTable(pipeline)
    for owner, value in records:
        table.take(*cursor_record(owner, value))
    return table


@given(PIPELINES, VALUES)
def test_what_is_written_is_read(pipeline: str, value: CursorValue) -> None:
    key, line = cursor_record(pipeline, value)
    assert key == f"{pipeline}|{value.source}".encode()
    table = table_of(pipeline, (pipeline, value))
    position = (
        {}
        if value.seq is None
        else {value.source: Position(value.source, value.seq, value.time_us)}
    )
    assert table.newest == value
    assert (table.positions, table.kinds) == (position, {value.simulated})
    assert (table.instance, table.source) == (value.instance, value.source)
    # What other programs read: the fields of the module's docstring, seq also when it is null.
    told = msgspec.json.decode(line)
    assert {"source", "seq", "time_us", "instance"} <= set(told)
    assert told.get("simulated", False) is value.simulated


def test_an_empty_topic_says_nothing() -> None:
    table = CursorTable("a")
    assert (table.positions, table.newest, table.kinds) == ({}, None, set())
    assert (table.instance, table.source) == (None, None)


NEIGHBOURS = ("a", "a.b", "a.", "a-b", "b", "A")


@given(st.lists(st.tuples(st.sampled_from(NEIGHBOURS), VALUES, st.booleans()), max_size=30))
def test_the_newest_of_each_source_of_this_pipeline_wins(
    records: list[tuple[str, CursorValue, bool]],
) -> None:
    for pipeline in NEIGHBOURS:
        table = CursorTable(pipeline)
        positions: dict[str, Position] = {}
        newest, kinds = None, set()
        for owner, value, removed in records:
            key, line = cursor_record(owner, value)
            table.take(key, None if removed else line)
            if not removed:
                kinds.add(value.simulated)
            if owner != pipeline:
                continue
            if removed:
                positions.pop(value.source, None)
                continue
            newest = value
            if value.seq is not None:
                positions[value.source] = Position(value.source, value.seq, value.time_us)
        assert (table.positions, table.newest, table.kinds) == (positions, newest, kinds)


def test_a_claim_without_a_position_keeps_the_one_that_is_there() -> None:
    position = CursorValue("relay", 5, 9, "x.1", 3)
    claim = CursorValue("relay", None, 0, "y.1")
    table = table_of("a", ("a", position), ("a", claim))
    assert table.positions == {"relay": Position("relay", 5, 9)}
    assert table.instance == "y.1"


def test_a_source_may_have_a_bar_in_its_name() -> None:
    value = CursorValue("my|file", 5, 9, "x.1")
    table = table_of("a", ("a", value))
    assert table.positions == {"my|file": Position("my|file", 5, 9)}
    table.take(cursor_record("a", value)[0], None)
    assert table.positions == {}


VALID: dict[str, Any] = {"source": "relay", "seq": 1, "time_us": 2, "instance": "x.1"}


@pytest.mark.parametrize("key", [None, b"", b"relay", b"\xff"])
def test_a_key_that_is_none(key: bytes | None) -> None:
    with pytest.raises(msgspec.MsgspecError, match="without the key"):
        CursorTable("a").take(key, msgspec.json.encode(VALID))


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"null", b"[]", b"{}", b"no", b'{"source":'),
        *(
            msgspec.json.encode(VALID | odd)
            for odd in (
                {"seq": "1"},
                {"seq": 1.5},
                {"time_us": None},
                {"source": None},
                {"instance": 3},
                {"simulated": "yes"},
                {"commit": None},
            )
        ),
        msgspec.json.encode({k: v for k, v in VALID.items() if k != "instance"}),
    ],
)
def test_a_value_that_is_none_also_of_another_pipeline(value: bytes) -> None:
    for key in (b"a|relay", b"b|relay"):
        table = CursorTable("a")
        with pytest.raises(msgspec.MsgspecError):
            table.take(key, value)
        assert table.newest is None


@given(st.none() | st.binary(max_size=30), st.none() | st.binary(max_size=60))
def test_garbage_raises_what_the_reader_of_the_topic_understands(
    key: bytes | None, value: bytes | None
) -> None:
    table = CursorTable("a")
    for one in (key, b"a|" + (key or b"")):
        try:
            table.take(one, value)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            assert not table.positions


def test_a_newer_version_may_write_more_fields() -> None:
    table = CursorTable("a")
    table.take(b"a|relay", msgspec.json.encode(VALID | {"later": [1, 2]}))
    assert table.positions == {"relay": Position("relay", 1, 2)}


# Who goes on: several processes of one pipeline.


def by(instance: str, commit: int = 0) -> CursorValue:
    return CursorValue("relay", 1, 1, instance, commit)


def test_before_its_first_claim_nobody_is_superseded() -> None:
    instance = Instance("me")
    assert not instance.superseded_by(None)
    assert not instance.superseded_by(by("other.1"))


def test_each_claim_has_a_name_of_its_own_and_none_of_them_supersedes_us() -> None:
    instance = Instance("host-12-ab.cd")
    names = [
        instance.claim(None),
        instance.claim(by("host-12-ab.cd.1")),
        instance.claim(by("x.7", 3)),
    ]
    assert len(set(names)) == 3
    assert instance.current == names[-1]
    assert not any(map(instance.superseded_by, [*map(by, names), by("x.7", 3), None]))
    assert instance.superseded_by(by("x.8", 3))
    assert instance.superseded_by(by("x.7", 4))  # it went on, so it was not fenced by us
    assert instance.superseded_by(by("host-12-ab.1"))
    assert instance.superseded_by(by("host-12-ab.cd"))


class Process:
    """One process as `KafkaSink` behaves; it does one step at a time.

    new -> begun (a producer id: older ones are fenced) -> claiming (it read the topic) -> owner
    -> failed (a write was refused, or not answered) -> checked (it read the topic) -> begun …
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.instance = Instance(name)
        self.state = "new"
        self.claimed_at: int | None = None  # length of the topic when it last claimed
        self.read_at = 0  # and when it last looked


class Takeover(RuleBasedStateMachine):
    """Every order of steps of up to four processes over one topic.

    Of the broker it has what matters: the topic, and that only the newest holder of the
    transactional id can write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.topic: list[CursorValue] = []
        self.processes: list[Process] = []
        self.holder: Process | None = None

    def pick(self, data: st.DataObject, *states: str) -> Process | None:
        able = [process for process in self.processes if process.state in states]
        return data.draw(st.sampled_from(able)) if able else None

    def look(self, process: Process) -> bool:
        """Read the topic; a process that is superseded ends."""
        process.read_at = len(self.topic)
        if process.instance.superseded_by(self.topic[-1] if self.topic else None):
            process.state = "ended"
        return process.state != "ended"

    @precondition(lambda self: len(self.processes) < 4)
    @rule()
    def start(self) -> None:
        self.processes.append(Process("abcd"[len(self.processes)]))

    @rule(data=st.data())
    def get_a_producer_id(self, data: st.DataObject) -> None:
        if process := self.pick(data, "new", "checked"):
            self.holder, process.state = process, "begun"

    @rule(data=st.data())
    def read_and_claim(self, data: st.DataObject) -> None:
        process = self.pick(data, "begun")
        if process and self.look(process):
            process.instance.claim(self.topic[-1] if self.topic else None)
            process.claimed_at, process.state = len(self.topic), "claiming"

    @rule(data=st.data(), answered=st.booleans())
    def write(self, data: st.DataObject, *, answered: bool) -> None:
        """Write the claim, or as the owner a position; the answer to it may be lost."""
        if process := self.pick(data, "claiming", "owner"):
            done = process is self.holder
            if done:
                self.topic.append(by(process.instance.current, len(self.topic)))
            process.state = "owner" if done and answered else "failed"

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if process := self.pick(data, "begun", "claiming", "owner"):
            process.state = "failed" if process.claimed_at is not None else "new"

    @rule(data=st.data())
    def read_again(self, data: st.DataObject) -> None:
        process = self.pick(data, "failed", "checked")
        if process and self.look(process):
            process.state = "checked"

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        if process := self.pick(data, "new", "begun", "claiming", "owner", "failed", "checked"):
            process.state = "dead"

    def writer(self) -> Process | None:
        name = self.topic[-1].instance.rpartition(".")[0] if self.topic else None
        return next((process for process in self.processes if process.name == name), None)

    @invariant()
    def whoever_wrote_last_goes_on(self) -> None:
        writer = self.writer()
        assert writer is None or writer.state != "ended"

    @invariant()
    def whoever_claimed_before_somebody_elses_last_record_ends_when_it_reads(self) -> None:
        newest = self.topic[-1] if self.topic else None
        for process in self.processes:
            if process.claimed_at is None or process.state in {"ended", "dead"}:
                continue
            later = len(self.topic) > process.claimed_at
            assert process.instance.superseded_by(newest) == (
                later and process is not self.writer()
            )

    @invariant()
    def at_most_one_believes_that_it_owns_the_pipeline_when_all_have_read(self) -> None:
        """Not counted: who has claimed over the newest record and did not write yet."""
        believing = [
            process
            for process in self.processes
            if process.state in {"owner", "failed", "checked"} and process.claimed_at is not None
        ]
        if all(process.read_at == len(self.topic) for process in believing):
            over_the_newest = [p for p in believing if p.claimed_at == len(self.topic)]
            assert len(believing) - len(over_the_newest) <= 1

    def teardown(self) -> None:
        """Let those that live go on, one whole turn after the other: exactly one stays."""
        for _ in range(3):
            for process in self.processes:
                if process.state in {"ended", "dead"}:
                    continue
                if process is self.holder and process.state == "owner":
                    continue
                if process.claimed_at is not None and not self.look(process):
                    continue
                self.holder = process
                if self.look(process):
                    process.instance.claim(self.topic[-1] if self.topic else None)
                    process.claimed_at, process.state = len(self.topic), "owner"
                    self.topic.append(by(process.instance.current, len(self.topic)))
        alive = [process for process in self.processes if process.state not in {"ended", "dead"}]
        assert len(alive) <= 1
        died = any(process.state == "dead" for process in self.processes)
        assert len(alive) == 1 or died or not self.processes


def test_of_several_processes_one_goes_on_in_every_order() -> None:
    run_state_machine_as_test(Takeover, settings=settings(max_examples=150, stateful_step_count=40))
