"""Frames: header and body in DAG-CBOR, every field of every message, only the typed error."""

from __future__ import annotations

from typing import Any

import libipld
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.builders import DID, REV, TIME, commit_body, error_frame, frame
from tests.corpus.cases import share
from tests.corpus.dagcbor import Link, Raw, cid_of, encode

from blueflow.errors import FrameError
from blueflow.wire.frame import (
    FRAME_BYTES_MAX,
    AccountMessage,
    Commit,
    ErrorMessage,
    IdentityMessage,
    InfoMessage,
    Message,
    RepoOpMessage,
    SyncMessage,
    read_body,
    read_frame,
)

CID = cid_of(b"block")


def problem(message: bytes | str) -> str:
    with pytest.raises(FrameError) as error:
        read_frame("relay", message)
    assert (error.value.source, error.value.size) == ("relay", len(message))
    return error.value.problem


def body_of(data: bytes) -> dict[str, Any]:
    read = read_frame("relay", data)
    assert isinstance(read, tuple)
    return read[1]


def test_a_frame_is_its_type_and_its_body() -> None:
    assert read_frame("relay", frame("#new", {"seq": 5, "x": [1]})) == (
        "#new",
        {"seq": 5, "x": [1]},
    )


def test_unknown_fields_of_the_header_are_ignored() -> None:
    message = encode({"op": 1, "t": "#new", "z": 1}) + encode({})
    assert read_frame("relay", message) == ("#new", {})


@pytest.mark.parametrize("op", [0, 2, -2, 2**40])
def test_an_op_without_a_meaning_is_given_back(op: int) -> None:
    assert read_frame("relay", encode({"op": op}) + encode({})) == op


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": "FutureCursor"}, ErrorMessage("FutureCursor")),
        ({"error": "ConsumerTooSlow", "message": "m"}, ErrorMessage("ConsumerTooSlow", "m")),
        ({"error": "New", "more": [1]}, ErrorMessage("New")),
    ],
)
def test_error_frames(body: Any, expected: ErrorMessage) -> None:
    assert read_frame("relay", error_frame(body)) == expected


@pytest.mark.parametrize("body", [{}, {"error": 1}, {"error": "A", "message": 2}], ids=str)
def test_an_error_frame_without_a_usable_error_is_an_error_all_the_same(body: Any) -> None:
    read = read_frame("relay", error_frame(body))
    assert isinstance(read, ErrorMessage)
    assert read.error == "Unknown"


BOMB = b"\x81" * 3000 + b"\x00"
MAP_BOMB = b"\xa1\x61a" * 3000 + b"\x00"


@pytest.mark.parametrize(
    "message",
    [
        "a text message",
        b"",
        b"\xa0",
        b"\xff" * 40,
        b"GET / HTTP/1.1\r\n\r\n",
        encode({"op": 1, "t": "#commit"}),
        encode({"op": 1, "t": "#commit"}) + encode({}) + encode({}),
        encode({"op": 1, "t": "#commit"}) + encode({})[:-1] + b"\xa1",
        encode({"op": 1, "t": "#commit"}) + encode([]),
        encode([]) + encode({}),
        encode({"op": 1}) + encode({}),
        encode({"op": 1, "t": 5}) + encode({}),
        encode({"op": 1, "t": b"#commit"}) + encode({}),
        encode({"t": "#commit"}) + encode({}),
        encode({"op": True, "t": "#commit"}) + encode({}),
        encode({"op": "1", "t": "#commit"}) + encode({}),
        encode({"op": 1.0, "t": "#commit"}) + encode({}),
        encode({"op": None}) + encode({}),
        frame("#commit", {"a": Raw(b"\xf7")}),
        frame("#commit", Raw(b"\xa2\x61b\x01\x61a\x01")),
        BOMB,
        BOMB + encode({}),
        encode({"op": 1, "t": "#commit"}) + BOMB,
        encode({"op": 1, "t": "#commit"}) + MAP_BOMB,
        encode({"op": Raw(BOMB)}) + encode({}),
        b"\x9b" + b"\xff" * 8,
        b"\x00" * 100_000,
    ],
    ids=lambda message: f"{len(message)} {message[:24]!r}",
)
def test_what_is_no_frame_is_the_typed_error(message: bytes | str) -> None:
    assert problem(message)


def test_the_size_is_bounded() -> None:
    padding = FRAME_BYTES_MAX - len(frame("#new", {"a": b"x" * 2**16})) + 2**16
    assert read_frame("relay", frame("#new", {"a": b"x" * padding}))
    assert "above" in problem(frame("#new", {"a": b"x" * (padding + 1)}))


FULL: list[tuple[type[Message], dict[str, Any], Message]] = [
    (
        SyncMessage,
        {"seq": 5, "did": DID, "blocks": b"car", "rev": REV, "time": TIME},
        SyncMessage(5, DID, b"car", REV, TIME),
    ),
    (
        IdentityMessage,
        {"seq": 5, "did": DID, "time": TIME, "handle": "a.example"},
        IdentityMessage(5, DID, TIME, "a.example"),
    ),
    (
        AccountMessage,
        {"seq": 5, "did": DID, "time": TIME, "active": False, "status": "takendown"},
        AccountMessage(5, DID, TIME, active=False, status="takendown"),
    ),
    (InfoMessage, {"name": "OutdatedCursor", "message": "m"}, InfoMessage("OutdatedCursor", "m")),
]


@pytest.mark.parametrize(("kind", "body", "expected"), FULL, ids=lambda one: str(one)[:20])
def test_every_field_is_read_and_unknown_ones_are_told(
    kind: type[Message], body: dict[str, Any], expected: Message
) -> None:
    assert read_body(body_of(frame("#x", body)), kind) == (expected, False)
    assert read_body(body_of(frame("#x", body | {"new": {"a": 1}})), kind) == (expected, True)


@pytest.mark.parametrize(("kind", "body", "_expected"), FULL, ids=lambda one: str(one)[:20])
def test_a_field_missing_or_of_another_type_is_told(
    kind: type[Message], body: dict[str, Any], _expected: Message
) -> None:
    for field in set(body) - {"handle", "status", "message"}:
        without = {name: value for name, value in body.items() if name != field}
        for wrong in (without, body | {field: [1]}):
            with pytest.raises(msgspec.ValidationError):
                read_body(wrong, kind)


def test_every_field_of_a_commit_is_read() -> None:
    fields: dict[str, Any] = {
        "prev": Link(CID),
        "blobs": [Link(CID)],
        "rebase": True,
        "tooBig": True,
    }
    body = body_of(frame("#commit", commit_body(5, deletes=["a/b"], **fields)))
    body["ops"][0]["prev"] = CID
    read, unknown = read_body(body, Commit)
    assert not unknown
    assert read == Commit(
        seq=5, repo=DID, commit=body["commit"], rev=REV, blocks=body["blocks"],
        ops=[
            RepoOpMessage("create", body["ops"][0]["path"], body["ops"][0]["cid"], CID),
            RepoOpMessage("delete", "a/b"),
        ],
        time=TIME, since="3lcdwt2zvvc2f", prev_data=body["prevData"], blobs=[CID], too_big=True,
        rebase=True, prev=CID,
    )  # fmt: skip


def test_unknown_fields_of_a_commits_operations_are_told() -> None:
    body = body_of(frame("#commit", commit_body(5)))
    body["ops"][0]["new"] = 1
    read, unknown = read_body(body, Commit)
    assert unknown
    assert read.ops[0].action == "create"


def test_recorded_commits_fit_the_lexicon(recorded_frames: list[bytes]) -> None:
    for data in recorded_frames:
        body = body_of(data)
        read, unknown = read_body(body, Commit)
        assert not unknown
        assert (read.seq, read.prev_data, read.blobs) == (
            body["seq"], body["prevData"], body["blobs"],
        )  # fmt: skip


@share(10)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_frame_or_the_typed_error(data: bytes, behind_header: bool) -> None:  # noqa: FBT001
    if behind_header:
        data = encode({"op": 1, "t": "#commit"}) + data
    try:
        read = read_frame("relay", data)
    except FrameError:
        return
    assert type(read) in {tuple, ErrorMessage, int}


cbor_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**64), 2**64 - 1), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=12,
)


@share(3)
@given(st.text(max_size=20), st.dictionaries(st.text(max_size=9), cbor_values, max_size=8))
def test_any_body_comes_back(t: str, body: dict[str, Any]) -> None:
    assert read_frame("relay", frame(t, body)) == (t, libipld.decode_dag_cbor(encode(body)))
    for kind in (SyncMessage, IdentityMessage, AccountMessage, InfoMessage, Commit):
        try:
            read_body(body, kind)
        except msgspec.ValidationError:
            continue
