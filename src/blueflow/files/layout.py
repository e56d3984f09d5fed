"""Where an event goes in an output folder, and whose folder it is. Pure: no disk, no clock."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blueflow.errors import CommitLogError, OtherSourceError
from blueflow.events import Position
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SIMULATED_MARK: Final = "SIMULATED-DATA.txt"
SIMULATED_TEXT: Final = (
    "Everything in this folder is simulated data: it was made by blueflow's simulated relay and\n"
    "says nothing about real people. blueflow refuses to add live data here.\n"
)
HOUR_US: Final = 3_600_000_000
_LAST_HOUR: Final = 70_389_527  # 9999-12-31T23: times are claims, a path has four digits for a year
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
    stored = sorted({source_family(name) for name in head.positions.get(pipeline, {})})
    if stored and stored != [source_family(source)]:
        where = f" (pipeline {pipeline!r})"
        raise OtherSourceError(path, f"events of {', '.join(stored)}{where}", f"those of {source}")


def data_kind(*, simulated: bool) -> str:
    """Say what kind of data it is."""
    return "simulated data" if simulated else "live data"


def source_family(name: str) -> str:
    """Return the source's name without its epoch: `host` for `host#2`."""
    return re.sub(r"#\d+\Z", "", name)


def hour_of(time_us: int) -> int:
    """Return the hour of a time as a number, between 1970-01-01T00 (0) and 9999-12-31T23."""
    return min(max(time_us // HOUR_US, 0), _LAST_HOUR)


@lru_cache(maxsize=1024)
def segment_path(dataset: str, hour: int, number: int, part: int) -> str:
    """Return where commit `number` puts its segment of a data set and hour.

    A commit with very many hours closes segments early; a second one of the same hour is `part` 2.
    """
    folder = (_EPOCH + timedelta(hours=hour)).strftime("hour=%Y-%m-%dT%H")
    suffix = "" if part == 1 else f"-{part}"
    return f"{dataset}/{folder}/{number:012d}{suffix}.jsonl.zst"


def holds_segments(names: Mapping[str, Iterable[str]]) -> bool:
    """Tell whether the folders of a root (by name, with the names in them) hold hours of ours."""
    return any(
        inner.startswith("hour=") for dataset in DATASETS for inner in names.get(dataset, ())
    )
