"""CAR v1 as a commit carries it: a walk over the sections that decodes no block.

Most of a commit's blocks are MST nodes nobody asked for. Walking over them costs a tenth of
decoding them (`libipld.decode_car`); the caller decodes the few that it wants.

Source: https://ipld.io/specs/transport/car/carv1/ and https://atproto.com/specs/repository
"""

from __future__ import annotations

from hashlib import sha256

from libipld import decode_dag_cbor

from blueflow.errors import CarError
from blueflow.wire.cid import CID_BYTES, DAG_CBOR_PREFIX, cid_text, dag_cbor_cid, is_cid

BLOCKS_BYTES_MAX = 2_000_000  # lexicon com.atproto.sync.subscribeRepos#commit, `blocks`
_VARINT_BYTES_MAX = 4  # 2**28 is far above any section here
_EMPTY_BLOCK = dag_cbor_cid(b"")
_MORE = 0x80  # the varint bit that says that another byte follows
# The header that every AT Protocol implementation writes: {"roots": [<one CID>], "version": 1}.
_ONE_ROOT_START = b"\x3a\xa2\x65roots\x81\xd8\x2a\x58\x25\x00"
_ONE_ROOT_END = b"\x67version\x01"
_ROOT_START = len(_ONE_ROOT_START)
_ROOT_END = _ROOT_START + CID_BYTES
_ONE_ROOT_BYTES = _ROOT_END + len(_ONE_ROOT_END)


def read_car(car: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the first root and the blocks by CID, every block compared with its CID.

    Args:
        car: a whole CAR, at most 2,000,000 bytes. Of a CID that comes twice the last block counts.

    Raises:
        CarError: with reason "size", "car" (a length, varint, header or CID is wrong) or "hash" (a
            block does not have the hash that its CID states).
    """
    root, position = read_header(car)
    end = len(car)
    blocks: dict[bytes, bytes] = {}
    try:
        while position < end:
            # Nearly every length has two bytes: a call for each would cost a third of the walk.
            low = car[position]
            if low >= _MORE and 0 < (high := car[position + 1]) < _MORE:
                cid_start = position + 2
                position = cid_start + low - _MORE + (high << 7)
            else:
                size, cid_start = read_varint(car, position)
                position = cid_start + size
            start = cid_start + CID_BYTES
            # A length below a CID's gives an empty block, and the walk goes on inside the CID.
            blocks[car[cid_start:start]] = car[start:position]
    except IndexError as error:
        raise CarError("car", f"a varint without end at byte {position}") from error
    if position != end:
        raise CarError("car", f"a section that ends at byte {position} of {end}")
    # One pass for the walk and one for the hashes: together a tenth quicker than a single loop.
    others = [
        cid for cid, block in blocks.items() if DAG_CBOR_PREFIX + sha256(block).digest() != cid
    ]
    if others or _EMPTY_BLOCK in blocks:
        _judge(others, blocks)
    return root, blocks


def _judge(others: list[bytes], blocks: dict[bytes, bytes]) -> None:
    """Raise for what is neither a DAG-CBOR block with its hash nor a raw one."""
    if b"" in blocks.values():
        raise CarError("car", "a section without a block")
    for cid in others:
        if not is_cid(cid):
            raise CarError("car", f"a CID that is not CIDv1 with SHA-256: {cid.hex()}")
        if not hash_matches(cid, blocks[cid]):
            raise CarError("hash", f"block {cid_text(cid)} is not what its CID says")


def find_block(car: bytes, cid: bytes) -> bytes | None:
    """Return the block of `cid` by a walk that compares no hash; None when there is none.

    Raises:
        CarError: with reason "size" or "car".
    """
    _, position = read_header(car)
    end = len(car)
    block = None
    while position < end:
        size, cid_start = read_varint(car, position)
        position = cid_start + size
        if size <= CID_BYTES or position > end:
            raise CarError("car", f"a section of {size} bytes at byte {cid_start} of {end}")
        if car.startswith(cid, cid_start):
            block = car[cid_start + CID_BYTES : position]
    return block


def guess_block(car: bytes, cid: bytes) -> bytes:
    """Return what is probably the block of `cid`, without a walk; b"" when it is not so easy.

    The CID stands in front of its block, behind the section's length, and elsewhere as a link,
    behind a zero. Read backwards a length can be ambiguous, and a CID can be part of other data:
    the caller has to compare the hash, or to know that the block decodes as a whole.
    """
    start = car.rfind(cid)
    if start > 1:
        low, high = car[start - 2], car[start - 1]
        if low >= _MORE > high > 0:
            end = start + low - _MORE + (high << 7)
            if end <= len(car):
                return car[start + CID_BYTES : end]
    return b""


def has_root(car: bytes, cid: bytes) -> bool:
    """Tell whether `cid` is the first root.

    Raises:
        CarError: with reason "size" or "car": there is no header.
    """
    if len(car) <= BLOCKS_BYTES_MAX and car.startswith(_ONE_ROOT_START + cid + _ONE_ROOT_END):
        return True  # all but always
    return read_header(car)[0] == cid


def hash_matches(cid: bytes, block: bytes) -> bool:
    """Tell whether `block` has the SHA-256 that `cid` states."""
    return is_cid(cid) and sha256(block).digest() == cid[4:]


def read_header(car: bytes) -> tuple[bytes, int]:
    """Return the first root and where the sections begin.

    Raises:
        CarError: with reason "size" or "car".
    """
    if len(car) > BLOCKS_BYTES_MAX:
        raise CarError("size", f"{len(car)} bytes, allowed are {BLOCKS_BYTES_MAX}")
    root = car[_ROOT_START:_ROOT_END]
    if car.startswith(_ONE_ROOT_START + root + _ONE_ROOT_END) and root[:4] == DAG_CBOR_PREFIX:
        return root, _ONE_ROOT_BYTES  # all but always
    size, start = read_varint(car, 0)
    if start + size > len(car):
        raise CarError("car", f"a header of {size} bytes in {len(car)}")
    try:
        header = decode_dag_cbor(car[start : start + size])
        version, roots = header["version"], header["roots"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CarError("car", f"no header: {error!r}") from error
    if type(version) is not int or version != 1 or type(roots) is not list or not roots:
        raise CarError("car", "a header that is not of version 1 with a root")
    if type(roots[0]) is not bytes or not is_cid(roots[0]):
        raise CarError("car", "a root that is no CID")
    return roots[0], start + size


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Read an unsigned LEB128 number; return it and the position behind it.

    Raises:
        CarError: cut off, longer than 4 bytes, or not in the shortest form.

    Source: https://github.com/multiformats/unsigned-varint
    """
    number = 0
    for shift, byte in enumerate(data[position : position + _VARINT_BYTES_MAX]):
        number |= (byte & 0x7F) << (7 * shift)
        if byte < _MORE:
            if byte == 0 and shift:
                raise CarError("car", f"a varint longer than needed at byte {position}")
            return number, position + shift + 1
    raise CarError("car", f"a varint without end at byte {position}")
