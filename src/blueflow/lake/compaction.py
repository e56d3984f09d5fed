"""Closed hours from `fresh/` into `raw/`, version by version.

A version is decided by its record in the hour's log, written only if its number is free. Before it
everything is invisible and may be given up; after it whoever comes next completes it: the outputs,
then the marker. The next version is written only when the one before has its marker.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias
from zlib import crc32

import anyio
import msgspec

from blueflow.backoff import Backoff
from blueflow.errors import (
    BlueflowError,
    CompactionError,
    InvariantError,
    StoreLoginError,
    StoreUnavailableError,
)
from blueflow.lake.hours import Hour, Limits, Plan, active_records, plan, why_blocked
from blueflow.lake.layout import Shard
from blueflow.lake.logrecord import ShardRecord
from blueflow.lake.shardlogs import last_records
from blueflow.lake.survey import Survey, fresh_files, has_marker, hour_records
from blueflow.lake.versions import FILE_BYTES_MAX, Versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from blueflow.lake.store import Store
    from blueflow.metrics import LakeMetrics

Outcome: TypeAlias = Literal["compacted", "finished", "nothing", "waits", "lost"]
"""compacted: a version was added. finished: one that somebody else had begun. nothing: there were
no new rows. waits: a file is not visible yet. lost: another compactor was faster."""

_RETRY: Final = Backoff(base_s=60.0, cap_s=3600.0)  # of an hour that failed
_OF_ALL: Final = (StoreUnavailableError, StoreLoginError)  # a full disk may have room for others


class Round(msgspec.Struct):
    """What `compact_due` did.

    Attributes:
        plan: what was to be done.
        last: the last records that it was made of.
        done: what became of each hour.
        failed: why the others failed.
    """

    plan: Plan
    last: dict[Shard, ShardRecord]
    done: dict[Hour, Outcome] = {}
    failed: dict[Hour, BlueflowError] = {}


class Compactor:
    """Compacts hours of one lake. Any number may work on the same one.

    Args:
        store: holds the lake.
        lateness_s: how long after its end an hour waits for rows, in event time.
        instance: who we are, for the records.
        metrics: counts and times, if given.
        clock: seconds since 1970.
        limits: the other times that decide; `lateness_s` replaces its own.
        file_bytes_max: of a file in `raw/`; an hour with more is divided into files of like size.
        folder: for temporary files, about twice the size of a dataset's hour; None: the system's.
    """

    def __init__(
        self,
        store: Store,
        *,
        lateness_s: float,
        instance: str,
        metrics: LakeMetrics | None = None,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
        file_bytes_max: int = FILE_BYTES_MAX,
        folder: Path | None = None,
    ) -> None:
        self._store, self._metrics = store, metrics
        lateness_us = round(lateness_s * 1_000_000)
        self.limits = (limits or Limits(0))._replace(lateness_us=lateness_us)
        self._versions = Versions(
            store, instance, clock=clock, file_bytes_max=file_bytes_max, folder=folder
        )
        self._clock = clock
        self._survey = Survey(store)
        self._failures: dict[Hour, tuple[int, float]] = {}  # in a row, and when to try again

    async def compact_due(self, now_s: float, *, ordinal: int = 0, total: int = 1) -> Round:
        """Compact what is due, one hour after the other; an hour that fails stops no other.

        Args:
            now_s: seconds since 1970.
            ordinal: which of the `total` that share the work we are, from 0.
            total: how many do.

        Raises:
            StoreUnavailableError, StoreLoginError: no hour could do better.
            CommitLogError: the log of a shard or a marker is damaged.
            InvariantError: a promise of ours is broken.
        """
        last = await last_records(self._store)  # before the files: see `plan`
        planned = plan(last, await self._survey.look(), self.limits, now_s=now_s)
        result = Round(planned, last)
        self._failures = {
            hour: self._failures[hour] for hour in planned.due if hour in self._failures
        }
        for hour in planned.due:
            failures, again_s = self._failures.get(hour, (0, 0.0))
            if not is_ours(hour, ordinal, total) or now_s < again_s:
                continue
            try:
                result.done[hour] = await self.compact(*hour, last=last)
                self._failures.pop(hour, None)
            except (*_OF_ALL, InvariantError):
                raise
            except BlueflowError as error:
                result.failed[hour] = error
                wait_s = _RETRY.delay_s(failures, random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                self._failures[hour] = failures + 1, now_s + wait_s
        return result

    async def compact(
        self, dataset: str, hour: int, *, last: Mapping[Shard, ShardRecord] | None = None
    ) -> Outcome:
        """Bring an hour's marker up to date, or finish what somebody began; one step per call.

        Whether the hour is closed is the caller's concern: an hour that is not gets more versions.

        Args:
            dataset: which.
            hour: hours since 1970.
            last: the last record of every log, read before this call; None: read them now.

        Raises:
            CompactionError: the hour's files are damaged or missing, or it took too long.
            CommitLogError: its log is damaged.
            InvariantError: its log does not add up.
            BlueflowError: what the store raises.
        """
        begun_s = anyio.current_time()
        try:
            with anyio.fail_after(self.limits.work_s):
                outcome = await self._step(Hour(dataset, hour), last)
        except TimeoutError as error:
            self._count("error")
            problem = f"it was not done in {self.limits.work_s:g} s"
            raise CompactionError(str(Hour(dataset, hour)), problem) from error
        except BlueflowError:
            self._count("error")
            raise
        if outcome in {"compacted", "finished"}:
            self._count("ok")
            if self._metrics is not None:
                self._metrics.compaction_seconds.observe(anyio.current_time() - begun_s)
        return outcome

    async def _step(self, hour: Hour, last: Mapping[Shard, ShardRecord] | None) -> Outcome:
        if last is None:
            last = await last_records(self._store)
        records = await hour_records(self._store, hour)
        ends_compacted = bool(records) and records[-1].kind == "compacted"
        if ends_compacted and not await has_marker(self._store, hour, len(records)):
            await self._versions.finish(hour, records)
            return "finished"
        visible = await fresh_files(self._store, hour)
        named = {key for record in records for key in record.inputs}
        active = active_records(last, self.limits.idle_s, self._clock())
        if why_blocked(hour, active.values(), named.union(visible)):
            return "waits"
        inputs = sorted(visible.keys() - named)
        if ends_compacted and not inputs:
            return "nothing"
        through = {str(shard): record.number for shard, record in sorted(last.items())}
        added = await self._versions.add(hour, records, inputs, through)
        return "compacted" if added else "lost"

    def _count(self, outcome: str) -> None:
        if self._metrics is not None:
            self._metrics.compactions[outcome].inc()


def is_ours(hour: Hour, ordinal: int, total: int) -> bool:
    """Tell whether an hour's work falls to one of those that share it; the same in every process.

    Args:
        hour: whose.
        ordinal: from 0.
        total: how many share.
    """
    return crc32(f"{hour}".encode()) % total == ordinal
