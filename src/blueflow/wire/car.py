"""CAR v1 as a commit carries it: a walk over the sections that decodes no block.

Most of a commit's blocks are MST nodes nobody asked for. Walking over them costs a tenth of
decoding them (`libipld.decode_car`); the caller decodes the few that it wants.

Source: https://ipld.io/specs/transport/car/carv1/ and https://atproto.com/specs/repository
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from libipld import decode_dag_cbor

from blueflow.errors import CarError
from blueflow.wire.cid import CID_BYTES, DAG_CBOR_PREFIX, is_cid

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCKS_BYTES_MAX = 2_000_000  # lexicon com.atproto.sync.subscribeRepos#commit, `blocks`
_VARINT_BYTES_MAX = 4  # 2**28 is far above any section here
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
        car: a whole CAR, at most 2,000,000 bytes.

    Raises:
        CarError: with reason "size", "car" (a length, varint, header or CID is wrong) or "hash" (a
            block does not have the hash that its CID states).
    """
    root, position = read_header(car)
    end = len(car)
    blocks: dict[bytes, bytes] = {}
    section = position
    try:
        while position < end:
            section = position
            size = car[position]
            position += 1
            if size >= _MORE:
                # Nearly every length has two bytes: a call for each would cost a third of the walk.
                high = car[position]
                position += 1
                if 0 < high < _MORE:
                    size += (high << 7) - _MORE
                else:
                    size, position = read_varint(car, section)
            data_start = position + CID_BYTES
            cid = car[position:data_start]
            position += size
            # A section that is too short or ends behind the CAR gives a slice that hashes otherwise.
            block = car[data_start:position]
            if DAG_CBOR_PREFIX + sha256(block).digest() != cid:
                _explain(car, section, position, cid, block)
            blocks[cid] = block
    except IndexError as error:
        raise CarError("car", f"a varint without end at byte {section}") from error
    return root, blocks


def has_root(car: bytes, cid: bytes) -> bool:
    """Tell whether `cid` is the first root.

    Raises:
        CarError: with reason "size" or "car": there is no header.
    """
    if car.startswith(_ONE_ROOT_START + cid + _ONE_ROOT_END):  # all but always
        return True
    return read_header(car)[0] == cid


def find_block(car: bytes, cid: bytes) -> bytes | None:
    """Return the likeliest block of `cid` without a walk; `find_blocks` has the others.

    Nothing is proven until the caller has compared the hash.
    """
    start = car.rfind(cid)
    if start > 1:
        low, high = car[start - 2], car[start - 1]
        if low >= _MORE > high > 0:
            end = start + low - _MORE + (high << 7)
            if end <= len(car):
                return car[start + CID_BYTES : end]
    return next(find_blocks(car, cid), None)


def find_blocks(car: bytes, cid: bytes) -> Iterator[bytes]:
    """Yield what may be the block of `cid`, without a walk: nearly always just one candidate.

    The CID stands in front of its block, behind the section's length, and elsewhere as a link, behind
    a zero. Read backwards, a length is ambiguous when the byte before it has its highest bit set; so
    nothing is proven until the caller has compared the hash.
    """
    end = len(car)
    start = car.rfind(cid)
    while start > 0:
        width = 1
        while width <= _VARINT_BYTES_MAX and width <= start:
            byte = car[start - width]
            if (byte >= _MORE or byte == 0) if width == 1 else byte < _MORE:
                break
            size, _ = read_varint(car, start - width)
            if CID_BYTES <= size <= end - start:
                yield car[start + CID_BYTES : start + size]
            width += 1
        start = car.rfind(cid, 0, start)


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
    if car.startswith(_ONE_ROOT_START) and car[_ROOT_END:_ONE_ROOT_BYTES] == _ONE_ROOT_END:
        root = car[_ROOT_START:_ROOT_END]
        if not is_cid(root):
            raise CarError("car", "a root that is no CID")
        return root, _ONE_ROOT_BYTES
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


def _explain(car: bytes, section: int, section_end: int, cid: bytes, block: bytes) -> None:
    """Raise for a section that is not a DAG-CBOR block with its hash, unless it is a raw block."""
    if section_end > len(car):
        raise CarError("car", f"a section that ends at byte {section_end} of {len(car)}")
    if not is_cid(cid):
        raise CarError("car", f"a CID that is not CIDv1 with SHA-256 at byte {section}")
    if not hash_matches(cid, block):
        raise CarError("hash", f"the block at byte {section} is not what its CID says")
