"""Records: a DAG-CBOR block in, the data model's JSON form out.

libipld is the engine. It returns links and byte strings alike as `bytes`; which is which stands
only in the block, so a record with any of them (3 % of the live stream) is scanned once more.

Source: https://atproto.com/specs/data-model
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any

from libipld import decode_dag_cbor

from blueflow.errors import RecordError
from blueflow.wire.cid import cid_text, is_cid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RECORD_BYTES_MAX = 1_000_000
NESTING_MAX = 64  # the SDKs' own limits are 32 to 128; real records stay below 12


def decode_record(block: bytes) -> dict[str, Any]:
    """Return a record in JSON form: links as `{"$link": …}`, byte strings as `{"$bytes": …}`.

    Raises:
        RecordError: with reason "size" (above 1,000,000 bytes), "cbor" (not DAG-CBOR), "not_a_map"
            or "nesting" (more than 64 levels).
    """
    if len(block) > RECORD_BYTES_MAX:
        raise RecordError("size", f"{len(block)} bytes, allowed are {RECORD_BYTES_MAX}")
    try:
        value = decode_dag_cbor(block)
    except RecursionError as error:
        raise RecordError("nesting", f"more than {NESTING_MAX} levels") from error
    except ValueError as error:
        raise RecordError("cbor", str(error)) from error
    if type(value) is not dict:
        raise RecordError("not_a_map", f"the block holds a {type(value).__name__}")
    if _has_bytes(value.values(), NESTING_MAX):
        _replace_in_map(value, _scan(block))
    return value


def _has_bytes(items: Iterable[Any], levels: int) -> bool:
    """Tell whether there is a byte string at any level; more than `levels` are refused."""
    if not levels:
        raise RecordError("nesting", f"more than {NESTING_MAX} levels")
    found = False
    for item in items:
        # By hand and in the order of frequency: it runs over every value of the stream.
        kind = type(item)
        if kind is str:
            continue
        if kind is dict:
            if _has_bytes(item.values(), levels - 1):
                found = True
        elif kind is list:
            if _has_bytes(item, levels - 1):
                found = True
        elif kind is bytes:
            found = True
    return found


def _replace_in_map(value: dict[str, Any], is_link: Iterator[bool]) -> None:
    for key, item in value.items():
        value[key] = _replaced(item, is_link)


def _replaced(item: Any, is_link: Iterator[bool]) -> Any:
    if type(item) is bytes:
        return _json_form(item, is_link)
    if type(item) is dict:
        _replace_in_map(item, is_link)
    elif type(item) is list:
        item[:] = [_replaced(entry, is_link) for entry in item]
    return item


def _json_form(item: bytes, is_link: Iterator[bool]) -> dict[str, str]:
    if next(is_link):
        return {"$link": _link_text(item)}
    return {"$bytes": b64encode(item).decode().rstrip("=")}


def _link_text(cid: bytes) -> str:
    """Return a CID as text, also of a kind that AT Protocol does not use but IPLD does."""
    try:
        text = cid_text(cid)
    except ValueError as error:
        raise RecordError("cbor", str(error)) from error
    # The engine reads a CID's beginning; bytes behind it are not in the text, so this is no CID.
    if not is_cid(cid) and len(cid) != _byte_length(text):
        raise RecordError("cbor", f"a link of {len(cid)} bytes that is no CID")
    return text


def _byte_length(cid: str) -> int:
    if cid.startswith("Qm"):  # version 0: always SHA-256
        return 34
    return (len(cid) - 1) * 5 // 8  # base32 behind its prefix


def _scan(block: bytes) -> Iterator[bool]:
    """Yield for each byte string of a block, in order, whether it is a link (behind tag 42).

    The block has been decoded, so it is well-formed, of definite lengths, and its only tag is 42.
    """
    position, end, tagged = 0, len(block), False
    while position < end:
        major, info = block[position] >> 5, block[position] & 0x1F
        position += 1
        if info < 24:  # noqa: PLR2004 - RFC 8949 section 3: the value itself
            number = info
        else:
            width = 1 << (info - 24)
            number = int.from_bytes(block[position : position + width], "big")
            position += width
        if major == 2:  # noqa: PLR2004 - RFC 8949: byte string
            yield tagged
            position += number
        elif major == 3:  # noqa: PLR2004 - RFC 8949: text string
            position += number
        tagged = major == 6  # noqa: PLR2004 - RFC 8949: tag
