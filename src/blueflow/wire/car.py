"""CAR v1 as a commit carries it: a walk over the sections that decodes no block.

Most of a commit's blocks are MST nodes nobody asked for. Walking over them costs a tenth of
decoding them (`libipld.decode_car`); the caller decodes the few that it wants.

Source: https://ipld.io/specs/transport/car/carv1/ and https://atproto.com/specs/repository
"""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO

from libipld import decode_dag_cbor

from blueflow.errors import CarError
from blueflow.wire.cid import CID_BYTES, DAG_CBOR_PREFIX, cid_text, is_cid

BLOCKS_BYTES_MAX = 2_000_000  # lexicon com.atproto.sync.subscribeRepos#commit, `blocks`
_VARINT_BYTES_MAX = 4  # 2**28 is far above any section here
_MORE = 0x80  # the varint bit that says that another byte follows
_NO_BLOCK = _MORE + CID_BYTES  # what a length of two bytes has besides the block's
# The header that every AT Protocol implementation writes: {"roots": [<one CID>], "version": 1}.
_ONE_ROOT_START = b"\x3a\xa2\x65roots\x81\xd8\x2a\x58\x25\x00"
_ONE_ROOT_END = b"\x67version\x01"
_ONE_ROOT_BYTES = len(_ONE_ROOT_START) + CID_BYTES + len(_ONE_ROOT_END)


def read_car(car: bytes, root: bytes) -> dict[bytes, bytes]:
    """Return the blocks by CID, every block compared with its CID.

    Args:
        car: a whole CAR, at most 2,000,000 bytes. Of a CID that comes twice the last block counts.
        root: the CID that has to be the first root and among the blocks.

    Raises:
        CarError: with reason "size", "car" (a length, varint, header or CID is wrong, or there is
            another root) or "hash" (a block does not have the hash that its CID states).
    """
    sections = BytesIO(car)
    sections.seek(_skip_header(car, root))
    read = sections.read  # quicker than slices at places of our own
    blocks: dict[bytes, bytes] = {}
    size, block = 0, b""
    try:
        while head := read(2):
            # Nearly every length has two bytes: a call for each would cost a third of the walk.
            low = head[0]
            if low >= _MORE and 0 < (high := head[1]) < _MORE:
                size = low + (high << 7) - _NO_BLOCK
            else:
                size, start = read_varint(car, sections.tell() - len(head))
                size -= CID_BYTES
                if size <= 0:
                    raise CarError("car", f"a section without a block at byte {start}")
                sections.seek(start)
            cid = read(CID_BYTES)
            blocks[cid] = block = read(size)
    except IndexError as error:
        raise CarError("car", f"a varint without end at byte {len(car) - 1}") from error
    if len(block) != size:
        raise CarError("car", f"a section that ends behind byte {len(car)}")
    # One pass for the walk and one for the hashes: together quicker than a single loop.
    others = [
        cid for cid, block in blocks.items() if DAG_CBOR_PREFIX + sha256(block).digest() != cid
    ]
    if others:
        _judge(others, blocks)
    if root not in blocks:
        raise CarError("car", "the root is not among the blocks")
    return blocks


def _judge(others: list[bytes], blocks: dict[bytes, bytes]) -> None:
    """Raise for what is neither a DAG-CBOR block with its hash nor a raw one."""
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


def check_root(car: bytes, root: bytes) -> None:
    """Return when `root` is the first root.

    Raises:
        CarError: with reason "size" or "car".
    """
    _skip_header(car, root)


def _skip_header(car: bytes, root: bytes) -> int:
    """Return where the sections begin, behind a header with this root."""
    if (
        car.startswith(_ONE_ROOT_START + root + _ONE_ROOT_END)
        and root[:4] == DAG_CBOR_PREFIX
        and len(root) == CID_BYTES
        and len(car) <= BLOCKS_BYTES_MAX
    ):
        return _ONE_ROOT_BYTES  # all but always
    first, position = read_header(car)
    if first != root:
        raise CarError("car", "the root is not the commit")
    return position


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
