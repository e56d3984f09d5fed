"""The operations of one #commit, and what is wrong with those that cannot be events. A core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from blueflow.errors import CarError, RecordError
from blueflow.events import RepoOp
from blueflow.wire.car import (
    BLOCKS_BYTES_MAX,
    check_root,
    find_block,
    guess_block,
    hash_matches,
    read_car,
)
from blueflow.wire.cid import CID_BYTES, DAG_CBOR_PREFIX, cid_text
from blueflow.wire.frame import OPS_MAX
from blueflow.wire.record import decode_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event
    from blueflow.wanted import Wanted

Check: TypeAlias = Literal["all", "used", "none"]
"""Which blocks of a commit are compared with the SHA-256 in their CID."""


_MISSING = "the record is not among the blocks"
_REPEATED = "with the repeats of its blocks, the commit's records are above what blocks may have"


class Problem(NamedTuple):
    """Why an operation, or a whole commit (`op_index` None), is no event."""

    op_index: int | None
    reason: str
    detail: str


class CommitReader:
    """Reads the wanted operations out of #commit bodies.

    Args:
        wanted: operations to read; the others are passed over.
        check: "all" blocks of a commit with wanted operations, those "used", or "none".
    """

    def __init__(self, wanted: Wanted, check: Check) -> None:
        self._wanted = wanted
        self._everything = wanted.everything
        self._check_all = check == "all"
        self._check_used = check == "used"

    def read(  # noqa: C901, PLR0912, PLR0915 - flat, as it runs for every frame: helpers cost 5 %
        self, body: dict[str, Any], source: str, seq: int, time_us: int, events: list[Event]
    ) -> Sequence[Problem]:
        """Append the operations wanted to `events`; return what is wrong with the others.

        Args:
            body: of a #commit, not checked yet.
            source: for the events.
            seq: likewise.
            time_us: likewise.
            events: where to.
        """
        # By hand and only what is used here: checking every field against the lexicon
        # (`wire.frame.read_body`) costs as much as the CBOR decoder.
        blocks = None
        try:
            did, rev, car, commit = body["repo"], body["rev"], body["blocks"], body["commit"]
            ops = body["ops"]
            if type(did) is not str or type(rev) is not str or type(car) is not bytes:
                return [Problem(None, "body", "#commit: repo, rev or blocks of a wrong type")]
            if len(ops) > OPS_MAX or body.get("tooBig"):
                # Not the value itself: its text may be deeper than what could be decoded.
                flag = "set" if body.get("tooBig") else "not set"
                detail = f"a commit of {len(ops)} operations, tooBig {flag}"
                return [Problem(None, "too_big", detail)]
            if self._check_all:
                blocks = read_car(car, commit)
            else:
                check_root(car, commit)
        except CarError as error:
            return [Problem(None, error.reason, error.problem)]
        except (KeyError, TypeError) as error:
            return [Problem(None, "body", f"#commit: {error!r}")]
        problems: list[Problem] = []
        cid: str | None
        record: dict[str, Any] | None
        everything, wanted = self._everything, self._wanted.collections
        # Equal records share a block, so only repeats can exceed the bound on blocks: without one
        # of their own, a block of 1 MB that 200 operations name takes gigabytes.
        bytes_left = BLOCKS_BYTES_MAX
        for index, op in enumerate(ops):
            try:
                path = op["path"]
                collection, _, rkey = path.partition("/")
                if not everything and not wanted[collection]:
                    continue
                if not rkey or not collection or "/" in rkey:
                    raise RecordError("path", f"path {path[:64]!r}")  # noqa: TRY301 - as below
                action = op["action"]
                if action == "create" or action == "update":  # noqa: PLR1714 - twice as fast
                    link = op["cid"]
                    if link[:4] != DAG_CBOR_PREFIX or len(link) != CID_BYTES:
                        raise RecordError("body", "no CID of DAG-CBOR")  # noqa: TRY301 - as below
                    if blocks is None:
                        record, size = self._find_record(car, link, bytes_left)
                        bytes_left -= size
                    elif (block := blocks.get(link)) is not None:
                        if len(block) > bytes_left:
                            raise RecordError("size", _REPEATED)  # noqa: TRY301 - as below
                        bytes_left -= len(block)
                        record = decode_record(block)
                    else:
                        raise RecordError("missing_block", _MISSING)  # noqa: TRY301 - as below
                    cid = cid_text(link)
                elif action == "delete":
                    cid = record = None
                else:
                    raise RecordError("action", f"action {action[:64]!r}")  # noqa: TRY301 - below
                events.append(
                    RepoOp(
                        source, seq, index, did, time_us, rev, action, collection, rkey, cid, record
                    )
                )
            except (RecordError, CarError) as error:  # one place that says which operation it was
                problems.append(Problem(index, error.reason, error.problem))
            except (KeyError, TypeError, AttributeError) as error:
                problems.append(Problem(index, "body", f"#commit op: {error!r}"))
        return problems

    def _find_record(self, car: bytes, cid: bytes, bytes_left: int) -> tuple[dict[str, Any], int]:
        """Return a record and the length of its block, which is at most `bytes_left`."""
        block: bytes | None = guess_block(car, cid)
        if block and (not self._check_used or hash_matches(cid, block)):
            if len(block) > bytes_left:
                raise RecordError("size", _REPEATED)
            try:
                return decode_record(block), len(block)
            except RecordError:
                pass  # perhaps it was cut wrongly; the walk below knows
        block = find_block(car, cid)
        if block is None:
            raise RecordError("missing_block", _MISSING)
        if len(block) > bytes_left:
            raise RecordError("size", _REPEATED)
        if self._check_used and not hash_matches(cid, block):
            raise RecordError("hash", "the record's block is not what its CID says")
        return decode_record(block), len(block)
