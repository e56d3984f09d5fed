"""Frames to events: what each message means, what to skip, what to reject, and where the cursor is.

A core: no I/O, no clock. The shell feeds messages in the order received and takes batches out. What
runs per frame is flat and tests before it types: most frames of a filtered stream are not wanted.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec

from blueflow.cursor import NEXT, SKIP, Sequence
from blueflow.errors import FrameError
from blueflow.events import Account, Event, Identity, Info, Position, Sync
from blueflow.interfaces import Batch, Rejected
from blueflow.operations import Check, CommitReader
from blueflow.wanted import Wanted
from blueflow.wire.frame import (
    COMMIT,
    OTHER_MESSAGES,
    AccountMessage,
    Commit,
    ErrorMessage,
    IdentityMessage,
    InfoMessage,
    SyncMessage,
    read_body,
    read_frame,
)
from blueflow.wire.peek import peek_commit

INFOS_MAX = 100  # between two `take_infos()`
STRIKES_MAX = 8  # bad frames behind one seq that each cost a reconnect; the rest is stepped over
_STRIKES_KEPT = 1024
SEQ_MAX = 2**63 - 1  # the lexicon's integers are signed 64-bit
SYNC_BLOCKS_BYTES_MAX = 10_000  # lexicon com.atproto.sync.subscribeRepos#sync, `blocks`
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_MAX_US = 253_402_300_799_999_999  # the last of the year 9999, in UTC
_DAY_US, _SECOND_US = 86_400_000_000, 1_000_000
_COMMIT_FIELDS = frozenset(Commit.__struct_encode_fields__)
_USUAL_FIELDS = 12  # those that the lexicon requires, and prevData

REJECT_REASONS = (
    "action", "body", "car", "cbor", "frame", "hash", "missing_block", "nesting", "not_a_map",
    "path", "size", "time", "too_big",
)  # fmt: skip
"""Every value that `Rejected.reason` can have: they label metrics."""

__all__ = ["REJECT_REASONS", "Check", "Counts", "Decoder", "Wanted"]


class Counts(msgspec.Struct):
    """What happened to frames beyond the events they gave, since the start of the process."""

    filtered_frames: int = 0  # frames without anything wanted
    unknown_fields: int = 0  # frames with fields newer than this code
    ignored: Counter[str] = msgspec.field(default_factory=Counter)  # unknown "op", "type", "info"


class Decoder:
    """Turns the messages of one relay into batches of events, across connections."""

    def __init__(
        self, source: str, *, after: Position | None, wanted: Wanted, check: Check = "all"
    ) -> None:
        """Begin behind `after`.

        Args:
            source: what events carry as `source`.
            after: the position to resume from; None for a live start.
            wanted: events to deliver; frames without any are not looked into.
            check: which blocks of a frame with wanted operations are compared with the SHA-256 in
                their CID: "all", those "used", or "none".
        """
        self.source = source
        self.sequence = Sequence(after)
        self.counts = Counts()
        self._wanted = wanted
        self._reader = CommitReader(wanted, check)
        self._peek = not wanted.everything
        self._latest: int | bytes = 0
        self._newest_time = b""  # as a frame has it; never newer than the sequence's
        self._strikes: dict[bytes, bool] = {}  # bad frames behind this seq: is it quarantined?
        self._events: list[Event] = []
        self._rejected: list[Rejected] = []
        self._infos: list[Info] = []
        self._frames = self._frame_bytes = 0

    @property
    def position(self) -> Position | None:
        """The position behind everything fed so far."""
        last = self.sequence.last
        return None if last is None else Position(self.source, last, self.sequence.time_us)

    @property
    def latest_time_us(self) -> int:
        """The relay time of the newest frame whose time is believed; 0 before the first."""
        latest = self._latest
        return (
            latest if isinstance(latest, int) else _time_us(latest.decode(errors="replace") + "Z")
        )

    @property
    def wanted(self) -> Wanted:
        """Which events it delivers."""
        return self._wanted

    @property
    def take_ready(self) -> bool:
        """Whether `take()` would hand anything over."""
        return self._frames > 0

    def connected(self) -> None:
        """Note that the next message comes from a new connection, made with our position."""
        self.sequence.connected()

    def new_epoch(self, source: str) -> None:
        """Forget the position: from here on the relay counts anew, under another source name."""
        counts = self.sequence.counts
        self.source = source
        self.sequence = Sequence(None)
        self._newest_time = b""
        self.sequence.counts = counts

    def take(self) -> Batch:
        """Hand over what was decoded since the last call."""
        batch = Batch(
            self._events, self.position, self._frames, self._frame_bytes, tuple(self._rejected)
        )
        self._events, self._rejected = [], []
        self._frames = self._frame_bytes = 0
        return batch

    def take_infos(self) -> list[Info]:
        """Hand over the relay's remarks since the last call."""
        infos, self._infos = self._infos, []
        return infos

    def feed(self, message: bytes | str, now_us: int) -> ErrorMessage | None:
        """Decode one websocket message; `now_us` is our clock.

        Returns:
            The error that the relay sent instead of an event; it closes the connection next.

        Raises:
            FrameError: not a frame, met for the first time behind this seq: reconnect from the
                position. Met again, it is rejected here, and the next message can be fed.
            SequenceResetError: the relay restarted its sequence.
        """
        if not (self._peek and type(message) is bytes and self._skip_unwanted(message, now_us)):
            try:
                frame = read_frame(self.source, message)
                if type(frame) is tuple and type(message) is bytes:
                    self._feed_event(frame[0], frame[1], message, now_us)
                elif type(frame) is ErrorMessage:
                    return frame
                else:
                    self.counts.ignored["op"] += 1
            except FrameError as error:
                self._strike(error, message)
        self._frames += 1
        self._frame_bytes += len(message)
        return None

    def _skip_unwanted(self, message: bytes, now_us: int) -> bool:
        """Step over a frame that certainly holds nothing wanted; False says nothing about it."""
        peeked = peek_commit(message)
        if peeked is None:
            return False
        path, seq, repo, time = peeked
        if self._wanted.path(path, repo):
            return False
        # As text these times are in order, so that only those newer than all have to be understood.
        newer = time > self._newest_time
        time_us = _time_us(time.decode(errors="replace") + "Z") if newer else 0
        sequence = self.sequence
        order = sequence.place(self.source, seq, time_us, now_us)
        if order is NEXT:
            if not newer:
                self._latest = time
            elif 0 < time_us <= sequence.time_us:
                self._latest = self._newest_time = time
            if self._strikes:
                self._strikes.clear()
        if order is not SKIP:
            self.counts.filtered_frames += 1
        return True

    def _strike(self, error: FrameError, message: bytes | str) -> None:
        data = message if isinstance(message, bytes) else message.encode(errors="replace")
        digest, strikes = sha256(data).digest(), self._strikes
        if digest not in strikes and len(strikes) < STRIKES_MAX:
            strikes[digest] = False
            raise error
        if strikes.get(digest):
            return  # it came again with another bad frame's reconnect
        if len(strikes) < _STRIKES_KEPT:
            strikes[digest] = True
        self._reject("frame", error.problem, data)

    def _feed_event(  # noqa: C901 - flat, as it runs for every frame
        self, t: str, body: dict[str, Any], message: bytes, now_us: int
    ) -> None:
        seq = body.get("seq")
        if type(seq) is not int or not 0 <= seq <= SEQ_MAX:
            self._feed_without_seq(t, body, message)
            return
        time_us = _time_us(body.get("time"))
        sequence = self.sequence
        order = sequence.place(self.source, seq, time_us, now_us)
        if order is SKIP:
            return
        if order is NEXT:
            if 0 < time_us <= sequence.time_us:
                self._latest = time_us
            if self._strikes:
                self._strikes.clear()
        is_commit = t == COMMIT
        if is_commit and self._peek and self._wanted.none_of(body):
            self.counts.filtered_frames += 1
        elif not is_commit and t not in OTHER_MESSAGES:
            self.counts.ignored["type"] += 1
        elif not time_us:
            self._reject("time", f"{t} without a usable time", message, seq)
        elif is_commit:
            problems = self._reader.read(body, self.source, seq, time_us, self._events)
            for op_index, reason, detail in problems:
                self._reject(reason, detail, message, seq, op_index)
            if len(body) != _USUAL_FIELDS or "prevData" not in body:
                self.counts.unknown_fields += not _COMMIT_FIELDS.issuperset(body)
        else:
            self._feed_other(t, body, time_us, message)

    def _feed_without_seq(self, t: str, body: dict[str, Any], message: bytes) -> None:
        if t == "#info":
            try:
                info, _ = read_body(body, InfoMessage)
                self._note(Info(self.source, info.name, info.message))
            except msgspec.ValidationError:
                self.counts.ignored["info"] += 1
        elif t == COMMIT or t in OTHER_MESSAGES:
            raise FrameError(self.source, len(message), f"{t} without a usable seq")
        else:
            self.counts.ignored["type"] += 1

    def _feed_other(self, t: str, body: dict[str, Any], time_us: int, message: bytes) -> None:
        source, seq = self.source, body["seq"]
        try:
            typed, unknown = read_body(body, OTHER_MESSAGES[t])
        except msgspec.ValidationError as error:
            self._reject("body", f"{t}: {error}", message, seq)
            return
        if unknown:
            self.counts.unknown_fields += 1
        match typed:
            case IdentityMessage():
                event: Event = Identity(source, seq, typed.did, time_us, typed.time, typed.handle)
            case AccountMessage():
                event = Account(
                    source, seq, typed.did, time_us, typed.time, typed.active, typed.status
                )
            case SyncMessage():
                if len(typed.blocks) > SYNC_BLOCKS_BYTES_MAX:
                    self._reject("size", f"{t}: {len(typed.blocks)} bytes", message, seq)
                    return
                event = Sync(source, seq, typed.did, time_us, typed.time, typed.rev, typed.blocks)
            case InfoMessage():  # an #info with a seq: newer than this code
                self._note(Info(source, typed.name, typed.message))
                return
        if self._wanted.event(event):
            self._events.append(event)
        else:
            self.counts.filtered_frames += 1

    def _note(self, info: Info) -> None:
        if len(self._infos) < INFOS_MAX:
            self._infos.append(info)
        else:  # a relay has no reason to say so much
            self.counts.ignored["info"] += 1

    def _reject(
        self,
        reason: str,
        detail: str,
        message: bytes,
        seq: int | None = None,
        op_index: int | None = None,
    ) -> None:
        after = self.sequence.last
        self._rejected.append(Rejected(self.source, after, seq, op_index, reason, detail, message))


def _time_us(text: object) -> int:
    """Return microseconds since 1970, UTC; 0 when it is no usable time."""
    try:
        moment = datetime.fromisoformat(text)  # type: ignore[arg-type]
        if moment.tzinfo is None:  # the lexicon wants an offset; a bare time can only mean UTC
            moment = moment.replace(tzinfo=UTC)
        since = moment - _EPOCH
    except (TypeError, ValueError, OverflowError):
        return 0
    # Exact, and quicker than a division of the difference by a microsecond.
    time_us = since.days * _DAY_US + since.seconds * _SECOND_US + since.microseconds
    return time_us if 0 < time_us <= _TIME_MAX_US else 0
