"""`--sink lake:URL`: events straight into a lake, with their position."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from blueflow.errors import CommitLogError, InvariantError, OtherSourceError
from blueflow.events import Position, family
from blueflow.files.layout import SIMULATED_MARK, SIMULATED_TEXT, data_kind
from blueflow.interfaces import Sink
from blueflow.lake.address import store_of
from blueflow.lake.layout import DESCRIPTION, FRESH, RAW, Shard
from blueflow.lake.logrecord import Description, Input, decode, encode
from blueflow.lake.shard import ShardLog
from blueflow.lake.shardwriter import (
    COMMIT_BYTES_MAX,
    COMMIT_INTERVAL_S,
    LATENESS_S,
    ShardWriter,
)
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.lake.s3 import S3Options
    from blueflow.lake.store import Store

_logger = logging.getLogger(__name__)


class LakeWriter(Sink):
    """Writes `URL/fresh/<data set>/year=…/month=…/day=…/hour=…/*.parquet`, by event time in UTC.

    At any moment a glob names whole, committed files, and no event twice.

    Args:
        url: `s3://BUCKET[/PREFIX]` or a folder; made when it is missing.
        origin_source: name of the source that will be written; a pipeline has one.
        simulated: whether the data is made up; the lake is marked, and refuses the other kind.
        pipeline: whose positions these are; a new name starts without one.
        s3: endpoint and credentials; by default those of the environment.
        commit_interval_s: age of the oldest uncommitted event (or position) that brings a commit.
        commit_bytes_max: uncommitted wire JSON that brings a commit.
        lateness_s: how long after its end an hour may still get rows.
        accept_loss: go on where a lost file cannot be made anew in full.
        metrics: where to count.
        clock: seconds that rise; for the age.
        store: in place of the one that `url` names.
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
        accept_loss: bool = False,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
    ) -> None:
        self._metrics = (metrics or Metrics()).lake
        self._store = store or store_of(str(url), s3, self._metrics)
        self._source, self._simulated, self._pipeline = origin_source, simulated, pipeline
        log = ShardLog(
            self._store, Shard(pipeline), reads="source", instance=new_instance(), clock=time.time
        )
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
            CommitLogError: the log is damaged or incomplete.
            LakeFencedError: another process takes over again and again.
        """
        await self._store.open(create=True)
        await describe(self._store, simulated=self._simulated)
        inputs = await self._writer.begin()
        stored = sorted({family(name) for name in inputs})
        if stored and stored != [family(self._source)]:
            where = f" (pipeline {self._pipeline!r})"
            what = f"events of {', '.join(stored)}{where}"
            raise OtherSourceError(self._store.url, what, f"those of {self._source}")
        return self.durable

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        """Take events; waits while a commit runs and as much as one holds is waiting already.

        Cancelled, it has taken nothing.

        Raises:
            BlueflowError: a commit failed, now or since the last call.
        """
        if family(through.source) != family(self._source):
            raise InvariantError(f"the lake of {self._source} gets no events of {through.source}")
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
        since = {name: before for name, (before, _) in self._writer.again.items()}
        inputs = {**self._writer.committed, **since}
        return {name: Position(name, one.next, one.time_us) for name, one in inputs.items()}

    async def close(self) -> None:
        """Give up what is not committed, and disconnect."""
        try:
            await self._writer.close()
        finally:
            await self._store.close()


def new_instance() -> str:
    """Return a name for this process that no other has, and that tells an operator which it is."""
    return f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(4)})"


async def describe(store: Store, *, simulated: bool) -> None:
    """Make sure that the lake is of our kind; describe it when it is new.

    Raises:
        OtherSourceError: it holds the other kind of data, simulated or live.
        CommitLogError: there are files of a lake, and nothing that says whose.
    """
    data = await store.get(DESCRIPTION)
    if data is None:
        for root in (FRESH, RAW):
            if found := await store.list(f"{root}/", limit=1):
                problem = "it is there, and no _blueflow/lake.json says what it belongs to"
                raise CommitLogError(f"{store.url}/{found[0].key}", problem)
        mine = Description(simulated, time.time())
        if await store.put_new(DESCRIPTION, encode(mine)):
            data = encode(mine)
        else:  # another writer was first
            data = await store.get(DESCRIPTION) or b""
    found_kind = decode(f"{store.url}/{DESCRIPTION}", Description, data).simulated
    if found_kind != simulated:
        there, ours = data_kind(simulated=found_kind), data_kind(simulated=simulated)
        raise OtherSourceError(store.url, there, ours)
    if simulated:
        await store.put_new(SIMULATED_MARK, SIMULATED_TEXT.encode())
