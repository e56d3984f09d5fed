"""CIDs: the one shape of AT Protocol, against the CIDs of real blocks."""

from __future__ import annotations

from hashlib import sha256

import pytest

from blueflow.wire.cid import CID_BYTES, DAG_CBOR_PREFIX, RAW_PREFIX, cid_text, dag_cbor_cid, is_cid

# The empty map and its CID, from the IPLD codec fixtures.
EMPTY_MAP = b"\xa0"
EMPTY_MAP_CID = "bafyreigbtj4x7ip5legnfznufuopl4sg4knzc2cof6duas4b3q2fy6swua"


def test_the_cid_of_a_block_is_the_one_others_give_it() -> None:
    assert cid_text(dag_cbor_cid(EMPTY_MAP)) == EMPTY_MAP_CID


def test_both_codecs_of_the_protocol_are_cids() -> None:
    digest = sha256(b"").digest()
    assert is_cid(DAG_CBOR_PREFIX + digest)
    assert is_cid(RAW_PREFIX + digest)


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"\x01\x71\x12\x20",
        DAG_CBOR_PREFIX + bytes(31),
        DAG_CBOR_PREFIX + bytes(33),
        b"\x00" + DAG_CBOR_PREFIX + bytes(31),
        b"\x01\x70\x12\x20" + bytes(32),  # dag-pb
        b"\x01\x71\x13\x20" + bytes(32),  # sha2-512
        b"\x12\x20" + bytes(34),  # version 0
    ],
    ids=bytes.hex,
)
def test_other_bytes_are_none(other: bytes) -> None:
    assert not is_cid(other)


def test_a_cid_has_36_bytes() -> None:
    assert len(dag_cbor_cid(b"anything")) == CID_BYTES == 36
