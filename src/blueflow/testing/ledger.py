"""The ledger: what the simulated network issued, and the judge of what came out at the other end.

On disk it is JSON lines, one per operation or account-level event, written and flushed before the
event can be sent; a line of a fault says what was done to the stream. Delivered has to equal
issued: nothing missing, nothing twice, nothing invented, and the order kept within each DID.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from blueflow.events import Account, Identity, RepoOp, Sync, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

Delivery: TypeAlias = Literal["required", "allowed", "forbidden"]
SAMPLES_MAX = 10  # per finding: enough to see the pattern, small enough to read


class Entry(msgspec.Struct, frozen=True, tag_field="line", tag="event", omit_defaults=True):
    """One issued operation or account-level event.

    Attributes:
        index: number of the firehose event in the network, from 0.
        delivery: "required"; "forbidden" when it was spoilt so that it has to be quarantined; or
            "allowed" when a consumer may do either (a sound operation in a spoilt commit).
        spoilt: the fault that did it, as in the plan.
    """

    index: int
    seq: int
    op_index: int
    time_us: int
    kind: str
    did: str
    rev: str | None = None
    operation: str | None = None
    collection: str | None = None
    rkey: str | None = None
    cid: str | None = None
    delivery: Delivery = "required"
    spoilt: str | None = None


class Fired(msgspec.Struct, frozen=True, tag_field="line", tag="fault"):
    """A fault of the plan that came to pass."""

    fault: str
    index: int


class Ledger:
    """What was issued, in order.

    Args:
        file: every line is also written to this open binary file and flushed.
    """

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.entries: list[Entry] = []
        self.fired: list[Fired] = []
        self._file = file
        self._encode = msgspec.json.Encoder().encode_lines

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read what a relay wrote; a last line that was cut off by a kill is left out."""
        ledger = cls()
        decode = msgspec.json.Decoder(Entry | Fired).decode
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            match decode(line):
                case Entry() as entry:
                    ledger.entries.append(entry)
                case fired:
                    ledger.fired.append(fired)
        return ledger

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def add(self, entries: Iterable[Entry]) -> None:
        """Note events, before anybody can receive them."""
        fresh = list(entries)
        self.entries += fresh
        self._write(fresh)

    def add_fired(self, fired: Fired) -> None:
        """Note that a fault came to pass."""
        self.fired.append(fired)
        self._write([fired])

    def compare(
        self,
        output: Iterable[Any],
        *,
        after: int | None = None,
        through: int | None = None,
        wanted: Callable[[Entry], bool] | None = None,
    ) -> Verdict:
        """Judge what a consumer delivered.

        Args:
            output: events, or wire JSON as dicts or as lines, in the order of delivery.
            after: only events with a higher seq were asked for (a live start, a cursor).
            through: only events up to this seq can be demanded (the consumer stopped there); what
                came beyond it is judged all the same.
            wanted: which entries were asked for, when the consumer filters.
        """
        judge = _Judge(self.entries, after, wanted)
        for item in output:
            judge.take(_read(item))
        return judge.verdict(through)

    def _write(self, lines: list[Any]) -> None:
        if self._file is not None and lines:
            self._file.write(self._encode(lines))
            self._file.flush()


class Verdict(msgspec.Struct, frozen=True):
    """What the judge found. Each list holds at most 10 samples; `counts` has the full numbers."""

    delivered: int
    demanded: int
    counts: dict[str, int]
    missing: list[str]
    duplicated: list[str]
    unexpected: list[str]
    altered: list[str]
    reordered: list[str]

    @property
    def ok(self) -> bool:
        """Whether delivered equals issued."""
        return not any(self.counts.values())

    def __str__(self) -> str:
        if self.ok:
            return f"delivered = issued: {self.delivered} events, {self.demanded} demanded"
        lines = [f"delivered is not issued: {self.delivered} events, {self.demanded} demanded"]
        for name, count in self.counts.items():
            if count:
                samples = getattr(self, name)
                more = f", and {count - len(samples)} more" if count > len(samples) else ""
                lines.append(f"  {name} ({count}): {'; '.join(samples)}{more}")
        return "\n".join(lines)


_FINDINGS = ("missing", "duplicated", "unexpected", "altered", "reordered")
_Content: TypeAlias = tuple[str | None, ...]  # in the order of `_content`
_Key: TypeAlias = tuple[int, int]  # seq and op_index


class _Judge:
    """Takes what was delivered, one after the other, and finds what is wrong."""

    def __init__(
        self, entries: list[Entry], after: int | None, wanted: Callable[[Entry], bool] | None
    ) -> None:
        self._asked_for = {
            (entry.seq, entry.op_index): entry
            for entry in entries
            if (after is None or entry.seq > after) and (wanted is None or wanted(entry))
        }
        self._counts: Counter[str] = Counter(dict.fromkeys(_FINDINGS, 0))
        self._samples: dict[str, list[str]] = {name: [] for name in _FINDINGS}
        self._seen: set[_Key] = set()
        self._newest: dict[str, tuple[int, int]] = {}  # by DID: place in the order of issue
        self._delivered = 0

    def take(self, event: tuple[_Key, _Content]) -> None:
        """Judge one delivered event."""
        self._delivered += 1
        key, content = event
        entry = self._asked_for.get(key)
        if entry is None:
            self._find("unexpected", f"{_name(key)} was not issued to this consumer")
            return
        if entry.delivery == "forbidden":
            self._find("unexpected", f"{_name(key)} was spoilt by {entry.spoilt}")
        if key in self._seen:
            self._find("duplicated", _name(key))
            return
        self._seen.add(key)
        if content != _content(entry):
            self._find("altered", f"{_name(key)} is {content}, was {_content(entry)}")
        place = (entry.index, entry.op_index)
        newest = self._newest.get(entry.did, place)
        if place < newest:
            self._find("reordered", f"{_name(key)} of {entry.did} came after a later one")
        self._newest[entry.did] = max(place, newest)

    def verdict(self, through: int | None) -> Verdict:
        """Look for what is missing, and sum up."""
        # After a sequence restart seqs do not tell the order, indexes do.
        entries = self._asked_for.values()
        last = max((e.index for e in entries if through is None or e.seq <= through), default=-1)
        if through is not None:
            last = max((e.index for e in entries if e.seq == through), default=last)
        demanded = [
            key
            for key, entry in self._asked_for.items()
            if entry.delivery == "required" and entry.index <= last
        ]
        for key in demanded:
            if key not in self._seen:
                self._find("missing", _name(key))
        return Verdict(self._delivered, len(demanded), dict(self._counts), **self._samples)

    def _find(self, finding: str, sample: str) -> None:
        self._counts[finding] += 1
        if len(self._samples[finding]) < SAMPLES_MAX:
            self._samples[finding].append(sample)


def _read(item: Any) -> tuple[_Key, _Content]:
    if isinstance(item, RepoOp):
        return (item.seq, item.op_index), (
            "commit", item.did, item.rev, item.operation, item.collection, item.rkey, item.cid
        )  # fmt: skip
    if isinstance(item, Identity | Account | Sync):
        rev = item.rev if isinstance(item, Sync) else None
        content = (kind_of(item), item.did, rev, None, None, None, None)
        return (item.seq, item.op_index), content
    if isinstance(item, bytes | str):
        item = msgspec.json.decode(item)
    fields = ("rev", "operation", "collection", "rkey", "cid")
    body = item[item["kind"]]
    return (item["seq"], item["op_index"]), (item["kind"], item["did"], *map(body.get, fields))


def _content(entry: Entry) -> _Content:
    return (
        entry.kind, entry.did, entry.rev, entry.operation, entry.collection, entry.rkey, entry.cid
    )  # fmt: skip


def _name(key: tuple[int, int]) -> str:
    return f"seq {key[0]} op {key[1]}"
