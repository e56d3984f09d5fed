"""Making and finishing one version of an hour."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Final

import anyio
from anyio.to_thread import run_sync

from blueflow.errors import BlueflowError, CompactionError, UploadGoneError
from blueflow.files.disk import output_error
from blueflow.lake.hours import cumulative_marker
from blueflow.lake.layout import hour_key, marker_key, raw_key
from blueflow.lake.logrecord import HourRecord, LakeFile, encode
from blueflow.lake.merge import Merge
from blueflow.lake.survey import hour_records

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from blueflow.lake.hours import Hour
    from blueflow.lake.logrecord import Staged
    from blueflow.lake.merge import Part
    from blueflow.lake.store import Store

FILE_BYTES_MAX: Final = 224 * 2**20  # a row group more is still below 256 MiB
_FETCHES_AT_ONCE: Final = 4
_ABORT_LIMIT_S: Final = 10.0


class Versions:
    """Adds versions to the hours of a lake.

    Args:
        store: holds the lake.
        instance: who we are, for the records.
        clock: seconds since 1970.
        file_bytes_max: of a file in `raw/`.
        folder: for temporary files; None: the system's.
    """

    def __init__(
        self,
        store: Store,
        instance: str,
        *,
        clock: Callable[[], float],
        file_bytes_max: int,
        folder: Path | None,
    ) -> None:
        self._store, self._instance, self._clock = store, instance, clock
        self._file_bytes_max, self._folder = file_bytes_max, folder

    async def add(
        self,
        hour: Hour,
        records: Sequence[HourRecord],
        inputs: Sequence[str],
        through: dict[str, int],
    ) -> bool:
        """Add a version with the rows of `inputs`; False: another compactor was faster.

        Args:
            hour: whose.
            records: all of its log; the last one is finished.
            inputs: keys in `fresh/` that no record names.
            through: the last record of every shard's log that was looked at.
        """
        version = len(records) + 1
        outputs: list[LakeFile] = []
        try:
            if inputs:
                async with self._merged(hour, inputs) as parts:
                    for number, part in enumerate(parts, start=1):
                        staged = await self._store.stage(raw_key(*hour, version, number), part.path)
                        outputs.append(_file(hour, part, staged))
        except BaseException as error:
            await self._abort(outputs)
            # What vanishes is another's work: it compacted the files or made them expire, and gave
            # our uploads up.
            if isinstance(error, CompactionError | UploadGoneError) and await self._is_decided(
                hour, version
            ):
                return False
            raise
        rows, size = _sums(records)
        record = HourRecord(
            version=version,
            kind="compacted",
            instance=self._instance,
            made_s=self._clock(),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            through=through,
            rows=rows + sum(file.rows for file in outputs),
            bytes=size + sum(file.staged.size for file in outputs),
        )
        # When this fails nobody knows whether it was written: then the uploads stay, for whoever
        # finishes it, or for the janitor.
        if not await self._store.put_new(hour_key(*hour, version), encode(record)):
            await self._abort(outputs)
            return False
        await self.finish(hour, [*records, record])
        return True

    async def finish(self, hour: Hour, records: Sequence[HourRecord]) -> None:
        """Complete the last version's outputs and write its marker; done again it changes nothing.

        Args:
            hour: whose.
            records: all of its log.

        Raises:
            CompactionError: an upload is gone, and so are the inputs to make it anew from.
            BlueflowError: what the store raises.
        """
        record = records[-1]
        gone = [file for file in record.outputs if not await self._complete(file.staged)]
        if gone:
            if await self._is_decided(hour, record.version + 1):
                return
            await self._make_anew(hour, record, gone)
        # A later version means that another one finished this one. To write its marker after it
        # expired would promise files that are gone.
        if await self._is_decided(hour, record.version + 1):
            return
        marker = cumulative_marker(*hour, records, made_s=self._clock())
        if marker is not None:
            await self._store.put_new(marker_key(*hour, record.version), encode(marker))
            await self._take_back_if_expired(hour, record)

    async def _complete(self, staged: Staged) -> bool:
        """Make an output visible; False: its upload is gone.

        One that another compactor made anew may have another size, and is as good.
        """
        try:
            await self._store.complete(staged)
        except UploadGoneError:
            return await self._store.head(staged.key) is not None
        return True

    async def _make_anew(self, hour: Hour, record: HourRecord, gone: Sequence[LakeFile]) -> None:
        """Write outputs again whose upload the store forgot: the same rows under the same keys."""
        cuts = [file.rows for file in record.outputs]
        async with self._merged(hour, record.inputs, cuts) as parts:
            if [part.rows for part in parts] != cuts:
                raise CompactionError(str(hour), "its inputs have other rows than before")
            for file, part in zip(record.outputs, parts, strict=True):
                if file not in gone:
                    continue
                staged = await self._store.stage(file.key, part.path)
                taken = await self._store.head(file.key) is not None
                if taken or await self._is_decided(hour, record.version + 1):
                    await self._store.abort(staged)
                elif not await self._complete(staged):
                    raise UploadGoneError(self._store.url, file.key)

    async def _take_back_if_expired(self, hour: Hour, record: HourRecord) -> None:
        """Undo a marker that came just after another compactor wrote it and its hour expired."""
        if not await self._is_decided(hour, record.version + 1):
            return
        later = (await hour_records(self._store, hour))[record.version :]
        if any(one.kind == "expired" for one in later):
            keys = [file.key for file in record.outputs]
            await self._store.delete([marker_key(*hour, record.version)])
            await self._store.delete(keys)

    async def _is_decided(self, hour: Hour, version: int) -> bool:
        return await self._store.head(hour_key(*hour, version)) is not None

    @asynccontextmanager
    async def _merged(
        self, hour: Hour, keys: Sequence[str], cuts: Sequence[int] | None = None
    ) -> AsyncIterator[list[Part]]:
        """Yield local files with the rows of `keys`, in order. A thread does the work."""
        try:
            temporary = TemporaryDirectory(
                prefix="blueflow-compaction-", dir=self._folder, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise output_error(self._folder or gettempdir(), error) from error
        work: Merge | None = None

        def clean_up() -> None:
            if work is not None:
                work.close()
            temporary.cleanup()

        try:
            folder = Path(temporary.name)
            paths = await fetch(self._store, hour, keys, folder)
            work = await run_sync(
                lambda: Merge(
                    str(hour),
                    hour.dataset,
                    paths,
                    folder,
                    bytes_max=self._file_bytes_max,
                    cuts=cuts,
                )
            )
            while await run_sync(work.step):  # one thread call each, so that it ends soon when told
                pass
            yield await run_sync(work.finish)
        finally:
            with anyio.CancelScope(shield=True):  # local files only
                await run_sync(clean_up)

    async def _abort(self, outputs: Sequence[LakeFile]) -> None:
        """Give up uploads; what cannot be is the janitor's."""
        with anyio.move_on_after(_ABORT_LIMIT_S, shield=True):
            for file in outputs:
                try:
                    await self._store.abort(file.staged)
                except BlueflowError:
                    return


async def fetch(store: Store, hour: Hour, keys: Sequence[str], folder: Path) -> list[Path]:
    """Copy files of an hour into a folder, a few at once; return where they are.

    Raises:
        CompactionError: one is not there.
        OutputIOError: the local disk failed or is full.
        BlueflowError: what the store raises.
    """
    paths = {key: folder / f"input-{number}" for number, key in enumerate(keys)}
    left = iter(paths)
    failures: list[BlueflowError] = []

    async def work() -> None:
        for key in left:
            try:
                data = await store.get(key)
            except BlueflowError as error:
                failures.append(error)
                return
            if data is None:
                failures.append(CompactionError(str(hour), f"{key} is not there"))
                return
            if failures:
                return
            try:
                await run_sync(paths[key].write_bytes, data)
            except OSError as error:
                failures.append(output_error(folder, error))
                return

    async with anyio.create_task_group() as group:
        for _ in range(min(_FETCHES_AT_ONCE, len(paths))):
            group.start_soon(work)
    if failures:
        raise failures[0]
    return list(paths.values())


def _file(hour: Hour, part: Part, staged: Staged) -> LakeFile:
    return LakeFile(*hour, part.rows, part.time_min_us, part.time_max_us, staged)


def _sums(records: Sequence[HourRecord]) -> tuple[int, int]:
    last = records[-1] if records else None
    return (last.rows, last.bytes) if last is not None and last.kind == "compacted" else (0, 0)
