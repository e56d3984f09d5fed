"""What blueflow's users see: one event per repository operation, and the account-level events.

An event's identity is (source, seq, op_index): one commit may hold several operations, and the
seqs of two relays are not comparable. Integers are 64-bit: live seqs are above 31 billion.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

Operation: TypeAlias = Literal["create", "update", "delete"]
JsonValue: TypeAlias = Any  # a value of the AT Protocol data model in its JSON form


class Position(msgspec.Struct, frozen=True):
    """How far a source has been consumed: everything up to and including `seq`.

    `time_us` is the newest trustworthy relay time (microseconds since 1970, UTC) at or before
    `seq`; relay times do not rise with seq, so it is a running maximum. 0 means unknown.
    """

    source: str
    seq: int
    time_us: int = 0


def family(source: str) -> str:
    """Return a source's name without its epoch: "host" for "host" and "host#2"."""
    return _EPOCH.sub("", source)


def epoch_of(source: str) -> int:
    """Return how often a source has begun to count: 1 for "host", 2 for "host#2"."""
    found = _EPOCH.search(source)
    return int(found[1]) if found else 1


def epoch_after(source: str) -> str:
    """Return the name that a source goes on under when it begins to count anew."""
    return f"{family(source)}#{epoch_of(source) + 1}"


_EPOCH = re.compile(r"#(\d+)\Z")  # at the end: a file's name may have a # of its own


class RepoOp(msgspec.Struct, frozen=True, gc=False):
    """One operation on one record of one repository.

    Attributes:
        source: name of the relay, e.g. "bsky.network".
        seq: the relay's sequence number of the commit.
        op_index: place of the operation in its commit, from 0.
        did: the repository, i.e. the author.
        time_us: the relay's time of the commit, microseconds since 1970, UTC.
        rev: the repository's revision, a TID.
        operation: "create", "update" or "delete".
        collection: NSID, e.g. "app.bsky.feed.post".
        rkey: record key.
        cid: CID of the record as text; None for a delete.
        record: the record in data-model JSON form (`{"$link": …}`, `{"$bytes": …}`);
            None for a delete.
    """

    source: str
    seq: int
    op_index: int
    did: str
    time_us: int
    rev: str
    operation: Operation
    collection: str
    rkey: str
    cid: str | None = None
    record: dict[str, JsonValue] | None = None

    @property
    def uri(self) -> str:
        """The record's AT URI."""
        return f"at://{self.did}/{self.collection}/{self.rkey}"

    def model(self) -> Any:
        """Return the record as the atproto SDK's typed model; None for a delete.

        A record that does not fit its lexicon comes back as the SDK's `DotDict`.

        Raises:
            MissingExtraError: the extra `identity` (the atproto SDK) is not installed.
        """
        from blueflow import models  # noqa: PLC0415 - the SDK takes a second to import

        return models.model(self)


class Identity(msgspec.Struct, frozen=True, gc=False):
    """An account's handle, signing key or PDS may have changed: drop what you cached of it."""

    source: str
    seq: int
    did: str
    time_us: int
    time: str
    handle: str | None = None
    op_index: int = 0


class Account(msgspec.Struct, frozen=True, gc=False):
    """An account's hosting status changed.

    `status` (when not `active`): takendown, suspended, deleted, deactivated, desynchronized,
    throttled, or a value that is newer than this list.
    """

    source: str
    seq: int
    did: str
    time_us: int
    time: str
    active: bool
    status: str | None = None
    op_index: int = 0


class Sync(msgspec.Struct, frozen=True, gc=False):
    """A repository jumped to a new state whose records were not all on the stream.

    `blocks` is a CAR of at most 10,000 bytes that holds the signed commit.
    """

    source: str
    seq: int
    did: str
    time_us: int
    time: str
    rev: str
    blocks: bytes
    op_index: int = 0


class Info(msgspec.Struct, frozen=True, gc=False):
    """A remark of the relay about the stream, such as OutdatedCursor. Without seq, never stored."""

    source: str
    name: str
    message: str | None = None


Event: TypeAlias = RepoOp | Identity | Account | Sync


def kind_of(event: Event) -> str:
    """Return the wire JSON `kind`: commit, identity, account or sync."""
    return _KINDS[type(event)]


_KINDS: dict[type, str] = {RepoOp: "commit", Identity: "identity", Account: "account", Sync: "sync"}

_encoder = msgspec.json.Encoder()


def encode_event(event: Event) -> bytes:
    """Encode one event as wire JSON, without a newline.

    It is Jetstream's line plus `source`, `seq` and `op_index`.
    """
    return _encoder.encode(_wire_form(event))


def encode_lines(events: Sequence[Event]) -> bytes:
    """Encode events as wire JSON, one per line, each ended by a newline."""
    return _encoder.encode_lines(map(_wire_form, events))


class _WireCommit(msgspec.Struct, gc=False, omit_defaults=True):
    rev: str
    operation: Operation
    collection: str
    rkey: str
    record: dict[str, JsonValue] | None = None
    cid: str | None = None


class _CommitLine(msgspec.Struct, gc=False):
    did: str
    time_us: int
    kind: str
    source: str
    seq: int
    op_index: int
    commit: _WireCommit


def _wire_form(event: Event) -> _CommitLine | dict[str, Any]:
    did, time_us, source = event.did, event.time_us, event.source
    seq, op_index = event.seq, event.op_index
    if type(event) is RepoOp:  # nearly every event, so in a form that encodes quickly
        commit = _WireCommit(
            event.rev, event.operation, event.collection, event.rkey, event.record, event.cid
        )
        return _CommitLine(did, time_us, "commit", source, seq, op_index, commit)
    kind = _KINDS[type(event)]
    return {
        "did": did,
        "time_us": time_us,
        "kind": kind,
        "source": source,
        "seq": seq,
        "op_index": op_index,
        kind: _account_body(event),
    }


def _account_body(event: Event) -> dict[str, Any]:
    body: dict[str, Any] = {"did": event.did, "seq": event.seq}
    match event:
        case Identity():
            body["time"] = event.time
            if event.handle is not None:
                body["handle"] = event.handle
        case Account():
            body |= {"time": event.time, "active": event.active}
            if event.status is not None:
                body["status"] = event.status
        case Sync():
            blocks = b64encode(event.blocks).decode().rstrip("=")
            body |= {"time": event.time, "rev": event.rev, "blocks": {"$bytes": blocks}}
    return body


class _WireBody(msgspec.Struct):
    """The bodies of identity, account and sync lines together; `kind` says which it is."""

    time: str
    handle: str | None = None
    active: bool | None = None
    status: str | None = None
    rev: str | None = None
    blocks: dict[str, str] | None = None


class _WireLine(msgspec.Struct):
    did: str
    time_us: int
    kind: Literal["commit", "identity", "account", "sync"]
    source: str | None = None
    seq: int | None = None
    op_index: int = 0
    commit: _WireCommit | None = None
    identity: _WireBody | None = None
    account: _WireBody | None = None
    sync: _WireBody | None = None


_decode_wire = msgspec.json.Decoder(_WireLine).decode


def decode_line(line: bytes, source: str, seq: int) -> Event:
    """Decode one line of wire JSON, blueflow's or Jetstream's.

    Args:
        line: one JSON object.
        source: for a line that carries no source and seq of its own.
        seq: likewise.

    Raises:
        msgspec.MsgspecError: not JSON, or not wire JSON.
    """
    try:
        wire = _decode_wire(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
    if wire.source is not None and wire.seq is not None:
        source, seq = wire.source, wire.seq
    did, time_us, op_index = wire.did, wire.time_us, wire.op_index
    if (commit := wire.commit) is not None and wire.kind == "commit":
        return RepoOp(
            source, seq, op_index, did, time_us, commit.rev, commit.operation,
            commit.collection, commit.rkey, commit.cid, commit.record,
        )  # fmt: skip
    if (body := wire.identity) is not None and wire.kind == "identity":
        return Identity(source, seq, did, time_us, body.time, body.handle, op_index)
    if (body := wire.account) is not None and body.active is not None and wire.kind == "account":
        return Account(source, seq, did, time_us, body.time, body.active, body.status, op_index)
    if (body := wire.sync) is not None and body.rev is not None and wire.kind == "sync":
        blocks = _decode_bytes(body.blocks)
        return Sync(source, seq, did, time_us, body.time, body.rev, blocks, op_index)
    raise msgspec.ValidationError(f"a line of kind {wire.kind} without its body")


def _decode_bytes(form: dict[str, str] | None) -> bytes:
    try:
        text = (form or {})["$bytes"]
        return b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (KeyError, ValueError) as error:
        raise msgspec.ValidationError(f"no bytes: {error!r}") from error
