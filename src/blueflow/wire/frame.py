"""Event-stream frames and the messages of com.atproto.sync.subscribeRepos, every field of them.

Source: https://atproto.com/specs/event-stream#framing and lexicon com.atproto.sync.subscribeRepos
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import msgspec
from libipld import decode_dag_cbor_multi

from blueflow.errors import FrameError

FRAME_BYTES_MAX = 5_000_000
OPS_MAX = 200
_PARTS = 2  # a header and a body
_BYTES = (bytes,)  # take byte strings as they are, and do not take base64 text for them


class RepoOpMessage(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One entry of `ops`; CIDs are 36 bytes, `prev` is the record's CID before."""

    action: str
    path: str
    cid: bytes | None = None
    prev: bytes | None = None


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """#commit: what changed in a repository, with the blocks that prove it."""

    seq: int
    repo: str
    commit: bytes
    rev: str
    blocks: bytes
    ops: list[RepoOpMessage]
    time: str
    since: str | None = None
    prev_data: bytes | None = None
    blobs: list[bytes] | None = None  # null in frames of some older servers
    too_big: bool = False
    rebase: bool = False
    prev: bytes | None = None  # gone from the lexicon; frames from before Sync 1.1 have it


class SyncMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """#sync: a repository's new state, without its records."""

    seq: int
    did: str
    blocks: bytes
    rev: str
    time: str


class IdentityMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """#identity: drop what is cached of this identity."""

    seq: int
    did: str
    time: str
    handle: str | None = None


class AccountMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """#account: an account's hosting status."""

    seq: int
    did: str
    time: str
    active: bool
    status: str | None = None


class InfoMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """#info: a remark about the stream; it has no seq."""

    name: str
    message: str | None = None


class ErrorMessage(msgspec.Struct, frozen=True):
    """The body of an error frame; the server closes the connection behind it."""

    error: str
    message: str | None = None


OtherMessage: TypeAlias = SyncMessage | IdentityMessage | AccountMessage | InfoMessage
Message: TypeAlias = Commit | OtherMessage

COMMIT = "#commit"
OTHER_MESSAGES: dict[str, type[OtherMessage]] = {
    "#sync": SyncMessage,
    "#identity": IdentityMessage,
    "#account": AccountMessage,
    "#info": InfoMessage,
}

MessageT = TypeVar("MessageT", bound=Message)

Frame: TypeAlias = tuple[str, dict[str, Any]]
"""A frame of op 1: its type and its body, of which nothing is checked but that it is a map."""


def read_frame(source: str, message: bytes | str) -> Frame | ErrorMessage | int:
    """Decode one websocket message.

    Returns:
        The type and body of an event (`op` 1); or the body of an error frame (-1); or the `op` that
        the spec has no meaning for (yet).

    Raises:
        FrameError: no header and body in DAG-CBOR, or above 5,000,000 bytes; the spec drops the
            connection.
    """
    if type(message) is not bytes:
        raise FrameError(source, len(message), "a text message")
    if len(message) > FRAME_BYTES_MAX:
        raise FrameError(source, len(message), f"above {FRAME_BYTES_MAX} bytes")
    try:
        parts = decode_dag_cbor_multi(message)
    except (ValueError, RecursionError) as error:
        raise FrameError(source, len(message), str(error)) from error
    if len(parts) != _PARTS:
        raise FrameError(source, len(message), f"{len(parts)} CBOR items instead of 2")
    header, body = parts
    if type(header) is not dict or type(body) is not dict:
        raise FrameError(source, len(message), "header or body is no map")
    op, t = header.get("op"), header.get("t")
    if type(op) is int:
        if op == 1:
            if type(t) is str:
                return t, body
        elif op == -1:
            return _error_message(body)
        else:
            return op
    raise FrameError(source, len(message), "no usable op and t in the header")


def _error_message(body: dict[str, Any]) -> ErrorMessage:
    try:
        return msgspec.convert(body, ErrorMessage)
    except msgspec.ValidationError:
        return ErrorMessage("Unknown", "an error frame without a usable error name")


def read_body(body: dict[str, Any], kind: type[MessageT]) -> tuple[MessageT, bool]:
    """Check a body against its lexicon; return it typed, and whether it had unknown fields.

    Raises:
        msgspec.ValidationError: a required field is missing or has the wrong type.
    """
    try:
        return msgspec.convert(body, kind, builtin_types=_BYTES), False
    except msgspec.ValidationError:
        # Either wrong, or newer than this code: the spec ignores unknown fields. The second look
        # costs only the frames that need it.
        return msgspec.convert(_known_only(body, kind), kind, builtin_types=_BYTES), True


def _known_only(body: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    known = kind.__struct_encode_fields__
    kept = {name: body[name] for name in known if name in body}
    if kind is Commit and type(kept.get("ops")) is list:
        fields = RepoOpMessage.__struct_encode_fields__
        kept["ops"] = [
            {name: op[name] for name in fields if name in op} if type(op) is dict else op
            for op in kept["ops"]
        ]
    return kept
