"""The look at a frame's beginning says what the full decoder says, or nothing."""

from __future__ import annotations

import random
from typing import Any

import libipld
import pytest
from tests.corpus.builders import DID, LIKE, TIME, commit, commit_body, frame, identity, post
from tests.corpus.cases import seeded
from tests.corpus.dagcbor import Link, cid_of

from blueflow.wire.peek import peek_commit

SEQ = 31_527_015_322
PATH = f"{LIKE}/3lcdwt2zvvc2h"
PREV = Link(cid_of(b"before"))


def delete_frame(**fields: Any) -> bytes:
    """A delete as relays send it, naming the previous record."""
    body = commit_body(SEQ, {}, deletes=[PATH], extra_blocks=[b"x" * 300], **fields)
    body["ops"][0]["prev"] = PREV
    return frame("#commit", body)


def agrees(message: bytes) -> bool:
    """Whether something was said; it has to be what the CBOR decoder says, or that must refuse."""
    peeked = peek_commit(message)
    if peeked is None:
        return False
    path, seq, repo, time = peeked
    try:
        header, body = libipld.decode_dag_cbor_multi(message)
    except (ValueError, RecursionError):
        return True
    assert header == {"op": 1, "t": "#commit"}
    (op,) = body["ops"]
    assert (op["path"].encode(), body["seq"], body["repo"].encode()) == (path, seq, repo)
    assert body["time"].encode() == time + b"Z"
    assert op["action"] in {"create", "delete"}
    assert body["tooBig"] is False
    return True


def test_most_recorded_frames_are_read_and_agree(recorded_frames: list[bytes]) -> None:
    assert sum(map(agrees, recorded_frames)) == 97  # two are updates, one has three operations


@pytest.mark.parametrize("path", ["a/b", PATH, "c" * 23, "c" * 24, "c" * 255, "c" * 256])
def test_creates_and_deletes_of_any_usual_path(path: str) -> None:
    created = commit(SEQ, {path: post("x" * 300)})
    body = commit_body(SEQ, {}, deletes=[path], extra_blocks=[b"x" * 300])
    body["ops"][0]["prev"] = PREV
    deleted = frame("#commit", body)
    usual = 24 <= len(path) <= 255  # a shorter or longer path has a head of another size
    for message in (created, deleted):
        assert agrees(message) == usual
        if usual:
            assert peek_commit(message) == (path.encode(), SEQ, DID.encode(), TIME[:-1].encode())


TEXT = {PATH: post("x" * 300)}
UNUSUAL = {
    "nothing": b"",
    "a beginning": b"\xa2atg#commitbop\x01",
    "an identity": identity(SEQ),
    "a seq of four bytes": commit(2**32 - 1, TEXT),
    "no signed 64-bit seq": commit(2**63, TEXT),
    "an update": commit(SEQ, TEXT, action="update"),
    "two operations": commit(SEQ, {**TEXT, PATH + "i": post()}),
    "no operations": commit(SEQ, TEXT, ops=[]),
    "did:web": commit(SEQ, TEXT, did="did:web:example.com"),
    "a time in seconds": commit(SEQ, TEXT, time="2026-07-04T14:38:07Z"),
    "a time with an offset": commit(SEQ, TEXT, time="2026-07-04T14:38:07+00:0"),
    "too big": commit(SEQ, TEXT, tooBig=True),
    "from before Sync 1.1": commit(SEQ, TEXT, prevData=None),
    "a new field": commit(SEQ, TEXT, new=1),
    "an old field": commit(SEQ, TEXT, prev=None),
    "a delete with odd flags": delete_frame(rebase=1, tooBig=None),
    "cut off": commit(SEQ, TEXT)[:-1],
    "a byte too many": commit(SEQ, TEXT) + b"\x00",
}


@pytest.mark.parametrize("message", UNUSUAL.values(), ids=UNUSUAL)
def test_it_says_nothing_of_other_frames(message: bytes) -> None:
    assert peek_commit(message) is None


def test_a_frame_cut_off_anywhere_is_left_to_the_decoder(recorded_frames: list[bytes]) -> None:
    for data in recorded_frames[:3]:
        assert all(peek_commit(data[:end]) is None for end in range(0, len(data), 7))


@pytest.mark.parametrize("deleted", [False, True])
def test_it_agrees_whichever_single_byte_is_another(deleted: bool) -> None:  # noqa: FBT001
    whole = delete_frame() if deleted else commit(SEQ, TEXT)
    assert agrees(whole)
    places = [*range(260), *range(len(whole) - 70, len(whole))]
    said = sum(
        agrees(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        for at in places
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 0xFF)
    )
    assert len(places) < said < 8 * len(places)  # mostly digests, the rev and what it reads


def test_it_agrees_on_spoilt_real_frames(recorded_frames: list[bytes]) -> None:
    generator = random.Random(31_527_015_322)
    frames = [*recorded_frames, delete_frame()]
    said = 0
    for number in seeded(40):
        spoilt = bytearray(frames[number % len(frames)])
        for _ in range(generator.randrange(1, 3)):
            # Nearly all of it is about the first 300 bytes and the end.
            at = generator.choice([generator.randrange(300), -generator.randrange(1, 70)])
            match generator.randrange(6):
                case 0:
                    del spoilt[at]
                case 1:
                    spoilt.insert(at, generator.randrange(256))
                case 2:
                    start = generator.randrange(300)
                    other = generator.choice(frames)
                    spoilt[start : start + 20] = other[start : start + 20]
                case _:
                    spoilt[at] = generator.randrange(256)
        said += agrees(bytes(spoilt))
    assert said > len(seeded(40)) // 10
