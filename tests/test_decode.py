"""The decoder: recorded frames against Jetstream, the spec's rules, each failure of its peers."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.builders import (
    DID,
    LIKE,
    NOW_US,
    POST,
    REV,
    TIME,
    TIME_US,
    account,
    car,
    commit,
    commit_body,
    error_frame,
    frame,
    identity,
    post,
)
from tests.corpus.cases import seeded, share
from tests.corpus.dagcbor import Link, Raw, cid_of, encode, from_json

from blueflow import decode
from blueflow.decode import REJECT_REASONS, STRIKES_MAX, Decoder, Wanted
from blueflow.errors import FrameError, SequenceResetError
from blueflow.events import (
    Account,
    Event,
    Identity,
    Info,
    Position,
    RepoOp,
    Sync,
    encode_event,
)
from blueflow.operations import CommitReader
from blueflow.wire.frame import ErrorMessage, read_frame
from blueflow.wire.peek import peek_commit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from blueflow.decode import Check
    from blueflow.interfaces import Rejected

CHECKS: list[Check] = ["all", "used", "none"]
FIRST_SEQ = 31_527_015_322


def decoder(
    *collections: str,
    after: int | None = 0,
    dids: Sequence[str] = (),
    check: Check = "all",
) -> Decoder:
    position = None if after is None else Position("relay", after)
    return Decoder("relay", after=position, wanted=Wanted(collections, dids), check=check)


def feed(
    messages: Iterable[bytes | str], *collections: str, **arguments: Any
) -> tuple[list[Event], list[Rejected]]:
    """Events and rejections of some messages, fed to a decoder of their own."""
    one = decoder(*collections, **arguments)
    for message in messages:
        assert one.feed(message, NOW_US) is None
    batch = one.take()
    return list(batch.events), list(batch.rejected)


def reasons(rejected: Iterable[Rejected]) -> list[tuple[int | None, str]]:
    return [(one.op_index, one.reason) for one in rejected]


def lines(data: bytes) -> dict[tuple[str, ...], dict[str, Any]]:
    """Jetstream lines by what names an operation; `time_us` is Jetstream's own clock."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for text in data.splitlines():
        line = json.loads(text)
        del line["time_us"]
        part = line["commit"]
        found[line["did"], part["rev"], part["collection"], part["rkey"], part["operation"]] = line
    return found


# What was recorded from the network.


@pytest.mark.parametrize("check", CHECKS)
def test_recorded_frames_are_the_recorded_jetstream_lines(
    recorded_frames: list[bytes], data_folder: Path, check: Check
) -> None:
    expected = lines((data_folder / "firehose" / "jetstream_v1.jsonl").read_bytes())
    events, rejected = feed(recorded_frames, after=FIRST_SEQ - 1, check=check)
    assert not rejected
    mine = []
    for event in events:
        line = json.loads(encode_event(event))
        assert [line.pop(name) for name in ("source", "seq", "op_index")] == [
            "relay", event.seq, event.op_index,
        ]  # fmt: skip
        mine.append(json.dumps(line).encode())
    assert lines(b"\n".join(mine)) == expected
    assert len(mine) == len(expected) == 102


def test_recorded_frames_come_in_order_and_whole(recorded_frames: list[bytes]) -> None:
    one = decoder(after=FIRST_SEQ - 1)
    for data in recorded_frames:
        one.feed(data, NOW_US)
    batch = one.take()
    places = [(event.seq, event.op_index) for event in batch.events]
    assert places == sorted(set(places))
    assert {seq for seq, _ in places} == set(range(FIRST_SEQ, FIRST_SEQ + 100))
    assert (batch.frames, batch.frame_bytes) == (100, sum(map(len, recorded_frames)))
    newest = max(event.time_us for event in batch.events)
    assert batch.through == Position("relay", FIRST_SEQ + 99, newest)
    assert any(a.time_us > b.time_us for a, b in pairwise(batch.events))
    assert one.sequence.counts.missed == 0
    assert one.take().frames == 0


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("collections", "number"),
    [
        ([POST], 10),
        ([LIKE, POST], 79),
        (["app.bsky.graph.*"], 9),
        (["app.bsky.*"], 101),
        (["app.bsky.graph.follow"], 8),
        (["app.bsky.actor.status", "fm.teal.*"], 2),
        (["app.bsky.feed"], 0),
        (["app.bsky.fee.*"], 0),
    ],
    ids=str,
)
def test_a_filter_gives_exactly_what_it_names(
    recorded_frames: list[bytes], collections: list[str], number: int, check: Check
) -> None:
    everything, _ = feed(recorded_frames, after=FIRST_SEQ - 1)
    wanted = Wanted(collections)
    expected = [event for event in everything if wanted.event(event)]
    events, rejected = feed(recorded_frames, *collections, after=FIRST_SEQ - 1, check=check)
    assert events == expected
    assert (len(events), rejected) == (number, [])


def test_of_a_mixed_commit_only_what_is_wanted_comes_in_its_place() -> None:
    records = {f"{LIKE}/1": post(), f"{POST}/2": post("a"), "x.y.z/3": {}, f"{POST}/4": post("b")}
    message = commit(1, records, deletes=[f"{LIKE}/5", f"{POST}/6"])
    events, rejected = feed([message], POST)
    assert rejected == []
    assert [event.op_index for event in events] == [1, 3, 5]
    assert events == [event for event in feed([message])[0] if event.op_index in {1, 3, 5}]


def test_a_filter_by_account(recorded_frames: list[bytes]) -> None:
    everything, _ = feed(recorded_frames, after=FIRST_SEQ - 1)
    did = everything[5].did
    events, _ = feed(recorded_frames, after=FIRST_SEQ - 1, dids=[did])
    assert events == [event for event in everything if event.did == did]
    both, _ = feed(recorded_frames, "x.y.z", after=FIRST_SEQ - 1, dids=[did])
    assert both == []


def test_the_position_moves_past_filtered_frames(recorded_frames: list[bytes]) -> None:
    whole, filtered = decoder(after=FIRST_SEQ - 1), decoder("x.y.z", after=FIRST_SEQ - 1)
    for data in recorded_frames:
        for one in (whole, filtered):
            one.feed(data, NOW_US)
    assert filtered.latest_time_us == whole.latest_time_us > 0
    assert filtered.counts.filtered_frames == 100
    batch = filtered.take()
    assert (batch.events, batch.through) == ([], whole.take().through)
    assert batch.frames == 100


def scenario_frames(data_folder: Path, name: str) -> list[bytes]:
    scenario = json.loads((data_folder / "relay_scenarios" / f"{name}.json").read_text())
    frames = [message["frame"] for message in scenario["messages"]]
    return [encode(one["header"]) + encode(from_json(one["body"])) for one in frames]


def test_the_life_of_an_account(data_folder: Path) -> None:
    events, rejected = feed(scenario_frames(data_folder, "account_lifecycle"))
    assert rejected == []
    assert [(event.seq, type(event)) for event in events] == [
        (110, Identity), (120, Account), (130, Sync), (140, Account),
    ]  # fmt: skip
    identity_event, active, sync, inactive = events
    assert isinstance(identity_event, Identity)
    assert identity_event.handle
    assert isinstance(active, Account)
    assert (active.active, active.status) == (True, None)
    assert isinstance(inactive, Account)
    assert (inactive.active, inactive.status) == (False, "deleted")
    assert isinstance(sync, Sync)
    assert sync.blocks.startswith(b"\x3a\xa2\x65roots")
    assert sync.rev


def test_commits_from_before_sync_1_1(data_folder: Path) -> None:
    events, rejected = feed(scenario_frames(data_folder, "legacy"))
    assert rejected == []
    assert [type(event) for event in events] == [Identity, Account, RepoOp]
    events, rejected = feed(scenario_frames(data_folder, "post_lifecycle_legacy"))
    assert rejected == []
    operations = [event.operation for event in events if isinstance(event, RepoOp)]
    assert len(operations) == len(events) > 5
    assert {"create", "delete"} <= set(operations)


@pytest.mark.parametrize("check", CHECKS)
def test_legacy_commits(data_folder: Path, check: Check) -> None:
    paths = sorted((data_folder / "legacy_commits").glob("*.json"))
    bodies = [json.loads(path.read_text()) for path in paths]
    assert len(bodies) == 2
    for body in bodies:
        events, rejected = feed([frame("#commit", from_json(body))], check=check)
        assert rejected == []
        assert len(events) == len(body["ops"]) > 0
        for event, op in zip(events, body["ops"], strict=True):
            assert isinstance(event, RepoOp)
            assert f"{event.collection}/{event.rkey}" == op["path"]
            assert event.cid == (op["cid"]["$link"] if op["cid"] else None)
            assert (event.record is None) == (op["action"] == "delete")


def test_of_one_seq_twice_the_first_counts_and_a_lower_one_with_a_newer_time_is_told(
    data_folder: Path,
) -> None:
    frames = scenario_frames(data_folder, "seq_ordering")
    one = decoder(after=None)
    for message in frames[:2]:
        one.feed(message, NOW_US)
    assert [(event.seq, type(event)) for event in one.take().events] == [(1000, Identity)]
    assert one.sequence.counts.duplicates == 1
    bodies = json.loads((data_folder / "relay_scenarios" / "seq_ordering.json").read_text())
    times = [message["frame"]["body"]["time"] for message in bodies["messages"]]
    assert times[2] > times[0]
    with pytest.raises(SequenceResetError):
        one.feed(frames[2], NOW_US)
    one.feed(frames[3], NOW_US)
    assert {event.seq for event in one.take().events} == {2000}


# The rules of the spec.


def test_every_field_of_an_operation() -> None:
    record = post("hi")
    body = commit_body(7, {f"{POST}/3lc": record}, deletes=[f"{LIKE}/3ld"])
    assert feed([frame("#commit", body)])[0] == [
        RepoOp(
            "relay", 7, 0, DID, TIME_US, REV, "create", POST, "3lc",
            json.loads(json.dumps(cid_text_of(record))), record,
        ),
        RepoOp("relay", 7, 1, DID, TIME_US, REV, "delete", LIKE, "3ld"),
    ]  # fmt: skip


def cid_text_of(record: Any) -> str:
    from blueflow.wire.cid import cid_text  # noqa: PLC0415 - only here

    return cid_text(cid_of(encode(record)))


def test_every_field_of_the_account_level_events() -> None:
    sync = {"seq": 3, "did": DID, "blocks": b"car", "rev": REV, "time": TIME}
    events, rejected = feed(
        [
            identity(1, handle="a.example"),
            account(2, active=False, status="takendown"),
            frame("#sync", sync),
        ]
    )
    assert rejected == []
    assert events == [
        Identity("relay", 1, DID, TIME_US, TIME, "a.example"),
        Account("relay", 2, DID, TIME_US, TIME, active=False, status="takendown"),
        Sync("relay", 3, DID, TIME_US, TIME, REV, b"car"),
    ]


def test_account_level_events_belong_to_no_collection() -> None:
    messages = [identity(1), account(2)]
    assert feed(messages, POST) == ([], [])
    assert len(feed(messages, dids=[DID])[0]) == 2
    assert feed(messages, dids=["did:plc:other"]) == ([], [])


def test_remarks_and_errors_of_the_relay() -> None:
    one = decoder()
    one.feed(frame("#info", {"name": "OutdatedCursor", "message": "m"}), NOW_US)
    one.feed(frame("#info", {"name": 5}), NOW_US)
    one.feed(frame("#info", {"name": "WithSeq", "seq": 5, "time": TIME}), NOW_US)
    assert one.take_infos() == [Info("relay", "OutdatedCursor", "m"), Info("relay", "WithSeq")]
    assert one.take_infos() == []
    assert one.counts.ignored == {"info": 1}
    error = one.feed(error_frame({"error": "ConsumerTooSlow", "message": "bye"}), NOW_US)
    assert error == ErrorMessage("ConsumerTooSlow", "bye")


def test_an_unknown_type_is_counted_and_passed_over() -> None:
    one = decoder()
    one.feed(frame("#new", {"seq": 5, "time": TIME}), NOW_US)
    one.feed(frame("#newer", {"anything": [1]}), NOW_US)
    assert one.counts.ignored == {"type": 2}
    assert one.position == Position("relay", 5, TIME_US)
    assert one.take().events == []


def test_an_unknown_op_is_counted_and_passed_over() -> None:
    one = decoder()
    assert one.feed(frame("#commit", commit_body(5), op=7), NOW_US) is None
    assert one.counts.ignored == {"op": 1}
    assert one.take_ready
    assert one.take().through == Position("relay", 0, 0)


def test_unknown_fields_are_counted_and_ignored() -> None:
    one = decoder()
    for message in (
        commit(1, new=1),
        identity(2, new=1),
        account(3, new={"a": []}),
        commit(4, {}, deletes=["a/b"]),
        identity(5),
        frame("#commit", {k: v for k, v in commit_body(6, new=1).items() if k != "prevData"}),
    ):
        one.feed(message, NOW_US)
    assert one.counts.unknown_fields == 4
    assert len(one.take().events) == 6


def test_an_unknown_action_is_rejected_and_the_others_go_on() -> None:
    body = commit_body(1, {"a/1": post(), "a/2": post("b")}, deletes=["a/3"])
    body["ops"][0]["action"] = "move"
    body["ops"].append({"action": "merge", "path": "a/4", "cid": None})
    events, rejected = feed([frame("#commit", body)])
    assert [event.op_index for event in events] == [1, 2]
    assert reasons(rejected) == [(0, "action"), (3, "action")]


def test_a_new_status_is_delivered_as_it_is() -> None:
    ((event,), _) = feed([account(1, active=False, status="hibernating")])
    assert isinstance(event, Account)
    assert event.status == "hibernating"


# Failures of peers.


@pytest.mark.parametrize("seq", [2**31 - 1, 2**31, 2**32, FIRST_SEQ, 2**53, 2**53 + 1, 2**63 - 1])
@pytest.mark.parametrize("collections", [[], [LIKE]], ids=["wanted", "filtered"])
def test_a_seq_is_64_bit(seq: int, collections: list[str]) -> None:
    one = decoder(*collections, after=seq - 1)
    one.feed(commit(seq, {f"{POST}/3lcdwt2zvvc2h": post("x" * 300)}), NOW_US)
    assert one.position == Position("relay", seq, TIME_US)
    if not collections:
        (event,) = one.take().events
        assert json.loads(encode_event(event))["seq"] == seq


@pytest.mark.parametrize("seq", [2**63, 2**64 - 1, -1, True, None, "5", 5.0], ids=repr)
def test_a_seq_that_is_none_drops_the_connection_and_moves_nothing(seq: Any) -> None:
    for collections in ([], [LIKE]):
        one = decoder(*collections)
        with pytest.raises(FrameError, match="seq"):
            one.feed(commit(seq, {f"{POST}/3lcdwt2zvvc2h": post("x" * 300)}), NOW_US)
        assert one.position == Position("relay", 0, 0)
        assert not one.take_ready


@pytest.mark.parametrize("bad", [b"garbage", "text", commit(2)[:-5], b""], ids=repr)
def test_the_same_bad_frame_twice_is_quarantined_and_stepped_over(bad: bytes | str) -> None:
    one = decoder()
    one.feed(commit(1), NOW_US)
    with pytest.raises(FrameError):
        one.feed(bad, NOW_US)
    one.connected()
    one.feed(bad, NOW_US)
    one.feed(commit(2), NOW_US)
    batch = one.take()
    assert [event.seq for event in batch.events] == [1, 2]
    (rejected,) = batch.rejected
    data = bad if isinstance(bad, bytes) else bad.encode()
    assert (rejected.reason, rejected.after_seq, rejected.message) == ("frame", 1, data)
    with pytest.raises(FrameError):
        one.feed(bad, NOW_US)  # behind another seq it is met for the first time


def test_a_bad_frame_is_quarantined_once_though_others_make_it_come_again() -> None:
    one, bad = decoder(), [b"bad %d" % number for number in range(STRIKES_MAX + 5)]
    reconnects = 0
    while True:
        one.connected()
        try:
            for message in bad:
                one.feed(message, NOW_US)
        except FrameError:
            reconnects += 1
            continue
        break
    assert reconnects == STRIKES_MAX
    assert sorted(rejected.message for rejected in one.take().rejected) == sorted(bad)


def test_bad_frames_without_end_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_STRIKES_KEPT", 20)
    one = decoder()
    for number in range(100):
        for _ in range(2):
            try:
                one.feed(b"bad %d" % number, NOW_US)
            except FrameError:
                assert number < STRIKES_MAX
    assert len(one._strikes) == 20
    assert len(one.take().rejected) == 20 + 2 * 80


def test_a_good_frame_forgives_also_when_it_is_filtered() -> None:
    one = decoder(LIKE)
    for seq in range(FIRST_SEQ, FIRST_SEQ + 3):
        with pytest.raises(FrameError):
            one.feed(b"bad", NOW_US)
        one.feed(commit(seq, {f"{POST}/3lcdwt2zvvc2h": post("x" * 300)}), NOW_US)
    assert one.take().rejected == ()


def test_a_gap_a_duplicate_and_a_reordered_frame() -> None:
    one = decoder()
    for seq in (1, 2, 2, 6, 4, 4, 7):
        one.feed(commit(seq), NOW_US)
    assert [event.seq for event in one.take().events] == [1, 2, 6, 4, 7]
    counts = one.sequence.counts
    assert (counts.missed, counts.duplicates, counts.late) == (3, 2, 1)
    assert one.position == Position("relay", 7, TIME_US)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("collections", [[], [LIKE]], ids=["wanted", "filtered"])
def test_a_resume_is_inclusive_or_exclusive(
    inclusive: bool,  # noqa: FBT001 - a parameter of the test
    collections: list[str],
) -> None:
    one = Decoder("relay", after=Position("relay", FIRST_SEQ, TIME_US), wanted=Wanted(collections))
    one.connected()
    for seq in range(FIRST_SEQ if inclusive else FIRST_SEQ + 1, FIRST_SEQ + 3):
        one.feed(commit(seq, {f"{POST}/3lcdwt2zvvc2h": post("x" * 300)}), NOW_US)
    batch = one.take()
    assert [event.seq for event in batch.events] == (
        [] if collections else [FIRST_SEQ + 1, FIRST_SEQ + 2]
    )
    assert one.sequence.counts.replayed == inclusive
    assert one.sequence.counts.possible_loss == 0
    assert batch.frames == 2 + inclusive


@pytest.mark.parametrize("collections", [[], [LIKE]], ids=["wanted", "filtered"])
def test_a_restarted_sequence_is_told_and_can_go_on_in_a_new_epoch(collections: list[str]) -> None:
    path, big = f"{POST}/3lcdwt2zvvc2h", post("x" * 300)
    one = decoder(*collections, after=FIRST_SEQ + 50)
    one.feed(commit(FIRST_SEQ + 51, {path: big}), NOW_US)
    newer = commit(FIRST_SEQ, {path: big}, time="2026-07-04T14:38:07.518Z")
    for _ in range(2):
        with pytest.raises(SequenceResetError):
            one.feed(newer, NOW_US)
    assert one.position == Position("relay", FIRST_SEQ + 51, TIME_US)
    one.take()
    one.new_epoch("relay#2")
    assert one.take().through is None
    one.feed(newer, NOW_US)
    batch = one.take()
    assert batch.through == Position("relay#2", FIRST_SEQ, TIME_US + 1000)
    assert [event.source for event in batch.events] == ([] if collections else ["relay#2"])


def spoilt(body: dict[str, Any], inside: bytes) -> bytes:
    """The frame of the body, with one bit flipped in its blocks right at `inside`."""
    at = body["blocks"].index(inside)
    blocks = bytearray(body["blocks"])
    blocks[at] ^= 0x20
    return frame("#commit", body | {"blocks": bytes(blocks)})


@pytest.mark.parametrize(
    ("check", "in_record", "in_tree"),
    [("all", "hash", "hash"), ("used", "hash", None), ("none", None, None)],
)
def test_a_corrupted_block_is_refused_by_what_was_asked_for(
    check: Check, in_record: str | None, in_tree: str | None
) -> None:
    for length in (1, 100):  # blocks with a length of one byte and of two are found differently
        body = commit_body(1, {"a/1": post("corrupt" * length), "a/2": post("leave me")})
        events, rejected = feed([spoilt(body, b"corrupt")], check=check)
        assert [one.reason for one in rejected] == ([in_record] if in_record else [])
        assert len(events) == {"all": 0, "used": 1, "none": 2}[check]
    events, rejected = feed([spoilt(body, b"version\x03")], check=check)
    assert [one.reason for one in rejected] == ([in_tree] if in_tree else [])
    assert len(events) == (0 if in_tree else 2)


def test_a_rejected_commit_keeps_its_bytes_and_the_stream_goes_on() -> None:
    bad = spoilt(commit_body(2), b"hello")
    events, (rejected,) = feed([commit(1), bad, commit(3)])
    assert [event.seq for event in events] == [1, 3]
    assert (rejected.source, rejected.after_seq, rejected.seq) == ("relay", 2, 2)
    assert (rejected.op_index, rejected.reason, rejected.message) == (None, "hash", bad)


BOMB = Raw(b"\x81" * 100_000 + b"\x00")
DEEP = Raw(b"\xa1\x61a" * 100 + b"\x00")


def test_nesting_bombs() -> None:
    for message in (
        frame("#commit", commit_body(1, new=BOMB)),
        commit(1, ops=[BOMB]),
        encode({"op": 1, "t": BOMB}) + encode({}),
        frame("#identity", BOMB),
    ):
        with pytest.raises(FrameError):
            feed([message])
    deep_but_legal = Raw(b"\x81" * 500 + b"\x00")
    events, _ = feed([commit(1, new=deep_but_legal), identity(2, new=deep_but_legal)])
    assert len(events) == 2
    records = {"a/1": {"a": BOMB}, "a/2": {"a": DEEP}, "a/3": post()}
    for check in CHECKS:
        events, rejected = feed([commit(1, records)], check=check)
        assert reasons(rejected) == [(0, "nesting"), (1, "nesting")]
        assert [event.op_index for event in events] == [2]


def test_what_is_too_big() -> None:
    many = {f"a/{number}": post() for number in range(201)}
    allowed = dict(list(many.items())[:200])
    assert len(feed([commit(1, allowed)])[0]) == 200
    _, rejected = feed([commit(1, many), commit(2, tooBig=True), commit(3, {}, tooBig=True)])
    assert reasons(rejected) == [(None, "too_big")] * 3
    _, rejected = feed([commit(1, many), commit(2, tooBig=True)], POST)
    assert reasons(rejected) == [(None, "too_big")]  # of the first nothing is wanted


def test_a_block_that_many_operations_name_is_not_decoded_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal records share a block, so the bound on blocks does not bound what they decode to."""
    monkeypatch.setattr("blueflow.operations.BLOCKS_BYTES_MAX", 10_000)
    block = encode(post("x" * 2_900))  # three of them are below, four above
    ops = [
        {"action": "create", "path": f"{POST}/{n}", "cid": Link(cid_of(block))} for n in range(9)
    ]
    ops.append({"action": "delete", "path": f"{POST}/9", "cid": None})
    for check in CHECKS:
        events, rejected = feed([commit(1, {f"{POST}/0": block}, ops=ops)], check=check)
        assert [event.op_index for event in events] == [0, 1, 2, 9]
        assert reasons(rejected) == [(index, "size") for index in range(3, 9)]


def test_a_value_that_no_field_can_have_is_not_shown() -> None:
    """Its text is deeper than what could be decoded, and ended the process."""
    for depth in range(900, 1000):
        nested = Raw(b"\x81" * depth + b"\x80")
        try:
            events, rejected = feed([commit(1, tooBig=nested), identity(2)])
        except FrameError:  # too deep for the decoder itself
            continue
        assert reasons(rejected) == [(None, "too_big")]
        assert len(events) == 1


def test_what_is_oversize() -> None:
    with pytest.raises(FrameError, match="above"):
        feed([commit(1, {"a/1": b"x" * 5_000_000})])
    big = commit_body(1, {"a/1": post("x" * 1_900_000)})
    assert reasons(feed([frame("#commit", big)])[1]) == [(0, "size")]
    body = commit_body(1, extra_blocks=[b"x" * 2_000_000])
    for check in CHECKS:
        assert reasons(feed([frame("#commit", body)], check=check)[1]) == [(None, "size")]
    sync = {"seq": 1, "did": DID, "rev": REV, "time": TIME}
    assert len(feed([frame("#sync", sync | {"blocks": bytes(10_000)})])[0]) == 1
    assert reasons(feed([frame("#sync", sync | {"blocks": bytes(10_001)})])[1]) == [(None, "size")]


@pytest.mark.parametrize("check", CHECKS)
def test_a_missing_block(check: Check) -> None:
    body = commit_body(1, {"a/1": post("a"), "a/2": post("b")})
    body["ops"][0]["cid"] = Link(cid_of(b"elsewhere"))
    events, rejected = feed([frame("#commit", body)], check=check)
    assert reasons(rejected) == [(0, "missing_block")]
    assert [event.op_index for event in events] == [1]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "cid",
    [None, b"", b"short", "text", 5, [], {}, cid_of(b"a", 0x55), b"\x12\x20" + bytes(32)],
    ids=repr,
)
def test_a_cid_that_is_none(cid: Any, check: Check) -> None:
    body = commit_body(1)
    body["ops"][0]["cid"] = cid
    events, rejected = feed([frame("#commit", body)], check=check)
    assert (events, reasons(rejected)) == ([], [(0, "body")])


@pytest.mark.parametrize("path", ["", "/", "noslash", "a/", "/b", "a/b/c", "a//b", "a/b/"])
def test_a_bad_path(path: str) -> None:
    body = commit_body(1, {path: post()}, deletes=["a/b", path])
    events, rejected = feed([frame("#commit", body)])
    assert reasons(rejected) == [(0, "path"), (2, "path")]
    assert [event.op_index for event in events] == [1]


@pytest.mark.parametrize("collections", [[], [POST]], ids=["everything", "filtered"])
def test_fields_of_another_type(collections: list[str]) -> None:
    for name in ("repo", "rev", "blocks", "commit", "ops"):
        for other in (None, 5, [{"a": 1}], {"b": 1}, b"bytes", "text"):
            body = commit_body(1) | {name: other}
            _, rejected = feed([frame("#commit", body)], *collections)
            if rejected:
                assert {one.reason for one in rejected} <= {"body", "car"}
            else:
                # A filter may see nothing wanted in it; a text or a link may stand in for another.
                assert collections or (name, type(other)) in {("repo", str), ("rev", str)}
    wrong: Any
    for wrong in (None, 5, [], "text", {"path": 5, "action": "create"}, {"path": f"{POST}/a"}):
        _, rejected = feed([commit(1, ops=[wrong])], *collections)
        assert reasons(rejected) == [(0, "body")]
    for name in ("did", "active"):
        assert reasons(feed([account(1, **{name: 5})])[1]) == [(None, "body")]
    without = {"seq": 1, "time": TIME}
    assert reasons(feed([frame("#sync", without)])[1]) == [(None, "body")]


def test_a_root_that_is_not_the_commit() -> None:
    body = commit_body(1)
    other = car([cid_of(b"x")], [b"x"])
    for check in CHECKS:
        _, rejected = feed([frame("#commit", body | {"blocks": other})], check=check)
        assert reasons(rejected) == [(None, "car")]
    missing = car([cid_of(b"x")], [b"y"])
    body |= {"commit": Link(cid_of(b"x")), "blocks": missing}
    assert reasons(feed([frame("#commit", body)])[1]) == [(None, "car")]


HOSTILE_TIMES: dict[Any, int] = {
    "2026-07-04T14:38:07Z": TIME_US - 517_000,
    "2026-07-04T14:38:07.517123Z": TIME_US + 123,
    "2026-07-04T14:38:07.517123999Z": TIME_US + 123,
    "2026-07-04T16:38:07.517+02:00": TIME_US,
    "2026-07-04T14:38:07.517": TIME_US,  # naive: it can only mean UTC
    "1985-10-26T01:21:00.000Z": 499_137_660_000_000,
    "9999-12-31T23:59:59.999Z": 253_402_300_799_999_000,
    "2242-03-16T12:56:32.000001Z": 8_589_934_592_000_001,  # floats are a microsecond off here
    "1970-01-01T00:00:00.000Z": 0,
    "1969-12-31T23:59:59.000Z": 0,
    "0001-01-01T00:00:00+14:00": 0,
    "9999-12-31T23:59:59-14:00": 0,  # in the year 10000, which no library can write
    "0000-01-01T00:00:00Z": 0,
    "2026-13-01T00:00:00Z": 0,
    "yesterday": 0,
    "": 0,
    "٢٠٢٦-07-04T14:38:07.517Z": 0,
    "2026-07-04T14:38:07.517Z" * 1000: 0,
    None: 0,
    1_783_175_887: 0,
    b"2026-07-04T14:38:07.517Z": 0,
}


@pytest.mark.parametrize("time", HOSTILE_TIMES, ids=lambda time: repr(time)[:40])
def test_hostile_times(time: Any) -> None:
    expected = HOSTILE_TIMES[time]
    for message in (commit(5, time=time), identity(5, time=time)):
        one = decoder()
        one.feed(message, NOW_US)
        batch = one.take()
        if expected:
            assert [event.time_us for event in batch.events] == [expected]
        else:
            assert reasons(batch.rejected) == [(None, "time")]
        believed = expected if expected <= NOW_US + 300_000_000 else 0
        assert batch.through == Position("relay", 5, believed)
        assert one.latest_time_us == believed


def test_a_clock_that_runs_ahead_moves_neither_the_position_nor_the_lag() -> None:
    path, big = f"{POST}/3lcdwt2zvvc2h", post("x" * 300)
    for collections in ([], [LIKE]):
        one = decoder(*collections)
        one.feed(commit(FIRST_SEQ, {path: big}), NOW_US)
        one.feed(commit(FIRST_SEQ + 1, {path: big}, time="2026-07-04T14:50:07.517Z"), NOW_US)
        assert (one.position, one.latest_time_us) == (
            Position("relay", FIRST_SEQ + 1, TIME_US), TIME_US,
        )  # fmt: skip
        one.feed(commit(FIRST_SEQ + 2, {path: big}, time="2026-07-04T14:38:07.400Z"), NOW_US)
        assert (one.position, one.latest_time_us) == (
            Position("relay", FIRST_SEQ + 2, TIME_US), TIME_US - 117_000,
        )  # fmt: skip


def test_a_frame_without_a_usable_time_does_not_reset_the_lag() -> None:
    one = decoder()
    for seq, time in ((1, TIME), (2, "yesterday")):
        one.feed(identity(seq, time=time), NOW_US)
    assert one.latest_time_us == TIME_US


def test_a_decoder_names_its_filter() -> None:
    wanted = Wanted([POST])
    assert Decoder("relay", after=None, wanted=wanted).wanted is wanted


def test_a_filtered_frame_that_comes_again_is_counted_once() -> None:
    one, message = decoder(LIKE), commit(FIRST_SEQ, {f"{POST}/3lcdwt2zvvc2h": post("x" * 300)})
    for _ in range(3):
        one.feed(message, NOW_US)
    assert (one.counts.filtered_frames, one.sequence.counts.duplicates) == (1, 2)


def test_a_filtered_frame_with_an_odd_time_does_not_hold_up_the_clock() -> None:
    path, big = f"{POST}/3lcdwt2zvvc2h", post("x" * 300)
    one = decoder(LIKE)
    for seq, time in enumerate(("9999-99-99T99:99:99.999Z", TIME), FIRST_SEQ):
        one.feed(commit(seq, {path: big}, time=time), NOW_US)
    assert one.position == Position("relay", FIRST_SEQ + 1, TIME_US)
    one.new_epoch("relay#2")
    one.feed(commit(FIRST_SEQ, {path: big}, time="2026-07-04T14:38:07.000Z"), NOW_US)
    assert one.position == Position("relay#2", FIRST_SEQ, TIME_US - 517_000)


def test_a_live_start_takes_the_first_seq_there_is() -> None:
    one = decoder(after=None)
    assert (one.position, one.latest_time_us, one.take_ready) == (None, 0, False)
    one.connected()
    one.feed(commit(FIRST_SEQ), NOW_US)
    assert one.position == Position("relay", FIRST_SEQ, TIME_US)
    assert one.sequence.counts.missed == 0


def test_an_empty_batch_of_a_live_start_has_no_position() -> None:
    batch = decoder(after=None).take()
    assert (batch.events, batch.through, batch.frames, batch.rejected) == ([], None, 0, ())


# Anything at all.


def outcome(one: Decoder, message: bytes) -> str:
    try:
        one.feed(message, NOW_US)
    except FrameError:
        return "frame"
    except SequenceResetError:
        return "reset"
    return "fed"


def mutate(data: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randrange(1, 4)):
        size = len(changed)
        if not size:
            break
        # Half of the changes are in the first 400 bytes, where most of the structure is.
        at = generator.randrange(min(size, 400) if generator.random() < 0.5 else size)
        match generator.randrange(5):
            case 0 | 1:
                changed[at] = generator.randrange(256)
            case 2:
                changed[at] ^= 1 << generator.randrange(8)
            case 3:
                del changed[at : at + generator.choice([1, 2, 40, size])]
            case _:
                other = generator.choice(others)
                start = generator.randrange(len(other))
                changed[at : at + 40] = other[start : start + generator.randrange(60)]
    return bytes(changed)


@pytest.mark.parametrize("check", CHECKS)
def test_spoilt_real_frames_give_events_rejections_or_the_typed_error(
    recorded_frames: list[bytes], check: Check
) -> None:
    generator = random.Random(f"decode {check}")
    seen: dict[str, int] = {}
    for number in seeded(25):
        data = recorded_frames[number % len(recorded_frames)]
        message = mutate(data, recorded_frames, generator)
        one = decoder(after=FIRST_SEQ - 1, check=check)
        result = outcome(one, message)
        batch = one.take()
        for event in batch.events:
            encode_event(event)
        for rejected in batch.rejected:
            assert rejected.reason in REJECT_REASONS
            assert rejected.message == message
        kind = "events" if batch.events else "rejected" if batch.rejected else result
        seen[kind] = seen.get(kind, 0) + 1
    assert {"events", "frame"} <= set(seen)
    assert check == "none" or seen["rejected"]


def test_skipping_without_decoding_differs_in_nothing(
    recorded_frames: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random("peek")
    quick, full = decoder(POST, after=FIRST_SEQ - 1), decoder(POST, after=FIRST_SEQ - 1)
    skipped = 0
    for number in seeded(25):
        data = recorded_frames[number % len(recorded_frames)]
        message = data if number % 3 == 0 else mutate(data, recorded_frames, generator)
        monkeypatch.setattr(decode, "peek_commit", peek_commit)
        first = outcome(quick, message)
        monkeypatch.setattr(decode, "peek_commit", lambda _: None)
        second = outcome(full, message)
        skipped += first == "fed" and peek_commit(message) is not None
        if second == "frame" or quick.position != full.position:
            # What was skipped unread may be malformed behind its beginning, or its time written
            # otherwise; then both go on from the same place again.
            assert first in {"fed", "frame", "reset"}
            assert peek_commit(message) is not None or first == second
            quick, full = decoder(POST, after=FIRST_SEQ - 1), decoder(POST, after=FIRST_SEQ - 1)
            continue
        assert first == second
        assert quick.counts == full.counts
        assert quick.sequence.counts == full.sequence.counts
        assert quick.take() == full.take()
    assert skipped > len(seeded(25)) // 10


@share(10)
@given(st.lists(st.binary(max_size=120), max_size=4))
def test_any_bytes_give_the_typed_error(messages: list[bytes]) -> None:
    one = decoder()
    header = encode({"op": 1, "t": "#commit"})
    for message in messages:
        outcome(one, message)
        outcome(one, header + message)
    assert all(rejected.reason in REJECT_REASONS for rejected in one.take().rejected)


any_value = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**64), 2**64 - 1), st.text(max_size=9),
        st.binary(max_size=40), st.just(TIME), st.just(Link(cid_of(b"x"))),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


@share(6)
@given(
    st.sampled_from(["#commit", "#sync", "#identity", "#account", "#info", "#new"]),
    st.dictionaries(
        st.sampled_from(
            ["seq", "did", "time", "rev", "repo", "blocks", "ops", "commit", "tooBig", "active"]
        ),
        any_value,
    ),
    st.sampled_from([(), (POST,)]),
    st.sampled_from(CHECKS),
)
def test_any_fields_give_events_rejections_or_the_typed_error(
    t: str, fields: dict[str, Any], collections: tuple[str, ...], check: Check
) -> None:
    one = decoder(*collections, check=check)
    whole = commit_body(9, did=DID) | {"did": DID, "active": True}
    for message in (frame(t, whole | fields), frame(t, fields)):
        outcome(one, message)
    batch = one.take()
    for event in batch.events:
        encode_event(event)
    assert all(rejected.reason in REJECT_REASONS for rejected in batch.rejected)


@pytest.mark.parametrize("check", ["all", "used", "none"])
@pytest.mark.parametrize("link", [b"\x01\x71\x12\x20", b"\x01\x71\x12\x20" + b"1", b"", "x", 7])
def test_a_cid_of_another_length_rejects_the_operation(
    check: Any, link: object, recorded_frames: list[bytes]
) -> None:
    frame = read_frame("x", recorded_frames[0])
    assert isinstance(frame, tuple)
    body = frame[1]
    reader = CommitReader(Wanted(), check)
    events: list[Any] = []
    body["ops"][0]["cid"] = link
    problems = reader.read(body, "x", 1, 1, events)
    assert not events
    assert len(problems) == 1
