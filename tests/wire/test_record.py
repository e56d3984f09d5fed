"""Records: links and byte strings told apart exactly, bounds, and only the typed error."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import libipld
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.cases import refusal, seeded, share
from tests.corpus.dagcbor import Link, Raw, cid_of, encode, head

from blueflow.errors import RecordError
from blueflow.wire import record as record_module
from blueflow.wire.cid import cid_text
from blueflow.wire.record import NESTING_MAX, RECORD_BYTES_MAX, decode_record

if TYPE_CHECKING:
    from pathlib import Path

CID = cid_of(b"a block")
BLOB_CID = cid_of(b"a blob", 0x55)
LINK = {"$link": cid_text(CID)}
BLOB_LINK = {"$link": cid_text(BLOB_CID)}
PERIODIC = b"\x01\x71\x12\x20" * 9  # overlaps itself when it is searched for
REASONS = {"size", "cbor", "not_a_map", "nesting"}

links = st.binary(min_size=32, max_size=32).map(lambda digest: Link(cid_of(digest)))
byte_strings = st.one_of(
    st.binary(max_size=40),
    st.binary(min_size=32, max_size=32).map(cid_of),  # looks like a CID
    st.binary(min_size=32, max_size=32).map(lambda digest: b"\x00" + cid_of(digest)),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.text(max_size=30),
    byte_strings,
    links,
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=20,
)
records = st.dictionaries(st.text(max_size=8), values, max_size=6)


def json_form(value: Any) -> Any:
    """The model: what the JSON form of a value is, said without looking at any bytes."""
    match value:
        case Link():
            return {"$link": cid_text(value.cid)}
        case bytes():
            return {"$bytes": b64encode(value).decode().rstrip("=")}
        case list():
            return [json_form(item) for item in value]
        case dict():
            return {key: json_form(item) for key, item in value.items()}
    return value


def encode_longer(value: Any, generator: random.Random) -> bytes:
    """Encode with heads longer than needed, here and there: decoders take them."""
    width = generator.choice([None, None, 4, 8])
    match value:
        case Link():
            return head(6, 42, width) + encode_longer(b"\x00" + value.cid, generator)
        case bytes():
            return head(2, len(value), width) + value
        case str():
            return head(3, len(value.encode()), width) + value.encode()
        case list():
            inner = b"".join(encode_longer(item, generator) for item in value)
            return head(4, len(value), width) + inner
        case dict():
            keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
            return head(5, len(value), width) + b"".join(
                encode_longer(key, generator) + encode_longer(value[key], generator) for key in keys
            )
    return encode(value)


def to_json(block: bytes) -> bytes:
    return msgspec.json.encode(decode_record(block))


def reason(block: bytes) -> str:
    with pytest.raises(RecordError) as error:
        decode_record(block)
    return error.value.reason


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Link(CID), LINK),
        (CID, {"$bytes": b64encode(CID).decode().rstrip("=")}),
        (b"\x00" + CID, {"$bytes": b64encode(b"\x00" + CID).decode().rstrip("=")}),
        (Raw(head(6, 42, 2) + encode(b"\x00" + CID)), LINK),
        (Raw(head(6, 42, 8) + head(2, 37, 8) + b"\x00" + CID), LINK),
        (Raw(head(2, 36, 4) + CID), {"$bytes": b64encode(CID).decode().rstrip("=")}),
        ([CID, Link(CID), CID], [json_form(CID), LINK, json_form(CID)]),
        ([Link(CID), "text", Link(CID), [Link(BLOB_CID)]], [LINK, "text", LINK, [BLOB_LINK]]),
        ({"b": Link(CID), "c": Link(CID)}, {"b": LINK, "c": LINK}),
        ({"b": Link(CID), "c": {"d": Link(CID)}}, {"b": LINK, "c": {"d": LINK}}),
        ([Link(PERIODIC), PERIODIC], [json_form(Link(PERIODIC)), json_form(PERIODIC)]),
        ([PERIODIC * 3, Link(PERIODIC)], [json_form(PERIODIC * 3), json_form(Link(PERIODIC))]),
        ({"b": {"c": [[Link(CID)], CID]}}, {"b": {"c": [[LINK], json_form(CID)]}}),
        ([42, Link(CID), "Ø*%", b""], [42, LINK, "Ø*%", {"$bytes": ""}]),
        (Link(BLOB_CID), {"$link": cid_text(BLOB_CID)}),
        ([1.5, b"\xd8\x2a", Link(CID)], [1.5, {"$bytes": "2Co"}, LINK]),
        ([Raw(b"\xfa\x58\x24\x00\x00"), Link(CID)], [721279627821056.0, LINK]),
    ],
)
def test_links_and_byte_strings_are_told_apart(value: Any, expected: Any) -> None:
    assert decode_record(encode({"a": value})) == {"a": expected}
    # A byte string that is no CID makes it look at every byte of the block.
    end = {"$bytes": "ZW5k"}
    assert decode_record(encode({"a": value, "z": b"end"})) == {"a": expected, "z": end}


def test_many_links_are_told_apart_as_few_are() -> None:
    for count in (15, 16, 17, 40):
        links = [Link(cid_of(b"%d" % number)) for number in range(count)]
        expected = [json_form(link) for link in links]
        assert decode_record(encode({"a": links})) == {"a": expected}
        mixed = [*links, links[0].cid]
        assert decode_record(encode({"a": mixed})) == {"a": [*expected, json_form(links[0].cid)]}


def test_a_record_full_of_one_link_costs_no_search_for_each() -> None:
    link = Link(CID)
    record = {"a": [link] * 20_000, "b": (b"\x00" + CID) * 4000}
    decoded = decode_record(encode(record))
    assert decoded["a"] == [LINK] * 20_000
    assert set(decoded["b"]) == {"$bytes"}


@share(4)
@given(records)
def test_any_record_has_its_json_form(record: dict[str, Any]) -> None:
    decoded = decode_record(encode(record))
    assert decoded == json_form(record)
    assert list(decoded) == sorted(record, key=lambda key: (len(key.encode()), key.encode()))
    assert msgspec.json.decode(msgspec.json.encode(decoded)) == decoded


@share(3)
@given(records, st.randoms(use_true_random=False))
def test_heads_longer_than_needed_change_nothing(
    record: dict[str, Any], generator: random.Random
) -> None:
    assert decode_record(encode_longer(record, generator)) == json_form(record)


@share(10)
@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_give_a_record_or_the_typed_error(data: bytes, in_a_map: bool) -> None:  # noqa: FBT001
    assert refusal(to_json, b"\xa1\x61v" + data if in_a_map else data) in {None, *REASONS}


def test_spoilt_real_records_give_json_or_the_typed_error(recorded_frames: list[bytes]) -> None:
    blocks = []
    for frame in recorded_frames:
        body = libipld.decode_dag_cbor_multi(frame)[1]
        car = body["blocks"]
        for op in body["ops"]:
            if op["cid"]:
                start = car.rfind(op["cid"]) + 36
                blocks.append(car[start : start + 400])
    generator = random.Random(7)
    refused = 0
    for number in seeded(15):
        spoilt = bytearray(blocks[number % len(blocks)])
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(spoilt))
            # Half of them heads: maps, lists, byte strings, tags and their lengths.
            spoilt[at] = generator.choice([0x58, 0x44, 0xD8, 0x82, 0xA1, generator.randrange(256)])
        del spoilt[generator.randrange(1, len(spoilt)) :]
        verdict = refusal(to_json, bytes(spoilt))
        assert verdict in {None, *REASONS}
        refused += verdict is not None
    assert refused


def nested(levels: int, *, lists: bool = False) -> bytes:
    """A record of so many levels of maps or lists, the record itself being the first."""
    inner = b"\x81" if lists else b"\xa1\x61a"
    return b"\xa1\x61a" + inner * (levels - 1) + b"\x00"


@pytest.mark.parametrize("lists", [False, True])
def test_nesting_is_bounded(lists: bool) -> None:  # noqa: FBT001
    decode_record(nested(NESTING_MAX, lists=lists))
    for levels in (NESTING_MAX + 1, 400, 1000, 5000, 200_000):
        assert reason(nested(levels, lists=lists)) == "nesting"


def test_the_size_is_bounded() -> None:
    text = "x" * (RECORD_BYTES_MAX - 8)
    assert len(encode({"a": text})) == RECORD_BYTES_MAX
    assert decode_record(encode({"a": text})) == {"a": text}
    assert reason(encode({"a": text + "x"})) == "size"


@pytest.mark.parametrize("value", [[], "text", 1, None, b"bytes", Link(CID), 1.5, True], ids=str)
def test_a_record_is_a_map(value: Any) -> None:
    assert reason(encode(value)) == "not_a_map"


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"\xa1",
        b"\xa2\x61a\x01\x61a\x02",  # the same key twice
        b"\xa2\x61b\x01\x61a\x02",  # keys out of order
        b"\xa1\x41a\x01",  # a key of bytes
        b"\xa1\x01\x01",  # a key that is a number
        b"\xa1\x61a\x01\x00",  # a byte too many
        b"\xa1\x61a",  # a byte too few
        b"\xbf\x61a\x01\xff",  # no length
        encode({"a": Raw(b"\x9b" + b"\xff" * 8)}),  # a list of 2**64 items
        encode({"a": Raw(b"\xba\x7f\xff\xff\xff")}),
        encode({"a": Raw(b"\x5b" + b"\xff" * 8)}),
        encode({"a": float("inf")}),
        encode({"a": float("nan")}),
        encode({"a": Raw(b"\x62\xc3\x28")}),  # no UTF-8
        encode({"a": Raw(b"\x63\xed\xa0\x80")}),  # a surrogate
        encode({"a": Raw(b"\xd8\x2a\x01")}),  # a link to a number
        encode({"a": Raw(b"\xd8\x2a" + encode(CID))}),  # a link without its zero
        encode({"a": Link(CID + b"\x00")}),  # a CID with a byte too many
        encode({"a": Link(CID[:-1])}),
        encode({"a": Link(b"\x01\x71\x12\x40" + bytes(100))}),
    ],
    ids=lambda block: block.hex()[:40],
)
def test_what_is_no_dag_cbor_is_refused(block: bytes) -> None:
    assert reason(block) == "cbor"


def test_foreign_links_keep_their_text(data_folder: Path) -> None:
    """They are not of AT Protocol, but a record that has one loses nothing."""
    for line in (data_folder / "codec" / "ipld_fixtures.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case["name"].startswith("cid-Qm") or case["name"].startswith("cid-bahaac"):
            block = b"\xa1\x61a" + bytes.fromhex(case["dag_cbor"])
            assert decode_record(block) == {"a": {"$link": json.loads(case["dag_json"])["/"]}}


def test_a_link_that_the_engine_cannot_write_is_the_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It writes all that it reads, as far as is known: half a million odd CIDs were tried."""

    def refuse(_cid: bytes) -> str:
        raise ValueError("no CID")

    monkeypatch.setattr(record_module, "cid_text", refuse)
    assert reason(encode({"a": Link(b"\x01\x70" + CID[2:])})) == "cbor"


def test_integers_beyond_64_bits_stay_exact() -> None:
    record = {"a": 2**64 - 1, "b": -(2**64), "c": 2**53 + 1}
    decoded = decode_record(encode(record))
    assert decoded == record
    assert json.loads(msgspec.json.encode(decoded)) == record


def test_maps_that_look_like_links_are_not_changed() -> None:
    record = {"a": {"$link": "bafy"}, "b": {"$bytes": 1}, "c": {"$type": "blob", "ref": Link(CID)}}
    assert decode_record(encode(record)) == {**record, "c": {"$type": "blob", "ref": LINK}}
