"""A look at a #commit's beginning, to skip a frame in which nothing is wanted without decoding it.

DAG-CBOR has one way to write a map: a #commit begins with its type, `ops`, `rev`, `seq`, `repo`
and `time`, in this order and in these bytes, and the blocks come behind them. Reading them by
offset costs half of what the CBOR decoder costs. This knows the one shape that most of the stream
has (a single create or delete in a did:plc repository), tests every byte it steps over but the
CID's, and says nothing about other frames.
"""

from __future__ import annotations

# {"t": "#commit", "op": 1}, the body's number of fields, `ops` of one operation, its fields
_HEADS = tuple(
    b"\xa2atg#commitbop\x01" + fields + b"cops\x81" + operation
    for fields in (b"\xac", b"\xad", b"\xae")
    for operation in (b"\xa3ccid\xd8\x2a\x58\x25\x00", b"\xa4ccid\xf6")
)
_DELETE_AT, _DELETE = 21, 0xA4  # a delete's operation has four fields: it names the previous CID
_CREATE_PATH = 31 + 36  # behind the head and the record's CID
_DELETE_PATH = 27
_CREATED, _DELETED = b"factionfcreatecrevm", b"factionfdeletecrevm"
_PREV = b"dprev\xd8\x2a\x58\x25\x00"


def peek_commit(message: bytes) -> tuple[bytes, int, bytes, bytes] | None:
    """Return (path, seq, repo, time) of a #commit in the usual shape, or None."""
    if not message.startswith(_HEADS):
        return None
    deleted = message[_DELETE_AT] == _DELETE
    start = _DELETE_PATH if deleted else _CREATE_PATH
    if message[start : start + 6] != b"dpathx" or len(message) < 300:  # noqa: PLR2004 - no index below leaves it
        return None
    start += 7
    end = start + message[start - 1]
    action = end
    if deleted:
        if message[end : end + 10] != _PREV:
            return None
        action = end + 46
    if message[action : action + 19] != (_DELETED if deleted else _CREATED):
        return None
    seq = action + 32  # behind the 13 characters of the rev
    if message[seq : seq + 5] != b"cseq\x1b" or message[seq + 13 : seq + 20] != b"drepox\x20":
        return None
    repo = seq + 20
    if message[repo + 32 : repo + 39] != b"dtimex\x18":
        return None
    number = int.from_bytes(message[seq + 5 : seq + 13], "big")
    return message[start:end], number, message[repo : repo + 32], message[repo + 39 : repo + 63]
