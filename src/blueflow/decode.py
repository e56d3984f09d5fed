"""Frames to events: what each message means, what to skip, what to reject, and where the cursor is.

A core: no I/O, no clock. The shell feeds messages in the order received and takes batches out. What
runs per frame is flat and tests before it types: most frames of a filtered stream are not wanted.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from blueflow.cursor import NEXT, SKIP, Sequence
from blueflow.errors import CarError, FrameError, RecordError
from blueflow.events import Account, Event, Identity, Info, Position, RepoOp, Sync
from blueflow.interfaces import Batch, Rejected
from blueflow.wire.car import find_block, find_blocks, has_root, hash_matches, read_car
from blueflow.wire.cid import cid_text
from blueflow.wire.frame import (
    MESSAGES,
    OPS_MAX,
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
from blueflow.wire.record import decode_record

if TYPE_CHECKING:
    from collections.abc import Collection

    from blueflow.wire.frame import Message

Check: TypeAlias = Literal["all", "used", "none"]

STRIKES_MAX = 8  # bad frames behind one seq that each cost a reconnect; the rest is stepped over
_COLLECTIONS_MAX = 4096
_EPOCH_SECONDS = 1_000_000
_COMMIT_TYPES = (str, str, bytes, bytes, list)
_COMMIT_FIELDS = frozenset(Commit.__struct_encode_fields__)

REJECT_REASONS = (
    "action", "body", "car", "cbor", "frame", "hash", "missing_block", "nesting", "not_a_map",
    "path", "size", "time", "too_big",
)  # fmt: skip
"""Every value that `Rejected.reason` can have: they label metrics."""


class Wanted:
    """Which events the user asked for."""

    def __init__(self, collections: Collection[str] = (), dids: Collection[str] = ()) -> None:
        """Take NSIDs (a trailing `.*` stands for all below) and DIDs; empty means all.

        With `collections`, only repository operations are wanted: identity, account and sync events
        belong to no collection.
        """
        self.everything = not collections and not dids
        self.account_events = not collections
        self._dids = frozenset(dids)
        self._exact = frozenset(name for name in collections if not name.endswith(".*"))
        self._prefixes = tuple(name[:-1] for name in collections if name.endswith(".*"))
        self._verdicts: dict[str, bool] = {}
        self._path_verdicts: dict[bytes, bool] = {}

    def did(self, did: str) -> bool:
        """Tell whether events of this account are wanted."""
        return not self._dids or did in self._dids

    def collection(self, name: str) -> bool:
        """Tell whether operations in this collection are wanted."""
        verdict = self._verdicts.get(name)
        if verdict is None:
            if len(self._verdicts) >= _COLLECTIONS_MAX:  # the names come from strangers
                self._verdicts.clear()
            verdict = self.account_events or name in self._exact or name.startswith(self._prefixes)
            self._verdicts[name] = verdict
        return verdict

    def event(self, event: Event) -> bool:
        """Tell whether this event is wanted."""
        if self.everything:
            return True
        if isinstance(event, RepoOp):
            return self.collection(event.collection) and self.did(event.did)
        return self.account_events and self.did(event.did)

    def path(self, path: bytes, repo: bytes) -> bool:
        """Tell whether operations at this path of this account are wanted; both as in a frame."""
        name = path.partition(b"/")[0]
        verdict = self._path_verdicts.get(name)
        if verdict is None:
            if len(self._path_verdicts) >= _COLLECTIONS_MAX:
                self._path_verdicts.clear()
            verdict = self._path_verdicts[name] = self.collection(name.decode(errors="replace"))
        return verdict and (not self._dids or repo.decode(errors="replace") in self._dids)

    def none_of(self, body: dict[str, Any]) -> bool:
        """Tell whether a #commit, not yet checked, certainly holds nothing wanted."""
        if self._dids and body.get("repo") not in self._dids:
            return True
        collection = self.collection
        try:
            for op in body["ops"]:
                if collection(op["path"].partition("/")[0]):
                    return False
        except (KeyError, TypeError, AttributeError):
            return False  # let the strict way say what is wrong
        return not body.get("tooBig")


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
        self.latest_time_us = 0  # relay time of the newest frame
        self._wanted = wanted
        self._peek = not wanted.everything
        self._check_all = check == "all"
        self._check_used = check == "used"
        self._strikes: set[bytes] = set()
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
        if self._peek and type(message) is bytes and self._skip_unwanted(message, now_us):
            return None
        try:
            frame = read_frame(self.source, message)
            if type(frame) is tuple and type(message) is bytes:
                self._feed_event(frame[0], frame[1], message, now_us)
                self._frames += 1
                self._frame_bytes += len(message)
                return None
        except FrameError as error:
            self._strike(error, message)
            return None
        if type(frame) is ErrorMessage:
            return frame
        self.counts.ignored["op"] += 1
        return None

    def _skip_unwanted(self, message: bytes, now_us: int) -> bool:
        """Step over a frame that certainly holds nothing wanted; False says nothing about it."""
        peeked = peek_commit(message)
        if peeked is None:
            return False
        path, seq, repo, time = peeked
        if self._wanted.path(path, repo):
            return False
        time_us = _time_us(time.decode(errors="replace"))
        if not time_us:
            return False
        if self.sequence.place(self.source, seq, time_us, now_us) is NEXT:
            self.latest_time_us = time_us
            if self._strikes:
                self._strikes.clear()
        self.counts.filtered_frames += 1
        self._frames += 1
        self._frame_bytes += len(message)
        return True

    def _strike(self, error: FrameError, message: bytes | str) -> None:
        data = message if isinstance(message, bytes) else message.encode()
        digest = sha256(data).digest()
        if digest not in self._strikes and len(self._strikes) < STRIKES_MAX:
            self._strikes.add(digest)
            raise error
        self._frames += 1
        self._frame_bytes += len(data)
        self._reject("frame", error.problem, data)

    def _feed_event(self, t: str, body: dict[str, Any], message: bytes, now_us: int) -> None:
        kind = MESSAGES.get(t)
        seq = body.get("seq")
        if type(seq) is not int or seq < 0:
            self._feed_without_seq(t, body, message)
            return
        time_us = _time_us(body.get("time"))
        order = self.sequence.place(self.source, seq, time_us, now_us)
        if order is SKIP:
            return
        if self._strikes and order is NEXT:
            self._strikes.clear()
        if kind is None:
            self.counts.ignored["type"] += 1
            return
        if kind is Commit and not self._wanted.everything and self._wanted.none_of(body):
            self.counts.filtered_frames += 1
            if time_us:
                self.latest_time_us = time_us
            return
        if not time_us:
            self._reject("time", f"{t} without a usable time", message, seq)
            return
        self.latest_time_us = time_us
        if kind is Commit:
            self._feed_commit(body, seq, time_us, message)
        else:
            self._feed_account_event(t, kind, body, time_us, message)

    def _feed_without_seq(self, t: str, body: dict[str, Any], message: bytes) -> None:
        if t == "#info":
            try:
                info, _ = read_body(body, InfoMessage)
                self._infos.append(Info(self.source, info.name, info.message))
            except msgspec.ValidationError:
                self.counts.ignored["info"] += 1
        elif t in MESSAGES:
            raise FrameError(self.source, len(message), f"{t} without a usable seq")
        else:
            self.counts.ignored["type"] += 1

    def _feed_commit(self, body: dict[str, Any], seq: int, time_us: int, message: bytes) -> None:
        # By hand and only what is used here: checking every field against the lexicon
        # (`wire.frame.read_body`) costs as much as the CBOR decoder.
        try:
            did, rev, car, commit = body["repo"], body["rev"], body["blocks"], body["commit"]
            ops: list[dict[str, Any]] = body["ops"]
            if (type(did), type(rev), type(car), type(commit), type(ops)) != _COMMIT_TYPES:
                raise TypeError  # noqa: TRY301
            if len(ops) > OPS_MAX or body.get("tooBig"):
                problem = f"a commit of {len(ops)} operations, tooBig {body.get('tooBig')}"
                self._reject("too_big", problem, message, seq)
                return
            if self._check_all:
                root, blocks = read_car(car)
                sound = root == commit and root in blocks
            else:
                sound, blocks = has_root(car, commit), None
        except CarError as error:
            self._reject(error.reason, error.problem, message, seq)
            return
        except (KeyError, TypeError) as error:
            self._reject("body", f"#commit: {error!r}", message, seq)
            return
        if not sound:
            self._reject("car", "the root is not the commit's block", message, seq)
            return
        if not _COMMIT_FIELDS.issuperset(body):
            self.counts.unknown_fields += 1
        source, wanted = self.source, self._wanted
        everything = wanted.everything
        for index, op in enumerate(ops):
            try:
                path, action = op["path"], op["action"]
                collection, _, rkey = path.partition("/")
                if not everything and not wanted.collection(collection):
                    continue
                if not rkey or not collection:
                    raise RecordError("path", f"path {path[:64]!r}")  # noqa: TRY301
                if action == "delete":
                    cid = record = None
                else:
                    link = op["cid"]
                    if blocks is not None:
                        record = decode_record(blocks[link])
                    else:
                        record = self._find_record(car, link)
                    cid = cid_text(link)
                    if action != "create" and action != "update":  # noqa: PLR1714 - twice as fast
                        raise RecordError("action", f"action {action[:64]!r}")  # noqa: TRY301
            except RecordError as error:
                self._reject(error.reason, error.problem, message, seq, index)
                continue
            except KeyError:
                problem = "the record is not among the blocks"
                self._reject("missing_block", problem, message, seq, index)
                continue
            except (TypeError, AttributeError, ValueError) as error:
                self._reject("body", f"#commit op: {error!r}", message, seq, index)
                continue
            self._events.append(
                RepoOp(
                    source, seq, index, did, time_us, rev, action, collection, rkey, cid, record
                )  # fmt: skip
            )

    def _find_record(self, car: bytes, cid: bytes) -> dict[str, Any]:
        block = find_block(car, cid)
        if block is not None and (not self._check_used or hash_matches(cid, block)):
            try:
                return decode_record(block)
            except RecordError:
                pass  # perhaps it was cut wrongly
        reason, problem = "missing_block", "the record is not among the blocks"
        for block in find_blocks(car, cid):
            if self._check_used and not hash_matches(cid, block):
                reason, problem = "hash", "the record's block is not what its CID says"
                continue
            try:
                return decode_record(block)
            except RecordError as error:
                reason, problem = error.reason, error.problem
        raise RecordError(reason, problem)

    def _feed_account_event(
        self, t: str, kind: type[Message], body: dict[str, Any], time_us: int, message: bytes
    ) -> None:
        source, seq = self.source, body["seq"]
        try:
            typed, unknown = read_body(body, kind)
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
                event = Sync(source, seq, typed.did, time_us, typed.time, typed.rev, typed.blocks)
            case InfoMessage():  # an #info with a seq: newer than this code
                self._infos.append(Info(source, typed.name, typed.message))
                return
            case _:
                return
        if self._wanted.account_events and self._wanted.did(event.did):
            self._events.append(event)
        else:
            self.counts.filtered_frames += 1

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
        return int(moment.timestamp() * _EPOCH_SECONDS + 0.5)
    except (TypeError, ValueError, OverflowError):
        return 0
