"""The writing end of a shard's log: claim it, publish files, take over what a predecessor left."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from blueflow.errors import (
    BlueflowError,
    CommitLogError,
    InvariantError,
    LakeFencedError,
    OtherSourceError,
    UploadGoneError,
    foremost,
)
from blueflow.lake.claim import claim_after, commit_after, furthest, seal_after
from blueflow.lake.layout import (
    FRESH,
    fresh_key,
    hour_folder,
    hour_log,
    parse_fresh,
    place_of,
    record_key,
)
from blueflow.lake.logrecord import (
    RECORDS_KEPT,
    HourRecord,
    LakeFile,
    ShardRecord,
    decode,
    encode,
)
from blueflow.lake.shardlogs import last_record, last_records

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from blueflow.lake.layout import Shard
    from blueflow.lake.logrecord import Input, Lost, Reads, Staged
    from blueflow.lake.store import Store

_CLAIMS: Final = 50  # each one lost to a process that has just started, or still publishes
_AT_ONCE: Final = 4
_CLEAN_UP_S: Final = 5.0

_logger = logging.getLogger(__name__)


class Made(NamedTuple):
    """A file of the next commit, encoded."""

    dataset: str
    hour: int
    rows: int
    time_min_us: int
    time_max_us: int
    data: bytes


class ShardLog:
    """One process's hold on a shard.

    Args:
        store: open.
        shard: which.
        reads: what kind of input it reads; a pipeline has one kind.
        instance: unique to this process.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        shard: Shard,
        *,
        reads: Reads,
        instance: str,
        clock: Callable[[], float],
    ) -> None:
        self._store, self.shard, self._reads = store, shard, reads
        self._instance, self._clock = instance, clock
        self._last: ShardRecord | None = None
        self._told_of_trim = False

    @property
    def last(self) -> ShardRecord:
        """The last record, which is this process's."""
        if self._last is None:
            raise InvariantError("a shard is claimed before it is used")
        return self._last

    async def claim(
        self, check: Callable[[Mapping[str, Input]], None] | None = None
    ) -> Mapping[str, Input]:
        """Take the shard over, and return how far every input of the pipeline is read.

        Completes what the last record names, or notes in `last.repair` what has to be made anew;
        fences the process before; seals the logs that divide the pipeline in another number.

        Args:
            check: raises when these inputs are not ours to read. Then nothing has changed: who
                starts by mistake does not stop whoever works.

        Raises:
            OtherSourceError: the pipeline reads another kind of input.
            CommitLogError: a log is damaged, or files are newer than it.
            LakeFencedError: other processes claim it again and again.
        """
        await self._check_all(check)
        for _ in range(_CLAIMS):
            before = await last_record(self._store, self.shard)
            if before is not None:
                self._check_kind(before)
                if not await self._is_newest(before):
                    continue
            gone = await self._complete(before)
            claim = claim_after(
                before, gone, instance=self._instance, made_s=self._clock(), reads=self._reads
            )
            if await self._put(claim):
                self._last = claim
                break
        else:
            raise await self._fenced()
        await self._trim()
        await self._abort_left(self.last)
        others = await self._seal_others()
        return furthest([self.last, *others])

    async def publish(
        self,
        made: Sequence[Made],
        inputs: Mapping[str, Input],
        *,
        since: Mapping[str, Input],
        watermark_us: int,
        lost: Sequence[Lost] = (),
        replaces: Sequence[LakeFile] | None = None,
    ) -> ShardRecord:
        """Make files and positions durable and visible together, or neither.

        Args:
            made: one for each data set and hour.
            inputs: how far the inputs are read with them; those that did not move may be left out.
            since: how far they were read before, of the inputs that moved.
            watermark_us: events older than this are not expected any more.
            lost: what was accepted as lost.
            replaces: files of an earlier record that are made anew, in the order of `made`; what
                is still missing then is lost.

        Raises:
            LakeFencedError: another process took over; nothing was published.
            BlueflowError: the store failed; whether it was published is known after a restart.
        """
        last = self.last
        if last.repair is not None and replaces is None:
            raise InvariantError("what is missing is made anew before anything else is published")
        number = last.number + 1
        if replaces is None:
            keys = [fresh_key(self.shard, number, one.dataset, one.hour) for one in made]
        else:
            keys = [file.key for file in replaces]
        staged = await self._stage(keys, made)
        files = [
            LakeFile(one.dataset, one.hour, one.rows, one.time_min_us, one.time_max_us, place)
            for one, place in zip(made, staged, strict=True)
        ]
        record = commit_after(
            last,
            files,
            inputs,
            since=since,
            watermark_us=watermark_us,
            lost=lost,
            instance=self._instance,
            made_s=self._clock(),
        )
        if not await self._put(record):
            await self._abort(staged)
            raise await self._fenced()
        self._last = record
        await _each(
            [
                lambda file=file, one=one: self._make_visible(file, one)  # type: ignore[misc]
                for file, one in zip(files, made, strict=True)
            ]
        )
        await self._trim()
        return record

    async def _make_visible(self, file: LakeFile, made: Made) -> None:
        """Complete an upload; when the store has lost it meanwhile, store it again."""
        try:
            await self._store.complete(file.staged)
        except UploadGoneError:
            newest = await last_record(self._store, self.shard)
            if newest is None or newest.number != self.last.number:
                raise await self._fenced() from None  # it is not ours to make any more
            _logger.warning("an upload is gone and is made again", extra={"key": file.key})
            await self._store.complete(await self._store.stage(file.key, made.data))

    async def _put(self, record: ShardRecord) -> bool:
        return await self._store.put_new(record_key(self.shard, record.number), encode(record))

    async def _stage(self, keys: Sequence[str], made: Sequence[Made]) -> list[Staged]:
        staged: list[Staged] = []
        try:
            await _each(
                [
                    lambda key=key, one=one: self._stage_one(key, one, staged)  # type: ignore[misc]
                    for key, one in zip(keys, made, strict=True)
                ]
            )
        except BaseException:
            await self._abort(staged)
            raise
        by_key = {one.key: one for one in staged}
        return [by_key[key] for key in keys]

    async def _stage_one(self, key: str, made: Made, staged: list[Staged]) -> None:
        try:
            staged.append(await self._store.stage(key, made.data))
        except UploadGoneError:  # whoever took over aborts what we store
            newest = await last_record(self._store, self.shard)
            if newest is not None and newest.number != self.last.number:
                raise await self._fenced() from None
            raise

    async def _abort(self, staged: Sequence[Staged]) -> None:
        """Forget uploads that nobody will complete; what is left is found by the keeper."""
        with anyio.move_on_after(_CLEAN_UP_S, shield=True):
            for one in staged:
                try:
                    await self._store.abort(one)
                except BlueflowError:
                    return

    async def _abort_left(self, claim: ShardRecord) -> None:
        """Forget what processes before us stored and did not publish.

        One that still runs has lost the shard, and finds its upload gone.
        """
        named = {file.staged.upload_id for file in (claim.repair.files if claim.repair else ())}
        for prefix in (f"{FRESH}/", self.shard.log):
            for upload in await self._store.uploads(prefix):
                place = place_of(upload.key)
                name = parse_fresh(place[3]) if place else None
                ours = name.shard == self.shard if name else prefix == self.shard.log
                if ours and upload.upload_id not in named:
                    await self._store.abort(upload)

    async def _complete(self, record: ShardRecord | None) -> list[LakeFile]:
        """Complete what a record names; return the files that have to be made anew."""
        gone: list[LakeFile] = []

        async def complete(file: LakeFile) -> None:
            try:
                await self._store.complete(file.staged)
            except UploadGoneError:
                if not await self._was_compacted(file):
                    gone.append(file)

        if record is not None:
            await _each([lambda file=file: complete(file) for file in record.files])  # type: ignore[misc]
        return sorted(gone, key=lambda file: file.key)

    async def _was_compacted(self, file: LakeFile) -> bool:
        """Tell whether the rows of a file that is not there are in `raw/`, or were expired."""
        for found in await self._store.list(hour_log(file.dataset, file.hour)):
            data = await self._store.get(found.key)
            if data is None:
                continue
            hour = decode(found.key, HourRecord, data)
            if file.key in hour.inputs:
                return True
        return False

    async def _seal_others(self) -> list[ShardRecord]:
        """Seal the logs of other divisions of the pipeline; return all last records but ours."""
        found = await last_records(self._store, self.shard.pipeline)
        found.pop(self.shard, None)
        records = []
        for shard, first in found.items():
            record: ShardRecord | None = first
            while record is not None and shard.total != self.shard.total and record.kind != "seal":
                record = await self._seal(shard, record)
            if record is not None:
                self._check_kind(record)
                records.append(record)
        return records

    async def _seal(self, shard: Shard, last: ShardRecord) -> ShardRecord | None:
        """Try to end another log; return its last record, which may be another's."""
        self._check_whole(shard, last)
        self._check_whole(shard, last, gone=bool(await self._complete(last)))
        record = seal_after(last, instance=self._instance, made_s=self._clock())
        if await self._store.put_new(record_key(shard, record.number), encode(record)):
            extra = {"shard": str(shard), "by": str(self.shard)}
            _logger.warning("another division of the pipeline was ended", extra=extra)
            return record
        return await last_record(self._store, shard)

    async def _fenced(self) -> LakeFencedError:
        newest = await last_record(self._store, self.shard)
        by = "nobody we can name"
        if newest is not None:
            by = newest.instance
            if newest.kind == "seal":
                by += ", with another number of shards,"
        return LakeFencedError(self._store.url, str(self.shard), by)

    async def _check_all(self, check: Callable[[Mapping[str, Input]], None] | None) -> None:
        """Refuse what can be refused before anything is written."""
        last = await last_records(self._store, self.shard.pipeline)
        for shard, record in last.items():
            self._check_kind(record)
            if shard.total != self.shard.total and record.kind != "seal":
                self._check_whole(shard, record)
        if check is not None:
            check(furthest(last.values()))

    def _check_whole(self, shard: Shard, last: ShardRecord, *, gone: bool = False) -> None:
        if gone or last.repair is not None:
            again = f"{shard.ordinal}/{shard.total}"
            problem = f"files of its last record are gone: start --shard {again} once"
            raise CommitLogError(f"{self._store.url}/{shard.log}", problem)

    def _check_kind(self, record: ShardRecord) -> None:
        if record.reads != self._reads:
            kinds = {"source": "what a source sent", "kafka": "what Kafka topics hold"}
            where = f" (pipeline {self.shard.pipeline!r})"
            raise OtherSourceError(
                self._store.url, f"{kinds[record.reads]}{where}", kinds[self._reads]
            )

    async def _is_newest(self, last: ShardRecord) -> bool:
        """Tell whether no file is newer than the last record; False when a newer record is.

        Looks at the hours of the last record and of now only: a lake of years opens as quickly.

        Raises:
            CommitLogError: a file is newer than the log: somebody removed records, and rows would
                come twice.
        """
        now = int(self._clock()) // 3600
        places = {(file.dataset, file.hour) for file in last.files}
        hours = {hour for _, hour in places} | {now, now - 1}
        datasets = {dataset for dataset, _ in places} or {"posts", "likes"}
        for dataset in sorted(datasets):
            for hour in sorted(hours):
                for found in await self._store.list(hour_folder(FRESH, dataset, hour)):
                    place = place_of(found.key)
                    name = parse_fresh(place[3]) if place else None
                    if name is None or name.shard != self.shard or name.number <= last.number:
                        continue
                    newest = await last_record(self._store, self.shard)
                    if newest is not None and newest.number >= name.number:
                        return False  # whoever writes still has published it just now
                    problem = f"it is of record {name.number}, and the last is {last.number}"
                    raise CommitLogError(f"{self._store.url}/{found.key}", problem)
        return True

    async def _trim(self) -> None:
        """Remove records too old to be of use: ours, and that of a process that ended before it."""
        number = self.last.number - RECORDS_KEPT
        old = [one for one in (number - 1, number) if one > 0]
        if not old:
            return
        try:
            await self._store.delete([record_key(self.shard, number) for number in old])
        except BlueflowError as error:  # what was put is put
            if not self._told_of_trim:
                self._told_of_trim = True
                extra = {"shard": str(self.shard), "error": str(error)}
                _logger.warning("old records of a log cannot be removed", extra=extra)


def new_instance() -> str:
    """Return a name for this process that no other has, and that tells an operator which it is."""
    return f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(4)})"


async def _each(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Do all calls, a few at once; the first error ends the others and is raised alone."""
    limit = anyio.CapacityLimiter(_AT_ONCE)

    async def call(one: Callable[[], Awaitable[None]]) -> None:
        async with limit:
            await one()

    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            for one in calls:
                tasks.start_soon(call, one)
    except BaseExceptionGroup as group:
        failure = foremost(group)
    if failure is not None:
        raise failure
