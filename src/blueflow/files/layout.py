"""Where an event goes in an output folder, and whose folder it is. Pure: no disk, no clock."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blueflow.errors import CommitLogError, OtherSourceError
from blueflow.events import Position, family
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SIMULATED_MARK: Final = "SIMULATED-DATA.txt"
SIMULATED_TEXT: Final = (
    "Everything in this folder is simulated data: it was made by blueflow's simulated relay and\n"
    "says nothing about real people. blueflow refuses to add live data here.\n"
)
HOUR_US: Final = 3_600_000_000
_LAST_HOUR: Final = 70_389_527  # 9999-12-31T23: times are claims, a path has four digits for a year
_HOURS_BACK_US: Final = 48 * HOUR_US  # a relay that was down sends what it kept, days at most
_HOURS_AHEAD_US: Final = HOUR_US
_HOURS_LOOKED_AT: Final = 64  # more than the 50 that a commit near the last one can write to
_HOUR_NAME: Final = re.compile(r"hour=\d{4}-\d\d-\d\dT\d\d")
_SEGMENT_NAME: Final = re.compile(r"(\d{12,})(\.p\d{4,})?\.jsonl\.zst")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Head(msgspec.Struct, frozen=True):
    """What a commit says beside its files.

    Attributes:
        pipeline: who wrote it.
        source: the source it wrote, without an epoch.
        simulated: whether the data is made up; the same for the whole folder.
        rows: events in this commit.
        positions: the durable positions of every pipeline of the folder, by pipeline and source.
    """

    pipeline: str
    source: str
    simulated: bool
    rows: int
    positions: dict[str, dict[str, Position]]

    def encode(self) -> dict[str, Any]:
        """Return it as plain values, for the log."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def decode_head(path: str, head: Mapping[str, Any]) -> Head:
    """Read what `Head.encode` gave.

    Raises:
        CommitLogError: it is something else, for example the log of another kind of output.
    """
    try:
        return msgspec.convert(head, Head)
    except msgspec.ValidationError as error:
        raise CommitLogError(path, f"it is no log of a jsonl output ({error})") from error


def check_origin(path: str, head: Head, *, pipeline: str, source: str, simulated: bool) -> None:
    """Refuse to add the events of another source, or to mix simulated with live data.

    An epoch of a source (`bsky.network#2`, after it restarted its sequence) is the same source. A
    pipeline that the folder does not know may bring a source of its own.

    Raises:
        OtherSourceError: the folder's events are not of this run's kind.
    """
    if head.simulated != simulated:
        raise OtherSourceError(
            path, data_kind(simulated=head.simulated), data_kind(simulated=simulated)
        )
    stored = sorted({family(name) for name in head.positions.get(pipeline, {})})
    if stored and stored != [family(source)]:
        where = f" (pipeline {pipeline!r})"
        raise OtherSourceError(path, f"events of {', '.join(stored)}{where}", f"those of {source}")


def data_kind(*, simulated: bool) -> str:
    """Say what kind of data it is."""
    return "simulated data" if simulated else "live data"


def hour_of(time_us: int) -> int:
    """Return the hour of a time as a number, between 1970-01-01T00 (0) and 9999-12-31T23."""
    return min(max(time_us // HOUR_US, 0), _LAST_HOUR)


def hours_of(times_us: Sequence[int], *, before_us: int, through_us: int) -> list[int]:
    """Return the hour that each event of a batch is filed under.

    Times are claims, and one folder an hour for claims spread over years fills a disk with folders.
    A time from 48 h before to 1 h after where the batch begins or ends is believed, so that a jump
    forward leaves both sides their hours; any other goes to the hour of the end.

    Args:
        times_us: of the events, in order; microseconds since 1970.
        before_us: time of the position before the batch; 0 when unknown: the first event's counts.
        through_us: time of the batch's position; 0 when unknown: every time has its own hour.
    """
    if not through_us or not times_us:
        return [hour_of(time_us) for time_us in times_us]
    begin_us = before_us or min(times_us[0], through_us)
    return [
        hour_of(time_us if _near(time_us, begin_us) or _near(time_us, through_us) else through_us)
        for time_us in times_us
    ]


@lru_cache(maxsize=1024)
def segment_path(dataset: str, hour: int, number: int, part: int) -> str:
    """Return where commit `number` puts its segment of a data set and hour.

    A commit with very many hours closes segments early; a second one of the same hour is `part` 2.
    More are not seen: each batch writes an hour once, and one that closes segments is committed.
    Names sort by commit, then part (up to 9999), so reading an hour by name keeps the order.
    """
    folder = (_EPOCH + timedelta(hours=hour)).strftime("hour=%Y-%m-%dT%H")
    suffix = "" if part == 1 else f".p{part:04d}"  # sorts behind ".jsonl"
    return f"{dataset}/{folder}/{number:012d}{suffix}.jsonl.zst"


def holds_segments(names: Mapping[str, Iterable[str]]) -> bool:
    """Tell whether the folders of a root (by name, with the names in them) hold hours of ours."""
    return any(
        inner.startswith("hour=") for dataset in DATASETS for inner in names.get(dataset, ())
    )


def newest_hours(names: Iterable[str]) -> list[str]:
    """Return the newest hours among the names in a data set, at most 64, oldest first."""
    return sorted(name for name in names if _HOUR_NAME.fullmatch(name))[-_HOURS_LOOKED_AT:]


def commit_of(name: str) -> int:
    """Return the number of the commit that a segment's name tells; 0 for other names."""
    match = _SEGMENT_NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _near(time_us: int, reference_us: int) -> bool:
    return -_HOURS_BACK_US <= time_us - reference_us <= _HOURS_AHEAD_US
