"""`--sink jsonl:DIR`: compressed wire JSON in a folder, committed with its position."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from blueflow.files.disk import Disk
from blueflow.files.folder import JsonlFolder
from blueflow.files.worker import Worker
from blueflow.interfaces import Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from blueflow.events import Event, Position

COMMIT_INTERVAL_S: Final = 60.0
COMMIT_BYTES_MAX: Final = 64 * 1024 * 1024
CLOSE_WAIT_S: Final = 5.0  # half of what a stop may take in all

_logger = logging.getLogger(__name__)


class JsonlSink(Sink):
    """Writes `DIRECTORY/<data set>/hour=YYYY-MM-DDTHH/<commit>.jsonl.zst`, by event time in UTC.

    At any moment `DIRECTORY/*/hour=*/*.jsonl.zst` names whole, committed segments, and no event
    twice. Events of one account keep their order within a data set.

    Args:
        directory: made when it is missing; its parent must exist.
        origin_source: name of the source that will be written; a folder has one per pipeline.
        simulated: whether the data is made up; the folder is marked, and refuses the other kind.
        pipeline: whose positions these are; a new name starts without one.
        commit_interval_s: age of the oldest uncommitted event (or position) that brings a commit.
        commit_bytes_max: uncommitted wire JSON that brings a commit; a larger batch is one commit.
        clock: seconds that rise; for the age.
        disk: the calls that touch the file system.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        origin_source: str,
        simulated: bool,
        pipeline: str = "default",
        commit_interval_s: float = COMMIT_INTERVAL_S,
        commit_bytes_max: int = COMMIT_BYTES_MAX,
        clock: Callable[[], float] = time.monotonic,
        disk: Disk | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._folder = JsonlFolder(
            self.directory,
            disk or Disk(),
            pipeline=pipeline,
            source=origin_source,
            simulated=simulated,
        )
        self._commit_interval_s, self._commit_bytes_max = commit_interval_s, commit_bytes_max
        self._clock = clock
        self._dirty_since_s: float | None = None
        self._worker = Worker(f"jsonl {directory}")

    async def resume(self) -> Mapping[str, Position]:
        """Lock the folder, complete the last commit, and return the pipeline's positions.

        Raises:
            OutputNotWritableError: the folder cannot be made, or the file system knows no links.
            OutputLockedError: another writer is at work.
            OtherSourceError: the folder holds another source, or simulated and live would mix.
            CommitLogError: the log or a segment of the last commit is damaged.
            OutputIOError: the disk failed.
        """
        return await self._worker.run(self._folder.open)

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        """Take events; commits when the oldest uncommitted ones are old or many.

        Cancelled, it may have taken the events with their position, or neither: a cancelled sink is
        flushed or closed, and never given the same events again.

        Raises:
            OutputIOError: the disk failed or is full.
            OutputLockedError, CommitLogError: somebody else changed the folder.
        """
        await self._worker.run(partial(self._take, events, through))

    async def flush(self) -> None:
        """Commit what was written; raises what `write` raises."""
        await self._worker.run(self._commit)

    @property
    def durable(self) -> Mapping[str, Position]:
        """The positions of the last commit."""
        return self._folder.durable

    async def close(self) -> None:
        """Give up what is not committed and unlock the folder; waits 5 s for a slow disk."""
        with anyio.CancelScope(shield=True):
            if not await self._worker.close(self._folder.close, wait_s=CLOSE_WAIT_S):
                _logger.warning(
                    "the disk does not answer; the lock goes with the process",
                    extra={"directory": str(self.directory), "waited_s": CLOSE_WAIT_S},
                )

    def _take(self, events: Sequence[Event], through: Position) -> None:
        folder, now_s = self._folder, self._clock()
        folder.take(events, through)
        if self._dirty_since_s is None and folder.dirty:
            self._dirty_since_s = now_s
        if self._dirty_since_s is not None and (
            now_s - self._dirty_since_s >= self._commit_interval_s
            or folder.uncommitted_bytes >= self._commit_bytes_max
            or folder.full
        ):
            self._commit()

    def _commit(self) -> None:
        self._folder.commit()
        self._dirty_since_s = None
