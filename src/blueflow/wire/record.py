"""Records: a DAG-CBOR block in, the data model's JSON form out.

libipld is the engine. It returns links and byte strings alike as `bytes`; which is which stands
only in the block, so a record with any of them (3 % of the live stream) is looked at once more.

Source: https://atproto.com/specs/data-model
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any, TypeAlias

from libipld import decode_dag_cbor

from blueflow.errors import RecordError
from blueflow.wire.cid import cid_text, is_cid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RECORD_BYTES_MAX = 1_000_000
NESTING_MAX = 64  # the SDKs' own limits are 32 to 128; real records stay below 12
_SEARCHES_MAX = 16  # for links; real records have one per picture

_Holder: TypeAlias = dict[str, Any] | list[Any]


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
    found: list[tuple[_Holder, bytes]] = []
    _find_bytes(value, NESTING_MAX, found)
    if found and not _replace_links(block, found):
        _replace_in_map(value, _scan(block))
    return value


def _find_bytes(holder: _Holder, levels: int, found: list[tuple[_Holder, bytes]]) -> None:
    """Append the byte strings at all levels with what holds them; refuse more than `levels`."""
    items: Iterable[Any] = holder.values() if type(holder) is dict else holder
    for item in items:
        # By hand and in the order of frequency: it runs over every value of the stream.
        kind = type(item)
        if kind is str:
            continue
        if kind is dict or kind is list:
            if levels == 1:
                raise RecordError("nesting", f"more than {NESTING_MAX} levels")
            _find_bytes(item, levels - 1, found)
        elif kind is bytes:
            found.append((holder, item))


def _replace_links(block: bytes, found: list[tuple[_Holder, bytes]]) -> bool:
    """Replace byte strings that are certainly links, all or none; return whether they were.

    Nearly all byte strings are links to pictures: this costs a fifth of the scan for them.
    """
    if len(found) > _SEARCHES_MAX or not all(_is_link(block, item) for _, item in found):
        return False
    for holder, item in found:
        link = {"$link": cid_text(item)}
        if type(holder) is list:
            holder[holder.index(item)] = link
        elif type(holder) is dict:
            holder[next(key for key, value in holder.items() if value is item)] = link
    return True


def _is_link(block: bytes, item: bytes) -> bool:
    """Tell whether all that is equal to `item` in a block are links to CIDs; False when unsure.

    In front of a link's CID is a zero, and in front of a byte string of that length its length.
    """
    start = block.find(item) if is_cid(item) else 0
    while start > 0 and block[start - 1] == 0:
        start = block.find(item, start + 1)
    return start < 0


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
