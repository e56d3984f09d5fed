"""What rows are made of: the envelope of an operation, and its record as JSON text. A core.

A line of wire JSON is decoded once for its envelope; its record stays the text that it is. Events
are brought into the same form, so that both become columns by the same code.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Raw

from blueflow.events import Account, Identity, Operation, RepoOp, Sync, decode_line
from blueflow.files.layout import HOUR_US

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from blueflow.events import Event

_INT32: Final = range(-(2**31), 2**31)
_INT64: Final = range(-(2**63), 2**63)
_Int32: TypeAlias = Annotated[int, Meta(ge=_INT32.start, le=_INT32.stop - 1)]
_Int64: TypeAlias = Annotated[int, Meta(ge=_INT64.start, le=_INT64.stop - 1)]

AccountEvent: TypeAlias = Identity | Account | Sync


class Commit(msgspec.Struct, gc=False):
    """The operation of a line."""

    rev: str
    operation: Operation
    collection: str
    rkey: str
    record: Raw = Raw()
    cid: str | None = None


class Envelope(msgspec.Struct, gc=False):
    """A line of wire JSON; of other kinds than commit only what all have."""

    did: str
    time_us: _Int64
    kind: Literal["commit", "identity", "account", "sync"]
    source: str
    seq: _Int64
    op_index: _Int32 = 0
    commit: Commit | None = None


class Rejected(msgspec.Struct, frozen=True):
    """What was given and is no event.

    Attributes:
        index: its place in what was given, from 0.
        problem: why, for people.
    """

    index: int
    problem: str


class Part(NamedTuple):
    """Operations, and the record of each as JSON text, empty where there is none."""

    envelopes: list[Envelope]
    records: list[bytes]


class Sorted:
    """Lines or events, sorted by where they go.

    Attributes:
        operations: by collection, and by the time in whole hours since 1970.
        accounts: account-level events.
        rejected: what is no event.
    """

    def __init__(self) -> None:
        self.operations: dict[tuple[str, int], Part] = {}
        self.accounts: list[AccountEvent] = []
        self.rejected: list[Rejected] = []

    def add_lines(self, lines: Sequence[bytes], first: int) -> None:
        """Take in lines; `first` is the index of the first one."""
        try:
            decoded = list(map(_decode, lines))
        except _NO_EVENT:
            envelopes: Iterable[Envelope | None] = map(self._decode, lines, count(first))
        else:
            if self._add_alike(decoded):
                return
            envelopes = decoded
        for index, (line, envelope) in enumerate(zip(lines, envelopes, strict=True), first):
            if envelope is not None:
                try:
                    self._add_line(line, envelope)
                except _NO_EVENT as error:
                    self.rejected.append(Rejected(index, str(error)))

    def add_events(self, events: Iterable[Event]) -> None:
        """Take in events."""
        for index, event in enumerate(events):
            try:
                if type(event) is not RepoOp:
                    self._add_account(event)
                    continue
                _check(event)
                record = b"" if event.record is None else _encode(event.record)
            except _NO_EVENT as error:
                self.rejected.append(Rejected(index, str(error)))
                continue
            part = self._part(event.collection, event.time_us // HOUR_US)
            part.envelopes.append(_envelope(event))
            part.records.append(record)

    def _decode(self, line: bytes, index: int) -> Envelope | None:
        try:
            return _decode(line)
        except _NO_EVENT as error:
            self.rejected.append(Rejected(index, str(error)))
            return None

    def _add_alike(self, envelopes: Sequence[Envelope]) -> bool:
        """Take in operations on one collection in one hour; False when they are something else.

        That is what nearly all lines of a topic are. It does what `_add_line` does, without a step
        of Python's per line where that is possible.
        """
        commits = [envelope.commit for envelope in envelopes if envelope.commit is not None]
        collections = {commit.collection for commit in commits}
        hours = {envelope.time_us // HOUR_US for envelope in envelopes}
        kinds = {envelope.kind for envelope in envelopes}
        if len(commits) < len(envelopes) or kinds != {"commit"}:
            return False
        if len(collections) > 1 or len(hours) > 1:
            return False
        records = [bytes(commit.record) for commit in commits]
        if not {record[:1] for record in records} <= {b"{", b""} or not _all_text(records):
            return False
        for commit in commits:
            commit.record = _NOTHING
        part = self._part(collections.pop(), hours.pop())
        part.envelopes.extend(envelopes)
        part.records.extend(records)
        return True

    def _add_line(self, line: bytes, envelope: Envelope) -> None:
        commit = envelope.commit
        if commit is None or envelope.kind != "commit":
            self._add_account(decode_line(line, envelope.source, envelope.seq))
            return
        record = bytes(commit.record)
        if not record.isascii():
            record.decode()  # msgspec passes over records and does not see bad UTF-8
        if record[:1] != b"{":
            record = _no_record(record)
        commit.record = _NOTHING  # it keeps the whole line
        part = self._part(commit.collection, envelope.time_us // HOUR_US)
        part.envelopes.append(envelope)
        part.records.append(record)

    def _part(self, collection: str, hour: int) -> Part:
        part = self.operations.get((collection, hour))
        if part is None:
            part = self.operations[collection, hour] = Part([], [])
        return part

    def _add_account(self, event: Event) -> None:
        _check(event)
        if not isinstance(event, RepoOp):
            self.accounts.append(event)


# What is raised for what is no event.
_NO_EVENT: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
_NOTHING: Final = Raw()
_decode = msgspec.json.Decoder(Envelope).decode
_encode = msgspec.json.Encoder().encode


def _all_text(records: Iterable[bytes]) -> bool:
    try:
        for record in records:
            if not record.isascii():
                record.decode()
    except UnicodeError:
        return False
    return True


def _no_record(text: bytes) -> bytes:
    if text in (b"", b"null"):
        return b""
    raise msgspec.ValidationError("Expected `object | null` - at `$.commit.record`")


def _check(event: Event) -> None:
    if event.op_index not in _INT32 or event.seq not in _INT64 or event.time_us not in _INT64:
        raise msgspec.ValidationError("a number has no place in its column")


def _envelope(event: RepoOp) -> Envelope:
    commit = Commit(event.rev, event.operation, event.collection, event.rkey, _NOTHING, event.cid)
    return Envelope(
        event.did, event.time_us, "commit", event.source, event.seq, event.op_index, commit
    )
