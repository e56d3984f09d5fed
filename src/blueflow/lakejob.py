"""What the verbs of `blueflow lake` do, and how they say it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blueflow.errors import Exit, MissingExtraError, SettingError
from blueflow.factory import s3_of

try:
    from blueflow.lake.address import store_of
    from blueflow.lake.compaction import Compactor
    from blueflow.lake.expiry import expire
    from blueflow.lake.hours import Limits
    from blueflow.lake.joined import Joined, open_to_read
    from blueflow.lake.keeper import Keeper
    from blueflow.lake.layout import hour_name
    from blueflow.lake.reading import files_of
    from blueflow.lake.shard import new_instance
    from blueflow.lake.span import Span
    from blueflow.lake.statistics import count
    from blueflow.lake.verify import verify
except ModuleNotFoundError as error:
    if (error.name or "blueflow").startswith("blueflow"):
        raise
    raise MissingExtraError("lake", "lakes") from error
from blueflow.records import DATASETS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Mapping

    from blueflow.lake.logrecord import Description
    from blueflow.lake.store import Store
    from blueflow.settings import Settings

_MANY: Final = 10  # hours that wait are named up to here


class Job:
    """One verb over one lake.

    Args:
        store: an open one that holds the lake.
        description: what the lake says of itself.
        args: of the command.
        settings: of the process.
    """

    def __init__(
        self, store: Store, description: Description, args: argparse.Namespace, settings: Settings
    ) -> None:
        self._store, self._description = store, description
        self._args, self._settings = args, settings

    async def stats(self) -> int:
        """Show how much there is."""
        joined = Joined(self._store)
        found = await count(self._store, joined, self._description.simulated, self._span())
        self._tell(repr(found), [msgspec.to_builtins(one) for one in found])
        return Exit.OK

    async def files(self) -> int:
        """List the files."""
        dataset = self._args.dataset
        if dataset not in DATASETS:
            problem = f"{dataset!r} is none of {', '.join(DATASETS)}"
            raise SettingError("DATASET", "argument", problem)
        hours = await Joined(self._store).hours(dataset, self._span())
        files = files_of(self._store, dataset, hours)
        lines = [f"{one.size:>13,}  {one.path}" for one in files]
        self._tell("\n".join(lines), [msgspec.to_builtins(one) for one in files])
        return Exit.OK

    async def compact(self) -> int:
        """Do once what the keeper does again and again."""
        limits = Limits(0, keep_s=self._settings.keep_fresh_s)
        compactor = Compactor(
            self._store,
            lateness_s=self._settings.lateness_s,
            instance=new_instance(),
            limits=limits,
        )
        done = await Keeper(self._store, compactor).turn()
        rows: list[dict[str, Any]] = [
            {"dataset": hour.dataset, "hour": hour_name(hour.hour), "outcome": outcome}
            for hour, outcome in done.done.items()
        ]
        rows += [
            {"dataset": hour.dataset, "hour": hour_name(hour.hour), "outcome": "failed"}
            | {"error": str(error)}
            for hour, error in done.failed.items()
        ]
        rows += [
            {"dataset": hour.dataset, "hour": hour_name(hour.hour), "outcome": "waits"}
            | {"why": why}
            for hour, why in done.plan.waiting.items()
        ]
        lines = [" ".join(map(str, row.values())) for row in rows]
        swept = len(done.plan.sweep)
        lines.append(f"{swept} files of fresh/ whose rows have been in raw/ long enough removed")
        self._tell("\n".join(lines), [*rows, {"removed_fresh_files": swept}])
        return Exit.UNEXPECTED if done.failed else Exit.OK

    async def verify(self) -> int:
        """Check the lake; what is wrong is for people to decide about."""
        found = await verify(
            self._store, deep=self._args.deep, lateness_s=self._settings.lateness_s
        )
        errors = sum(one.severity == "error" for one in found)
        lines = [*map(str, found), f"{len(found)} findings, {errors} of them errors"]
        self._tell("\n".join(lines), [msgspec.to_builtins(one) for one in found])
        return Exit.UNEXPECTED if errors else Exit.OK

    async def expire(self) -> int:
        """Remove what is old."""
        done = await expire(
            self._store,
            now_s=time.time(),
            instance=new_instance(),
            raw_days=self._args.raw_days,
            processed_days=self._args.processed_days,
            dry_run=self._args.dry_run,
        )
        verb = "would be removed" if self._args.dry_run else "removed"
        hours = f"{done.hours} hours of raw/ and fresh/, {done.processed_hours} of processed/"
        lines = [f"{hours}: {done.files} files, {done.bytes:,} bytes {verb}"]
        lines += [f"{hour} is being compacted: try again later" for hour in done.busy]
        self._tell("\n".join(lines), [msgspec.to_builtins(done) | {"dry_run": self._args.dry_run}])
        return Exit.OK

    def _span(self) -> Span:
        try:
            return Span.of(self._args.start, self._args.end)
        except ValueError as error:
            raise SettingError("end", "flag --end", str(error)) from error

    def _tell(self, text: str, rows: list[Any]) -> None:
        if not self._args.json:
            print(text)
            return
        for row in rows:
            print(msgspec.json.encode(row).decode())


JOBS: Final[Mapping[str, Callable[[Job], Awaitable[int]]]] = {
    "stats": Job.stats,
    "files": Job.files,
    "compact": Job.compact,
    "verify": Job.verify,
    "expire": Job.expire,
}


async def run(args: argparse.Namespace, settings: Settings) -> int:
    """Do what a verb says and return the exit code.

    Raises:
        NoLakeError: there is no lake.
        BlueflowError: what the store raises, or damage that stops the verb.
    """
    url = args.url or settings.lake
    store = store_of(url, s3_of(settings) if url.startswith("s3://") else None)
    try:
        description = await open_to_read(store)
        return await JOBS[args.what](Job(store, description, args, settings))
    finally:
        await store.close()
