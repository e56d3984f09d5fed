"""Wire JSON: Jetstream's lines plus source, seq and op_index, and back again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.cases import share

from blueflow.events import (
    Account,
    Event,
    Identity,
    RepoOp,
    Sync,
    decode_line,
    encode_event,
    encode_lines,
    epoch_after,
    family,
    kind_of,
)

if TYPE_CHECKING:
    from pathlib import Path

DID = "did:plc:44ybard66vv44zksje25o7dz"
TIME = "2026-07-04T14:38:07.517Z"
TIME_US = 1_783_175_887_517_000
SEQ = 31_527_015_322
COMMON = {"did": DID, "time_us": TIME_US, "source": "relay", "seq": SEQ}
CREATE = RepoOp(
    "relay", SEQ, 2, DID, TIME_US, "3lcdwt2zvvc2g", "create", "app.bsky.feed.post", "3lc", "bafy",
    {"$type": "app.bsky.feed.post", "text": "a"},
)  # fmt: skip
DELETE = RepoOp(
    "relay", SEQ, 0, DID, TIME_US, "3lcdwt2zvvc2g", "delete", "app.bsky.feed.like", "3ld"
)


def test_a_source_that_begins_to_count_anew_has_a_name_of_its_own() -> None:
    assert [epoch_after(name) for name in ("host", "host#2", "host#9")] == [
        "host#2", "host#3", "host#10",
    ]  # fmt: skip
    assert {family(name) for name in ("host", "host#2", "host#10")} == {"host"}


text = st.text(max_size=12)
integers = st.integers(-(2**63), 2**63 - 1)
sizes = st.integers(0, 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)  # DAG-CBOR has no others
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, text, FLOATS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=10,
)
head = (text, sizes, st.integers(0, 199), text, sizes, text)
changes = st.builds(
    RepoOp, *head, st.sampled_from(["create", "update"]), text, text, text,
    st.dictionaries(text, json_values, max_size=4),
)  # fmt: skip
events = st.one_of(
    changes,
    st.builds(RepoOp, *head, st.just("delete"), text, text),
    st.builds(Identity, text, sizes, text, sizes, text, st.one_of(st.none(), text)),
    st.builds(Account, text, sizes, text, sizes, text, st.booleans(), st.one_of(st.none(), text)),
    st.builds(Sync, text, sizes, text, sizes, text, text, st.binary(max_size=40)),
)


def line(event: Event) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(encode_event(event))
    return decoded


def test_a_create() -> None:
    assert line(CREATE) == COMMON | {
        "kind": "commit",
        "op_index": 2,
        "commit": {
            "rev": "3lcdwt2zvvc2g",
            "operation": "create",
            "collection": "app.bsky.feed.post",
            "rkey": "3lc",
            "record": {"$type": "app.bsky.feed.post", "text": "a"},
            "cid": "bafy",
        },
    }
    assert CREATE.uri == f"at://{DID}/app.bsky.feed.post/3lc"


def test_a_delete_has_no_record_and_no_cid() -> None:
    assert line(DELETE) == COMMON | {
        "kind": "commit",
        "op_index": 0,
        "commit": {
            "rev": "3lcdwt2zvvc2g",
            "operation": "delete",
            "collection": "app.bsky.feed.like",
            "rkey": "3ld",
        },
    }


@pytest.mark.parametrize(
    ("event", "kind", "body"),
    [
        (Identity("relay", SEQ, DID, TIME_US, TIME), "identity", {}),
        (Identity("relay", SEQ, DID, TIME_US, TIME, "a.b"), "identity", {"handle": "a.b"}),
        (Account("relay", SEQ, DID, TIME_US, TIME, active=True), "account", {"active": True}),
        (
            Account("relay", SEQ, DID, TIME_US, TIME, active=False, status="deleted"),
            "account",
            {"active": False, "status": "deleted"},
        ),
        (
            Sync("relay", SEQ, DID, TIME_US, TIME, "3lc", b"car!"),
            "sync",
            {"rev": "3lc", "blocks": {"$bytes": "Y2FyIQ"}},
        ),
    ],
)
def test_account_level_events(event: Event, kind: str, body: dict[str, Any]) -> None:
    body = {"did": DID, "seq": SEQ, "time": TIME} | body
    assert line(event) == COMMON | {"kind": kind, "op_index": 0, kind: body}
    assert kind_of(event) == kind


def test_golden_jetstream_lines_have_our_form(data_folder: Path) -> None:
    """A line read and written again is the same but for the three fields that are ours."""
    golden = (data_folder / "jetstream" / "golden_v1.jsonl").read_bytes().splitlines()
    recorded = (data_folder / "firehose" / "jetstream_v1.jsonl").read_bytes().splitlines()
    older = (data_folder / "jetstream" / "jsonbench_head10.ndjson").read_bytes().splitlines()
    kinds = set()
    for foreign in [*golden, *recorded, *older]:
        expected = json.loads(foreign)
        ours = line(decode_line(foreign, "jetstream", 7))
        assert {name: ours.pop(name) for name in ("source", "seq", "op_index")} == {
            "source": "jetstream",
            "seq": 7,
            "op_index": 0,
        }
        kind = expected["kind"]
        if kind != "commit":
            expected[kind]["seq"] = ours[kind]["seq"]  # the seq of a Jetstream line is the relay's
        assert ours == expected
        kinds.add(kind)
    assert kinds == {"commit", "identity", "account"}


def test_the_seq_of_a_golden_account_line_is_ours_when_we_read_the_relay(
    data_folder: Path,
) -> None:
    golden = (data_folder / "jetstream" / "golden_v1.jsonl").read_bytes().splitlines()
    for foreign in golden:
        expected = json.loads(foreign)
        kind = expected["kind"]
        if kind == "commit":
            continue
        body = expected[kind]
        event = decode_line(foreign, "relay", body["seq"])
        assert line(event) == expected | {"source": "relay", "seq": body["seq"], "op_index": 0}


@share(4)
@given(events)
def test_an_event_comes_back_from_its_line(event: Event) -> None:
    data = encode_event(event)
    assert b"\n" not in data
    assert msgspec.json.decode(data) == json.loads(data)
    assert decode_line(data, "unused", 0) == event


@share(2)
@given(st.lists(events, max_size=5))
def test_lines_are_the_events_one_by_one(some: list[Event]) -> None:
    assert encode_lines(some) == b"".join(encode_event(event) + b"\n" for event in some)


def test_text_of_every_kind_stays_one_line() -> None:
    odd = '\n\r\u2028\u2029\u0000\x7f\\" \U0001f600 \ue000'
    event = msgspec.structs.replace(CREATE, record={"text": odd}, rkey=odd)
    data = encode_lines([event, event])
    assert data.count(b"\n") == 2
    assert decode_line(data.splitlines()[0], "", 0) == event


SPOILT = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "no kind": b'{"did":"d","time_us":1}',
    "an unknown kind": b'{"did":"d","time_us":1,"kind":"new"}',
    "no body": b'{"did":"d","time_us":1,"kind":"commit"}',
    "another kind's body": b'{"did":"d","time_us":1,"kind":"account","identity":{"time":"t"}}',
    "an unknown operation": b'{"did":"d","time_us":1,"kind":"commit","commit":'
    b'{"rev":"r","operation":"new","collection":"c","rkey":"k"}}',
    "no active": b'{"did":"d","time_us":1,"kind":"account","account":{"time":"t"}}',
    "a sync without a rev": b'{"did":"d","time_us":1,"kind":"sync","sync":{"time":"t"}}',
    "a sync without blocks": b'{"did":"d","time_us":1,"kind":"sync","sync":{"time":"t","rev":"r"}}',
    "blocks that are no base64": b'{"did":"d","time_us":1,"kind":"sync","sync":'
    b'{"time":"t","rev":"r","blocks":{"$bytes":"A"}}}',
    "blocks that are other base64": b'{"did":"d","time_us":1,"kind":"sync","sync":'
    b'{"time":"t","rev":"r","blocks":{"$bytes":"_-_-"}}}',
    "blocks that are no ASCII": '{"did":"d","time_us":1,"kind":"sync","sync":'
    '{"time":"t","rev":"r","blocks":{"$bytes":"äää="}}}'.encode(),
    "a time that is no number": b'{"did":"d","time_us":"1","kind":"commit"}',
    "invalid UTF-8": b'{"did":"\xff","time_us":1,"kind":"commit"}',
    "a nesting bomb": b'{"did":' + b"[" * 100_000,
    "a nesting bomb in a record": b'{"did":"d","time_us":1,"kind":"commit","commit":{"record":{"a":'
    + b"[" * 100_000,
}


@pytest.mark.parametrize("data", SPOILT.values(), ids=SPOILT)
def test_what_is_no_line_is_the_typed_error(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_line(data, "relay", 1)
