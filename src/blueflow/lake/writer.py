"""`--sink lake:URL`: events straight into a lake, with their position."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import anyio

from blueflow import quantities
from blueflow.errors import InputLostError, InvariantError, OtherSourceError
from blueflow.events import Position, epoch_of, family
from blueflow.interfaces import Sink
from blueflow.lake.address import store_of
from blueflow.lake.describe import describe
from blueflow.lake.keeper import KEEP_FRESH_S, keeper_of
from blueflow.lake.layout import Shard
from blueflow.lake.logrecord import Input, Lost
from blueflow.lake.shard import ShardLog, new_instance
from blueflow.lake.shardwriter import (
    CLOSE_WAIT_S,
    COMMIT_BYTES_MAX,
    COMMIT_INTERVAL_S,
    LATENESS_S,
    ShardWriter,
)
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from blueflow.events import Event
    from blueflow.lake.keeper import Keeper
    from blueflow.lake.s3client import S3Options
    from blueflow.lake.store import Store


_logger = logging.getLogger(__name__)


class LakeWriter(Sink):
    """Writes `URL/fresh/<data set>/year=…/month=…/day=…/hour=…/*.parquet`, by event time in UTC.

    At any moment a glob names whole, committed files, and no event twice.

    Args:
        url: `s3://BUCKET[/PREFIX]` or a folder; made when it is missing.
        origin_source: name of the source that will be written; a pipeline has one.
        simulated: whether the data is made up; the lake is marked, and refuses the other kind.
        pipeline: whose positions these are; a new name starts without one. 1 to 64 letters,
            digits, dots, dashes or underscores.
        s3: endpoint and credentials; by default those of the environment.
        commit_interval_s: age of the oldest uncommitted event (or position) that brings a commit.
        commit_bytes_max: uncommitted wire JSON that brings a commit.
        lateness_s: how long after its end an hour may still get rows.
        keep_fresh_s: how long the files of an hour stay in `fresh/` once `raw/` has them.
        compaction: compact closed hours in the background.
        accept_loss: go on where a lost file cannot be made anew in full.
        metrics: where to count.
        clock: seconds that rise; for the age.
        store: in place of the one that `url` names.

    Raises:
        SettingError: the pipeline's name cannot be one.
    """

    def __init__(  # noqa: PLR0913 - what a deployment may want to differ in
        self,
        url: str | Path,
        *,
        origin_source: str,
        simulated: bool = False,
        pipeline: str = "default",
        s3: S3Options | None = None,
        commit_interval_s: float = COMMIT_INTERVAL_S,
        commit_bytes_max: int = COMMIT_BYTES_MAX,
        lateness_s: float = LATENESS_S,
        keep_fresh_s: float = KEEP_FRESH_S,
        compaction: bool = True,
        accept_loss: bool = False,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
    ) -> None:
        self._metrics = (metrics or Metrics()).lake
        self._store = store or store_of(str(url), s3, self._metrics)
        self._source, self._simulated, self._pipeline = origin_source, simulated, pipeline
        self._accept_loss = accept_loss
        quantities.argument("LakeWriter", "pipeline", pipeline, quantities.label)
        shard, instance = Shard(pipeline), new_instance()
        self._keeper: Keeper | None = None
        if compaction:
            self._keeper = keeper_of(
                self._store,
                shard,
                lateness_s=lateness_s,
                keep_fresh_s=keep_fresh_s,
                commit_interval_s=commit_interval_s,
                instance=instance,
                metrics=self._metrics,
            )
        self._keeping: asyncio.Task[None] | None = None
        log = ShardLog(self._store, shard, reads="source", instance=instance, clock=time.time)
        self._writer = ShardWriter(
            log,
            self._metrics,
            commit_interval_s=commit_interval_s,
            commit_bytes_max=commit_bytes_max,
            lateness_s=lateness_s,
            accept_loss=accept_loss,
            clock=clock,
        )

    async def resume(self) -> Mapping[str, Position]:
        """Take the lake's shard over, complete the last commit, return the pipeline's positions.

        A file whose upload the store has forgotten is made anew: the positions are then before it.

        Raises:
            StoreUnavailableError, StoreLoginError, BucketError, StoreUnfitError: the store.
            OutputNotWritableError, OutputIOError: the folder.
            OtherSourceError: the lake holds another source, or simulated and live would mix.
            InputLostError: a lost file cannot be made anew in full.
            CommitLogError: the log is damaged or incomplete.
            LakeFencedError: another process takes over again and again.
        """
        await self._store.open(create=True)
        await describe(self._store, simulated=self._simulated)
        inputs = await self._writer.begin(self._check)
        self._give_up_epochs(inputs)
        if self._keeper is not None:
            self._keeping = asyncio.create_task(self._keeper.run(), name="lake keeper")
        return self.durable

    def _check(self, inputs: Mapping[str, Input]) -> None:
        stored = sorted({family(name) for name in inputs})
        if stored and stored != [family(self._source)]:
            where = f" (pipeline {self._pipeline!r})"
            what = f"events of {', '.join(stored)}{where}"
            raise OtherSourceError(self._store.url, what, f"those of {self._source}")

    def _give_up_epochs(self, inputs: Mapping[str, Input]) -> None:
        """Files are made anew from the newest epoch only: nobody sends the others any more."""
        newest = max(inputs, key=epoch_of, default="")
        for name, again in list(self._writer.again.items()):
            if name != newest:
                why = f"the relay has begun anew as {newest}"
                lost = Lost(name, again.since.next + 1, again.until.next + 1, why)
                if not self._accept_loss:
                    raise InputLostError(lost.input, lost.first, lost.end, lost.why)
                extra = {"input": name, "first": lost.first, "end": lost.end, "why": why}
                _logger.warning("input is lost, and that is accepted", extra=extra)
                self._writer.give_up(name)

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        """Take events; waits while a commit runs and as much as one holds is waiting already.

        Cancelled, it has taken nothing.

        Raises:
            BlueflowError: a commit failed, now or since the last call.
        """
        if family(through.source) != family(self._source):
            raise InvariantError(f"the lake of {self._source} gets no events of {through.source}")
        if self._keeping is not None and self._keeping.done():
            self._keeping.result()  # it ends only with a broken promise
        await self._writer.room()
        after = Input(through.seq, through.time_us)
        self._writer.add_events(through.source, events, after)
        self._writer.expect_nothing_before(through.time_us)
        await self._writer.commit_if_due()

    async def flush(self) -> None:
        """Return when everything written is durable and visible; raises what `write` raises."""
        await self._writer.flush()

    @property
    def durable(self) -> Mapping[str, Position]:
        """The positions of the last commit."""
        since = {name: again.since for name, again in self._writer.again.items()}
        inputs = {**self._writer.committed, **since}
        return {name: Position(name, one.next, one.time_us) for name, one in inputs.items()}

    async def close(self) -> None:
        """Give up what is not committed, and disconnect."""
        try:
            if self._keeping is not None:
                self._keeping.cancel()
                with anyio.move_on_after(CLOSE_WAIT_S, shield=True):
                    await asyncio.wait([self._keeping])
            await self._writer.close()
        finally:
            await self._store.close()
