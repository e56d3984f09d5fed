"""Which hours are closed, and what is to be done with them. Pure: no store, no clock."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import msgspec

from blueflow.errors import InvariantError
from blueflow.lake.layout import FRESH, Shard, end_us, hour_folder, hour_name
from blueflow.lake.logrecord import Marker
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from blueflow.lake.logrecord import HourRecord, ShardRecord

IDLE_S: Final = 26 * 3600.0
"""A log without a record for so long does not hold up the others."""

AHEAD_S: Final = 24 * 3600.0
"""An hour that begins so long after now, and after what is read, had a wrong time: it is closed,
for nobody would ever close it."""

Why: TypeAlias = Literal["open", "missing_log", "repair", "invisible_file", "collecting"]


class Hour(NamedTuple):
    """A dataset's hour; hours are counted from 1970."""

    dataset: str
    hour: int

    def __str__(self) -> str:
        return f"{self.dataset}/{hour_name(self.hour)}"


class HourFiles(msgspec.Struct, frozen=True):
    """What is visible of a dataset's hour.

    Attributes:
        fresh: when each of our files in `fresh/` was stored, by key; seconds since 1970.
        marker: the newest one.
    """

    fresh: dict[str, float] = {}
    marker: Marker | None = None

    def uncovered(self, hour: Hour) -> list[str]:
        """Return the keys in `fresh/` that the marker does not cover; all of them without one."""
        covered = self.covered(hour)
        return sorted(key for key in self.fresh if key not in covered)

    def covered(self, hour: Hour) -> set[str]:
        """Return the keys in `fresh/` that the marker covers, removed or not."""
        folder = hour_folder(FRESH, hour.dataset, hour.hour)
        return {folder + name for name in self.marker.covers} if self.marker else set()


class Limits(NamedTuple):
    """What decides when.

    Attributes:
        lateness_us: how long after its end an hour waits for rows, in event time.
        idle_s: a log without a record for so long holds up nothing.
        collect_s: how long late files wait for others, so that a trickle makes few files; readers
            see them meanwhile.
        keep_s: how long files in `fresh/` stay after the marker that covers them.
        upload_s: an upload that no log names and nobody completed for so long is given up.
        work_s: how long the work on one dataset's hour may take.
    """

    lateness_us: int
    idle_s: float = IDLE_S
    collect_s: float = 600.0
    keep_s: float = 26 * 3600.0
    upload_s: float = 24 * 3600.0
    work_s: float = 1800.0


class Plan(msgspec.Struct, frozen=True):
    """What is to be done.

    Attributes:
        due: what has to be compacted: first what has no marker, oldest hour first, then what has
            late rows.
        waiting: what will have to be, and why not now.
        unmarked: how many of the due ones have no marker yet.
        sweep: keys in `fresh/` whose time is over.
    """

    due: tuple[Hour, ...]
    waiting: dict[Hour, Why]
    unmarked: int
    sweep: tuple[str, ...]


def plan(
    last: Mapping[Shard, ShardRecord],
    found: Mapping[Hour, HourFiles],
    limits: Limits,
    *,
    now_s: float,
) -> Plan:
    """Decide what to do.

    An hour with a file in `fresh/` of any dataset gets a marker in every dataset. The caller reads
    `last` first and lists the files then: only so is a file of an older record never overlooked.

    Args:
        last: the last record of every log.
        found: what is visible, of every dataset's hour with a file in `fresh/` or a marker.
        limits: what decides when.
        now_s: seconds since 1970.
    """
    active = active_records(last, limits.idle_s, now_s)
    holds_all: Why | None = "missing_log" if _a_log_is_missing(active, last) else None
    latest_s = max((now_s, *(record.watermark_us / 1e6 for record in active.values())))
    unmarked: list[Hour] = []
    late: list[Hour] = []
    waiting: dict[Hour, Why] = {}
    for hour in _wanted(found):
        files = found.get(hour, HourFiles())
        uncovered = files.uncovered(hour)
        if files.marker is not None and not uncovered:
            continue
        why = holds_all
        ahead = hour.hour * 3600 > latest_s + AHEAD_S
        if not ahead and not is_closed(hour.hour, active.values(), limits.lateness_us):
            why = "open"
        why = why or why_blocked(hour, active.values(), files.covered(hour).union(files.fresh))
        if files.marker is not None and not why:
            oldest_s = min(files.fresh[key] for key in uncovered)
            why = "collecting" if now_s < oldest_s + limits.collect_s else None
        if why:
            waiting[hour] = why
        else:
            (late if files.marker else unmarked).append(hour)
    return Plan(
        due=(*unmarked, *late),
        waiting=waiting,
        unmarked=len(unmarked),
        sweep=tuple(_swept(found, limits.keep_s, now_s)),
    )


def active_records(
    last: Mapping[Shard, ShardRecord], idle_s: float, now_s: float
) -> dict[Shard, ShardRecord]:
    """Return the last records of the logs that count: not sealed, and not idle for `idle_s`."""
    return {
        shard: record
        for shard, record in last.items()
        if record.kind != "seal" and record.made_s > now_s - idle_s
    }


def why_blocked(hour: Hour, active: Iterable[ShardRecord], known: Container[str]) -> Why | None:
    """Return why files of an hour are still to come that a log names already; None: none are.

    Args:
        hour: whose.
        active: the last records of the logs that count.
        known: the keys that are visible or were compacted.
    """
    why: Why | None = None
    for record in active:
        if record.repair and any((f.dataset, f.hour) == hour for f in record.repair.files):
            return "repair"
        if any((f.dataset, f.hour) == hour and f.key not in known for f in record.files):
            why = "invisible_file"
    return why


def is_closed(hour: int, active: Iterable[ShardRecord], lateness_us: int) -> bool:
    """Tell whether no row of an hour is expected any more.

    Args:
        hour: hours since 1970.
        active: the last records of the logs that count.
        lateness_us: how long after its end rows are still waited for, in event time.
    """
    return all(record.watermark_us >= end_us(hour) + lateness_us for record in active)


def cumulative_marker(
    dataset: str, hour: int, records: Sequence[HourRecord], *, made_s: float
) -> Marker | None:
    """Return the marker of the last of an hour's records; None when that made it expire.

    Args:
        dataset: which.
        hour: hours since 1970.
        records: all of the hour, by version.
        made_s: seconds since 1970.

    Raises:
        InvariantError: a record says something else about the sums.
    """
    rows = size = 0
    files: list[str] = []
    covers: list[str] = []
    for version, record in enumerate(records, start=1):
        if record.version != version:
            raise InvariantError(f"{Hour(dataset, hour)}: no gap before version {record.version}")
        if record.kind == "expired":
            rows = size = 0
            files, covers = [], []
            continue
        rows += sum(file.rows for file in record.outputs)
        size += sum(file.staged.size for file in record.outputs)
        files += (_name(file.key) for file in record.outputs)
        covers += map(_name, record.inputs)
        if (rows, size) != (record.rows, record.bytes):
            raise InvariantError(f"{Hour(dataset, hour)}: version {version} adds up")
    if not records or records[-1].kind == "expired":
        return None
    return Marker(
        dataset=dataset,
        hour=hour_name(hour),
        version=len(records),
        made_s=made_s,
        rows=rows,
        bytes=size,
        files=tuple(files),
        covers=tuple(covers),
    )


def _a_log_is_missing(
    active: Mapping[Shard, ShardRecord], last: Mapping[Shard, ShardRecord]
) -> bool:
    """Tell whether a shard has yet to begin whose siblings work.

    An idle log has begun. A sealed one has not begun again: what it read before is nobody's until
    it does, or until its siblings are sealed as well.
    """
    begun = {shard for shard, record in last.items() if record.kind != "seal"}
    divisions = {(shard.pipeline, shard.total) for shard in active}
    return any(
        Shard(pipeline, ordinal, total) not in begun
        for pipeline, total in divisions
        for ordinal in range(total)
    )


def _wanted(found: Mapping[Hour, HourFiles]) -> Iterator[Hour]:
    """Yield every dataset of each hour that has a file in `fresh/`, oldest hour first."""
    for hour in sorted({hour.hour for hour, files in found.items() if files.fresh}):
        yield from (Hour(dataset, hour) for dataset in DATASETS)


def _swept(found: Mapping[Hour, HourFiles], keep_s: float, now_s: float) -> Iterator[str]:
    """Yield what goes; nothing of an hour that lacks a marker, or that dataset would get none."""
    in_order = sorted(_wanted(found), key=lambda one: one.hour)
    for _, group in groupby(in_order, key=lambda one: one.hour):
        datasets = [(hour, found.get(hour, HourFiles())) for hour in group]
        if any(files.marker is None for _, files in datasets):
            continue
        for hour, files in datasets:
            if files.marker is not None and now_s >= files.marker.made_s + keep_s:
                yield from sorted(files.covered(hour).intersection(files.fresh))


def _name(key: str) -> str:
    return key.rpartition("/")[2]
