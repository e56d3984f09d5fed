"""Foreign codec vectors: each has a verdict here, and the reason where we differ from its source.

Every item is put into a record, as that is where blueflow decodes foreign values. The two decisions
behind the differences:

- The CID covers the bytes as they were received, so an encoding longer than needed changes nothing
  that blueflow promises; the engine takes it, and Jetstream's line of it is the same.
- A record with a float, or with a link of a kind that AT Protocol does not use, is outside the data
  model. It is delivered as it is, because its author's other readers see it too.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import libipld
import pytest
from tests.corpus.cases import refusal
from tests.corpus.dagcbor import cid_of, encode, from_json

from blueflow.errors import RecordError
from blueflow.wire.cid import cid_text
from blueflow.wire.record import decode_record

DATA = Path(__file__).parents[1] / "data"
LONGER = "heads longer than needed are taken"
FOREIGN = "links of other kinds are taken"
FLOAT = "floats are taken"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "codec" / name).read_text().splitlines()]


def in_record(item: bytes) -> Any:
    return decode_record(b"\xa1\x61v" + item)["v"]


def refused(item: bytes) -> bool:
    verdict = refusal(in_record, item)
    assert verdict in {None, "cbor"}
    return verdict is not None


DASL = lines("dasl_vectors.jsonl")
# By name and bytes: a vector that should be refused, and why it is taken.
DASL_TAKEN = {
    "d9002a582500015512205891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03": LONGER,
    "b90001616100": LONGER,
    "bb0000000000000001616100": LONGER,
    "1801": LONGER,
    "1a00000001": LONGER,
    "390000": LONGER,
    "3b0000000000000000": LONGER,
    "5800": LONGER,
    "5a00000000": LONGER,
    "790000": LONGER,
    "7b0000000000000000": LONGER,
    "9800": LONGER,
    "9a00000000": LONGER,
    "d82a5824000155121f5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be": FOREIGN,
    "d82a58250001701220e9822efc7c48027a5429fdbd988d02b2b8e4eaee8f62c32bd1021dcf922e05de": FOREIGN,
}
"""Without a difference: `roundtrip` is taken, `invalid_in` and `invalid_out` are refused."""


@pytest.mark.parametrize("case", DASL, ids=lambda case: f"{case['name']} {case['data'][:24]}")
def test_dasl(case: dict[str, Any]) -> None:
    item = bytes.fromhex(case["data"])
    if case["type"] == "roundtrip":
        assert encode(from_json(in_record(item))) == item
    else:
        assert refused(item) == (case["data"] not in DASL_TAKEN)


def test_the_dasl_differences_are_vectors() -> None:
    assert set(DASL_TAKEN) <= {case["data"] for case in DASL if case["type"] != "roundtrip"}


RFC8949 = lines("rfc8949_vectors.jsonl")
HALF = "DAG-CBOR has no floats of 16 bits"
NOT_A_NUMBER = "DAG-CBOR has no NaN and no infinity"
TAGS = "DAG-CBOR has no tag but 42"
SIMPLE = "DAG-CBOR has no simple value but false, true and null"
KEYS = "DAG-CBOR's keys are text"
NO_LENGTH = "DAG-CBOR's lengths are definite"
RFC8949_REFUSED = {
    "c249010000000000000000": TAGS,
    "c349010000000000000000": TAGS,
    "c074323031332d30332d32315432303a30343a30305a": TAGS,
    "c1fb41d452d9ec200000": TAGS,
    "d818456449455446": TAGS,
    "f98000": HALF,
    "f97bff": HALF,
    "f90001": HALF,
    "f9c400": HALF,
    "f97c00": NOT_A_NUMBER,
    "f9fc00": NOT_A_NUMBER,
    "fa7fc00000": NOT_A_NUMBER,
    "fb7ff0000000000000": NOT_A_NUMBER,
    "fbfff0000000000000": NOT_A_NUMBER,
    "f7": SIMPLE,
    "f820": SIMPLE,
    "a201020304": KEYS,
    "5f42010243030405ff": NO_LENGTH,
    "9fff": NO_LENGTH,
    "9f01820203820405ff": NO_LENGTH,
    "83019f0203ff820405": NO_LENGTH,
    "bf61610161629f0203ffff": NO_LENGTH,
    "bf6346756ef563416d7421ff": NO_LENGTH,
}
"""Without a difference: `valid` is taken, `invalid` (malformed CBOR) is refused."""


def test_rfc8949() -> None:
    assert len(RFC8949) == 389
    for case in RFC8949:
        item = bytes.fromhex(case["hex"])
        if "invalid" in case["flags"] or case["hex"] in RFC8949_REFUSED:
            assert refused(item), case
        else:
            # Floats among them: FLOAT. What comes out is the same value, said by another encoder.
            said_again = encode(from_json(in_record(item)))
            assert libipld.decode_dag_cbor(said_again) == libipld.decode_dag_cbor(item), case


def test_the_rfc8949_differences_are_valid_vectors() -> None:
    assert set(RFC8949_REFUSED) <= {case["hex"] for case in RFC8949 if "valid" in case["flags"]}


IPLD = lines("ipld_fixtures.jsonl")


@pytest.mark.parametrize("case", IPLD, ids=lambda case: case["name"])
def test_ipld_fixtures(case: dict[str, Any]) -> None:
    """All are taken, floats and foreign links too, and say the same as their DAG-JSON."""
    block = bytes.fromhex(case["dag_cbor"])
    assert cid_text(cid_of(block)) == case["cid"]
    assert in_record(block) == _data_model(json.loads(case["dag_json"]))


def _data_model(value: Any) -> Any:
    """Return the data model's JSON form of DAG-JSON, which says links and bytes with a slash."""
    if isinstance(value, list):
        return [_data_model(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"/": str(link)} if len(value) == 1:
            # Version 1 in another base than base32 is the same CID.
            return {"$link": link if link.startswith(("Qm", "b")) else _base32(link)}
        case {"/": {"bytes": str(text)}} if len(value) == 1:
            return {"$bytes": text}
    return {key: _data_model(item) for key, item in value.items()}


def _base32(link: str) -> str:
    cid = libipld.decode_multibase(link)[1]
    return "b" + base64.b32encode(cid).decode().rstrip("=").lower()


INTEROP = DATA / "interop" / "data-model"


@pytest.mark.parametrize(
    "case", json.loads((INTEROP / "data-model-fixtures.json").read_text()), ids=lambda c: c["cid"]
)
def test_interop_fixtures(case: dict[str, Any]) -> None:
    block = base64.b64decode(case["cbor_base64"] + "==")
    assert cid_text(cid_of(block)) == case["cid"]
    assert encode(from_json(case["json"])) == block
    assert decode_record(block) == case["json"]


@pytest.mark.parametrize(
    "case", json.loads((INTEROP / "data-model-valid.json").read_text()), ids=lambda c: c["note"]
)
def test_interop_valid(case: dict[str, Any]) -> None:
    assert decode_record(encode(from_json(case["json"]))) == case["json"]


AS_IT_IS = "no lexicon is applied: what the CBOR says is delivered"
NO_CBOR_FORM = "a `$link` or `$bytes` map of JSON that has no form in CBOR but a map"
INVALID = {  # by note: the reason it is refused for, or why it is taken
    "top-level not an object": "not_a_map",
    "float": FLOAT,
    "record with $type null": AS_IT_IS,
    "record with $type wrong type": AS_IT_IS,
    "record with empty $type string": AS_IT_IS,
    "blob with string size": AS_IT_IS,
    "blob with missing key": AS_IT_IS,
    "bytes with wrong field type": NO_CBOR_FORM,
    "bytes with extra fields": NO_CBOR_FORM,
    "link with wrong field type": NO_CBOR_FORM,
    "link with bogus CID": NO_CBOR_FORM,
    "link with extra fields": NO_CBOR_FORM,
}


@pytest.mark.parametrize(
    "case", json.loads((INTEROP / "data-model-invalid.json").read_text()), ids=lambda c: c["note"]
)
def test_interop_invalid(case: dict[str, Any]) -> None:
    verdict = INVALID[case["note"]]
    block = encode(from_json(case["json"]))
    if verdict in {AS_IT_IS, NO_CBOR_FORM, FLOAT}:
        assert decode_record(block) == case["json"]
    else:
        with pytest.raises(RecordError) as error:
            decode_record(block)
        assert error.value.reason == verdict
