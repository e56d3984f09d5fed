"""A look at a #commit's beginning, to skip a frame with nothing wanted without decoding it.

DAG-CBOR has one way to write a map: a #commit begins with its type, `ops`, `rev`, `seq`, `repo`
and `time`, in this order and in these bytes, and the blocks come behind them. Reading them at
their places costs a third of what the CBOR decoder costs. This knows the one shape that most of
the stream has (a single create or delete in a did:plc repository, a time in milliseconds), tests
every byte it steps over but digests and the rev, and says nothing about other frames.
"""

from __future__ import annotations

from struct import Struct

_LINK = b"\xd8\x2a\x58\x25\x00\x01\x71\x12\x20"  # what is in front of a CID's digest of 32 bytes
# {"t": "#commit", "op": 1}, a body of 12 fields, `ops` with one operation, its number of fields
_CREATE = b"\xa2atg#commitbop\x01\xaccops\x81\xa3ccid" + _LINK
_DELETE = b"\xa2atg#commitbop\x01\xaccops\x81\xa4ccid\xf6dpathx"
_TAIL = b"\x66tooBig\xf4\x68prevData" + _LINK  # of a commit that is whole

_CREATE_PATH = len(_CREATE) + 32 + 6  # behind the digest and b"dpathx" is the path's length
_DELETE_PATH = len(_DELETE)
_TAIL_START = -32 - len(_TAIL)
_BYTES_MIN = 512  # nothing below looks behind it, whatever the path; real frames have thousands

# By the path's length: path, what its operation ends with, then rev, seq, repo and time.
_REST = "13x5sq7s32s7s23s6s"
_AFTER_CREATE = tuple(Struct(f">6sx{size}s19s{_REST}").unpack_from for size in range(256))
_AFTER_DELETE = tuple(Struct(f">x{size}s14s32x19s{_REST}").unpack_from for size in range(256))


def peek_commit(message: bytes) -> tuple[bytes, int, bytes, bytes] | None:
    """Return (path, seq, repo, time without its Z) of a #commit in the usual shape, or None."""
    if len(message) < _BYTES_MIN or message[_TAIL_START:-32] != _TAIL:
        return None
    if message.startswith(_CREATE):
        before, path, action, in_seq, seq, in_repo, repo, in_time, time, end = _AFTER_CREATE[
            message[_CREATE_PATH]
        ](message, _CREATE_PATH - 6)
        if before != b"dpathx" or action != b"factionfcreatecrevm":
            return None
    elif message.startswith(_DELETE):
        path, before, action, in_seq, seq, in_repo, repo, in_time, time, end = _AFTER_DELETE[
            message[_DELETE_PATH]
        ](message, _DELETE_PATH)
        if before != b"dprev" + _LINK or action != b"factionfdeletecrevm":
            return None
    else:
        return None
    if (
        in_seq == b"cseq\x1b"
        and in_repo == b"drepox\x20"
        and in_time == b"dtimex\x18"
        and end == b"Zeblob"
        and seq >= 0
    ):
        return path, seq, repo, time
    return None
