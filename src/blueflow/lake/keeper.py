"""What keeps a lake tidy while it is written."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Final

import anyio

from blueflow.backoff import Backoff
from blueflow.errors import BlueflowError, InvariantError
from blueflow.lake.compaction import Compactor, is_ours
from blueflow.lake.hours import Hour, Limits
from blueflow.lake.janitor import abort_orphans
from blueflow.lake.layout import place_of
from blueflow.logs import Throttle

if TYPE_CHECKING:
    from collections.abc import Callable

    from blueflow.lake.compaction import Round
    from blueflow.lake.layout import Shard
    from blueflow.lake.store import Store
    from blueflow.metrics import LakeMetrics

_log = logging.getLogger(__name__)

EVERY_S: Final = 30.0
COLLECT_S: Final = 600.0
KEEP_FRESH_S: Final = 26 * 3600.0
_EVERY_MIN_S: Final = 0.5
_BACKOFF: Final = Backoff(base_s=30.0, cap_s=600.0)
_DELETES_AT_ONCE: Final = 500


class Keeper:
    """Compacts what is due, removes what is covered, gives up uploads; again and again.

    Several may keep one lake: each hour falls to one of them, and two that do the same work do no
    harm.

    Args:
        store: holds the lake.
        compactor: works on the same lake; its limits are the keeper's.
        metrics: of the lake, if given.
        clock: seconds since 1970.
        every_s: between the beginnings of two turns.
        share: our number from 0, and how many share the work.
    """

    def __init__(
        self,
        store: Store,
        compactor: Compactor,
        *,
        metrics: LakeMetrics | None = None,
        clock: Callable[[], float] = time.time,
        every_s: float = EVERY_S,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._store, self._compactor = store, compactor
        self._metrics, self._clock = metrics, clock
        self._every_s, self._share = every_s, share
        self._remarks = Throttle()

    async def run(self) -> None:
        """Work until cancelled. What fails is logged and tried again, more seldom each time.

        Raises:
            InvariantError: a promise of ours is broken.
        """
        failures = 0
        while True:
            begun_s = anyio.current_time()
            try:
                await self.turn()
            except InvariantError:
                raise
            except BlueflowError as error:
                failures += 1
                self._remark("The keeper of the lake failed; it tries again.", error)
                wait_s = self._every_s + _BACKOFF.delay_s(failures, random.random())  # noqa: S311 - jitter
            else:
                failures = 0
                wait_s = max(0.0, begun_s + self._every_s - anyio.current_time())
            await anyio.sleep(wait_s)

    async def turn(self) -> Round:
        """Do once what there is to do.

        Raises:
            InvariantError: a promise of ours is broken.
            BlueflowError: what the store raises, or a damaged log.
        """
        done = await self._compactor.compact_due(
            self._clock(), ordinal=self._share[0], total=self._share[1]
        )
        for hour, error in done.failed.items():
            self._remark("An hour was not compacted; it is tried again.", error, hour)
        self._count_backlog(done)
        await self._sweep(done)
        if self._share[0] == 0:
            _, left = await abort_orphans(
                self._store, upload_s=self._compactor.limits.upload_s, now_s=self._clock()
            )
            if self._metrics is not None:
                self._metrics.invisible_uploads.set(left)
        return done

    async def _sweep(self, done: Round) -> None:
        """Remove files of `fresh/` whose rows have been in `raw/` for long enough."""
        ours = [key for key in done.plan.sweep if self._is_ours(key)]
        for first in range(0, len(ours), _DELETES_AT_ONCE):
            keys = ours[first : first + _DELETES_AT_ONCE]
            await self._store.delete(keys)
            if self._metrics is not None:
                self._metrics.swept_files.inc(len(keys))

    def _count_backlog(self, done: Round) -> None:
        if self._metrics is not None:
            marked = sum(
                outcome in {"compacted", "finished"}
                for hour, outcome in done.done.items()
                if hour in done.plan.due[: done.plan.unmarked]
            )
            self._metrics.backlog_hours.set(done.plan.unmarked - marked)

    def _is_ours(self, key: str) -> bool:
        place = place_of(key)
        return place is not None and is_ours(Hour(place[1], place[2]), *self._share)

    def _remark(self, sentence: str, error: BlueflowError, hour: Hour | None = None) -> None:
        left_out = self._remarks.admit(self._clock())
        if left_out is not None:
            extra = {"error": str(error), "hour": str(hour or ""), "left_out": left_out}
            _log.warning(sentence, extra=extra)


def keeper_of(
    store: Store,
    shard: Shard,
    *,
    lateness_s: float,
    keep_fresh_s: float,
    commit_interval_s: float,
    instance: str,
    metrics: LakeMetrics | None = None,
) -> Keeper:
    """Return the keeper that works beside a writer, and does its share of all hours.

    Args:
        store: of the writer.
        shard: of the writer.
        lateness_s: how long after its end an hour may still get rows.
        keep_fresh_s: how long the files of an hour stay in `fresh/` once `raw/` has them.
        commit_interval_s: how often it commits; who wants rows sooner wants hours sooner.
        instance: who we are, for the records.
        metrics: of the lake.
    """
    limits = Limits(0, keep_s=keep_fresh_s, collect_s=min(COLLECT_S, 10 * commit_interval_s))
    compactor = Compactor(
        store, lateness_s=lateness_s, instance=instance, metrics=metrics, limits=limits
    )
    share = (shard.ordinal, shard.total)
    every_s = min(EVERY_S, max(_EVERY_MIN_S, commit_interval_s))
    return Keeper(store, compactor, metrics=metrics, every_s=every_s, share=share)
