"""CARs: an exact walk, every block proven by its hash, and bounds on everything."""

from __future__ import annotations

import base64
import json
import random
from typing import TYPE_CHECKING

import libipld
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.builders import car, section, varint
from tests.corpus.cases import refusal, seeded, share
from tests.corpus.dagcbor import Link, Raw, cid_of, encode

from blueflow.errors import CarError
from blueflow.wire.car import (
    BLOCKS_BYTES_MAX,
    check_root,
    find_block,
    guess_block,
    hash_matches,
    read_car,
    read_header,
    read_varint,
)
from blueflow.wire.cid import cid_text

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS = [encode({"n": number, "pad": "x" * number}) for number in range(0, 400, 7)]
ROOT = cid_of(BLOCKS[0])
SOUND = car([ROOT], BLOCKS)
RAW_BLOCK = b"\xff\xd8\xff raw, not CBOR"
blocks_of_any_size = st.lists(
    st.one_of(st.binary(min_size=1, max_size=80), st.binary(min_size=80, max_size=400)),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def recorded_cars(recorded_frames: list[bytes]) -> list[tuple[bytes, bytes, list[bytes]]]:
    """CAR, commit CID and the record CIDs of each recorded frame."""
    bodies = [libipld.decode_dag_cbor_multi(frame)[1] for frame in recorded_frames]
    return [
        (body["blocks"], body["commit"], [op["cid"] for op in body["ops"] if op["cid"]])
        for body in bodies
    ]


def read_all(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    root, _ = read_header(data)
    return root, read_car(data, root)


def reason(data: bytes, root: bytes = ROOT) -> str:
    with pytest.raises(CarError) as error:
        read_car(data, root)
    return error.value.reason


def test_recorded_cars_are_what_another_reader_says(
    recorded_cars: list[tuple[bytes, bytes, list[bytes]]],
) -> None:
    for data, commit, _ in recorded_cars:
        root, blocks = read_all(data)
        _, theirs = libipld.decode_car(data)
        assert root == commit
        assert {cid: libipld.decode_dag_cbor(block) for cid, block in blocks.items()} == theirs
        check_root(data, commit)


def test_records_of_recorded_cars_are_found_without_a_walk(
    recorded_cars: list[tuple[bytes, bytes, list[bytes]]],
) -> None:
    for data, _, records in recorded_cars:
        blocks = read_all(data)[1]
        for cid in records:
            assert guess_block(data, cid) == blocks[cid]
        for cid, block in blocks.items():
            assert find_block(data, cid) == block
            assert guess_block(data, cid) in (block, b"") or len(block) < 128


def test_foreign_car_fixtures(data_folder: Path) -> None:
    cases = json.loads((data_folder / "codec" / "car_file_fixtures.json").read_text())
    assert cases
    for case in cases:
        data = base64.b64decode(case["car"] + "==")
        root, blocks = read_all(data)
        assert cid_text(root) == case["root"]
        assert {cid_text(cid): block for cid, block in blocks.items()} == {
            one["cid"]: base64.b64decode(one["bytes"] + "==") for one in case["blocks"]
        }


@pytest.mark.parametrize("name", ["tiny", "empty", "jimcalabro", "greenground.repo", "repo_slice"])
def test_foreign_repositories(data_folder: Path, name: str) -> None:
    data = (data_folder / "cars" / f"{name}.car").read_bytes()
    root, blocks = read_all(data)
    theirs_root, theirs = libipld.decode_car(data)
    assert root == theirs_root["roots"][0]
    assert blocks.keys() == theirs.keys()


def test_a_raw_block_is_a_block() -> None:
    cid = cid_of(RAW_BLOCK, 0x55)
    assert read_car(car([ROOT], [*BLOCKS, (cid, RAW_BLOCK)]), ROOT)[cid] == RAW_BLOCK


def test_more_roots_than_one_and_a_root_of_raw_bytes() -> None:
    data = car([ROOT, cid_of(BLOCKS[1])], BLOCKS)
    assert read_all(data)[0] == ROOT
    check_root(data, ROOT)
    assert reason(data, cid_of(BLOCKS[1])) == "car"
    raw = cid_of(RAW_BLOCK, 0x55)
    assert read_all(car([raw], [(raw, RAW_BLOCK)])) == (raw, {raw: RAW_BLOCK})


def test_the_root_has_to_be_the_one_asked_for_and_there() -> None:
    other = cid_of(b"elsewhere")
    for wrong in (cid_of(BLOCKS[1]), other, b"", ROOT[:-1], ROOT + b"\x00", b"\x00" + ROOT):
        assert reason(SOUND, wrong) == "car"
        with pytest.raises(CarError, match="root"):
            check_root(SOUND, wrong)
    assert reason(car([other], BLOCKS), other) == "car"
    # The root's own length is in the header, so a shorter one cannot end where a CID's would.
    short = SOUND[:14] + ROOT[:-2] + b"\x67version\x01" + SOUND[59:]
    assert reason(short, ROOT[:-2]) == "car"
    with pytest.raises(CarError):
        check_root(short, ROOT[:-2])


def test_of_a_cid_that_comes_twice_the_last_block_counts_and_is_proven() -> None:
    bad_then_good = car([ROOT], [(ROOT, b"other"), BLOCKS[0]])
    assert read_all(bad_then_good)[1] == {ROOT: BLOCKS[0]}
    assert find_block(bad_then_good, ROOT) == BLOCKS[0]
    assert reason(car([ROOT], [BLOCKS[0], (ROOT, b"other")])) == "hash"


def with_header(value: object) -> bytes:
    header = encode(value)
    return varint(len(header)) + header + BODY


HEADER = encode({"roots": [Link(ROOT)], "version": 1})
BODY = b"".join(section(cid_of(one), one) for one in BLOCKS)
EMPTY_CID = cid_of(b"")
SPOILT = {
    "nothing": b"",
    "a header that is cut off": SOUND[:30],
    "a header longer than the CAR": varint(len(HEADER) + 9999) + HEADER + BODY,
    "a header that is no CBOR": varint(3) + b"\xff\xff\xff" + BODY,
    "a header that is no map": varint(1) + b"\x80" + BODY,
    "no roots": car([], BLOCKS),
    "a root that is a number": with_header({"roots": [1], "version": 1}),
    "a root of another kind": car([b"\x01\x70\x12\x20" + bytes(32)], BLOCKS),
    "version 2": with_header({"roots": [Link(ROOT)], "version": 2}),
    "version true": with_header({"roots": [Link(ROOT)], "version": True}),
    "no version": with_header({"roots": [Link(ROOT)]}),
    "a deep header": with_header({"roots": Raw(b"\x81" * 5000 + b"\x00"), "version": 1}),
    "a last section that is cut off": SOUND[:-1],
    "a byte too many": SOUND + b"\x00",
    "a varint without end": SOUND + b"\x80",
    "a varint of five bytes": SOUND + b"\xff\xff\xff\xff\x01",
    "a varint longer than needed": SOUND + b"\xa5\x80\x00",
    "a length of 0": car([ROOT], BLOCKS) + b"\x00" + EMPTY_CID,
    "a length below a CID's": car([ROOT], BLOCKS) + b"\x10" + EMPTY_CID,
    "a section without a block": SOUND + section(EMPTY_CID, b""),
    "a raw section without a block": SOUND + section(cid_of(b"", 0x55), b""),
    "a length beyond the end, with the right hash": SOUND
    + varint(36 + 500)
    + cid_of(b"abc")
    + b"abc",
    "a CID of version 0": SOUND + section(b"\x12\x20" + bytes(32), b"block"),
    "a CID with dag-pb": SOUND + section(b"\x01\x70" + cid_of(b"block")[2:], b"block"),
}


@pytest.mark.parametrize("data", SPOILT.values(), ids=SPOILT)
def test_a_malformed_car_is_told_from_a_corrupted_block(data: bytes) -> None:
    assert reason(data) == "car"


@pytest.mark.parametrize("index", [0, 1, len(BLOCKS) - 1])
@pytest.mark.parametrize("at", [0, 2, -1])
def test_a_corrupted_block_is_found(index: int, at: int) -> None:
    blocks: list[bytes | tuple[bytes, bytes]] = [*BLOCKS]
    spoilt = bytearray(BLOCKS[index])
    spoilt[at] ^= 1
    blocks[index] = (cid_of(BLOCKS[index]), bytes(spoilt))
    assert reason(car([ROOT], blocks)) == "hash"
    raw = cid_of(RAW_BLOCK, 0x55)
    assert reason(car([ROOT], [*BLOCKS, (raw, RAW_BLOCK + b"!")])) == "hash"


def test_the_size_is_bounded() -> None:
    block = b"\x00" * (BLOCKS_BYTES_MAX - len(car([ROOT], [])) - 36 - 3)  # its length has 3 bytes
    root = cid_of(block)
    largest = car([root], [block])
    assert len(largest) == BLOCKS_BYTES_MAX
    assert read_all(largest)[1] == {root: block}
    assert reason(b"\x00" * (BLOCKS_BYTES_MAX + 1)) == "size"
    with pytest.raises(CarError, match="size"):
        check_root(b"\x00" * (BLOCKS_BYTES_MAX + 1), root)


def test_a_car_full_of_one_cid_costs_one_walk() -> None:
    """Looking for the right one of many occurrences would take minutes here."""
    cid = cid_of(b"not there")
    trap = (b"\xff\xff\x7f" + cid) * 40_000
    data = car([ROOT], [trap])
    assert find_block(data, cid) is None
    assert not hash_matches(cid, guess_block(data, cid))


def test_a_walk_without_hashes_is_as_exact() -> None:
    for name, data in SPOILT.items():
        if "CID" in name and "length" not in name:
            continue  # CIDs are looked at with the hashes
        with pytest.raises(CarError):
            find_block(data, bytes(36))


def test_a_block_that_looks_like_a_section_is_not_taken_for_one() -> None:
    inner = encode({"text": "the true one"})
    cid = cid_of(inner)
    decoy = section(cid, encode({"text": "a decoy"}) + b"x" * 150)
    for blocks in ([inner, decoy], [decoy, inner]):
        data = car([ROOT], [*BLOCKS, *blocks])
        assert find_block(data, cid) == inner
        assert read_all(data)[1][cid] == inner


@share(5)
@given(blocks_of_any_size)
def test_what_was_put_in_comes_out(blocks: list[bytes]) -> None:
    root = cid_of(blocks[0])
    data = car([root], blocks)
    assert read_all(data) == (root, {cid_of(one): one for one in blocks})
    for one in blocks:
        cid = cid_of(one)
        assert find_block(data, cid) == one
        guess = guess_block(data, cid)
        assert not hash_matches(cid, guess) or guess == one
    assert find_block(data, cid_of(b"another" + b"".join(blocks))) is None


@share(10)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_car_or_the_typed_error(data: bytes, behind_header: bool) -> None:  # noqa: FBT001
    if behind_header:
        data = varint(len(HEADER)) + HEADER + data
    for read in (read_all, read_header, lambda one: find_block(one, ROOT)):
        assert refusal(read, data) in {None, "car", "hash", "size"}


def test_spoilt_real_cars_give_proven_blocks_or_the_typed_error(
    recorded_cars: list[tuple[bytes, bytes, list[bytes]]],
) -> None:
    generator = random.Random(20_260_704)
    refused = 0
    for number in seeded(10):
        data, _, records = recorded_cars[number % len(recorded_cars)]
        sound = read_all(data)[1]
        spoilt = bytearray(data)
        at = generator.randrange(len(data))
        match generator.randrange(3):
            case 0:
                spoilt[at] = generator.randrange(256)
            case 1:
                del spoilt[at : at + generator.randrange(1, 60)]
            case 2:
                spoilt[at:at] = data[at - generator.randrange(60) : at]
        try:
            blocks = read_all(bytes(spoilt))[1]
        except CarError:
            refused += 1
            continue
        assert all(cid_of(one, cid[1]) == cid for cid, one in blocks.items())
        assert all(blocks.get(cid, sound[cid]) == sound[cid] for cid in records)
    assert refused > len(seeded(10)) // 2


@share(5)
@given(st.integers(0, 2**28 - 1), st.binary(max_size=3))
def test_varints_come_back(number: int, behind: bytes) -> None:
    encoded = varint(number)
    assert read_varint(b"\xff" + encoded + behind, 1) == (number, 1 + len(encoded))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\xff\xff\xff\xff", b"\x80\x80\x80\x80\x01", b"\x80\x00", b"\xff\x80\x00"],
)
def test_a_varint_is_bounded_complete_and_short(data: bytes) -> None:
    with pytest.raises(CarError):
        read_varint(data, 0)
