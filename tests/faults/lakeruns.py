"""What the lake campaigns share: writers, a reader who globs all the time, and the judge.

Neither reader uses the product's own reading: they list folders and open Parquet files as anybody's
program would.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import Counter, defaultdict
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec
import pyarrow.parquet as pq
from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, LocalFileSystem, S3FileSystem

from blueflow.errors import BucketError, OutputNotWritableError
from blueflow.lake.address import store_of
from blueflow.lake.restore import rows_of, wire_of
from blueflow.lake.s3client import S3Options
from blueflow.testing.ledger import Ledger
from blueflow.testing.relay import RelayProcess, spawn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from tests.faults.kafkaruns import Run

    from blueflow.lake.store import Store
    from blueflow.testing.ledger import Verdict
    from blueflow.testing.services.s3 import SeaweedServer

ROOTS = ("fresh", "raw")  # what a commit, and what a compaction writes to

SOURCE = "sim"
# An hour of simulated time passes in 3 s, so hours close, are compacted and swept while we look.
EVENTS_PER_HOUR, HOURS_PER_S = 1_500, 0.3
LATENESS_S, KEEP_FRESH_S = 120, 4
_FILE = re.compile(r"(fresh|raw)/([a-z]+)/(year=\d+/month=\d+/day=\d+/hour=\d+)/([^/]+)")
_PAUSE_S = 0.05  # else the reader is all that runs
_ID = ("source", "seq", "op_index")


def relay_for(ledger: Path, seed: int, *, faults: str = "") -> RelayProcess:
    """Return a relay whose time runs a thousand times faster than the clock."""
    return spawn(
        rate=EVENTS_PER_HOUR / 3600,
        speed=HOURS_PER_S * 3600,
        retention=400_000,
        ledger=ledger,
        seed=seed,
        records=300,
        accounts=2000,
        faults=faults,
    )


class Lake(NamedTuple):
    """Where a lake is, and how others than its writer get at it."""

    url: str
    filesystem: Any
    base: str
    s3: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment."""
        return {**os.environ, **{f"MINIO_{name.upper()}": value for name, value in self.s3.items()}}

    @classmethod
    def in_folder(cls, folder: Path) -> Lake:
        return cls(str(folder), LocalFileSystem(), str(folder), {})

    @classmethod
    def in_bucket(cls, bucket: str, server: SeaweedServer, *, endpoint: str | None = None) -> Lake:
        address = server.endpoint.partition("://")[2] or server.endpoint
        filesystem = S3FileSystem(
            access_key=server.access_key,
            secret_key=server.secret_key,
            endpoint_override=address,
            scheme="http",
            region="us-east-1",
        )
        s3 = {
            "endpoint": endpoint or server.endpoint,
            "access_key": server.access_key,
            "secret_key": server.secret_key,
        }
        return cls(f"s3://{bucket}", filesystem, bucket, s3)

    def produce(self, relay: RelayProcess, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "blueflow.produce", "--source", relay.url),
            *("--source-name", SOURCE, "--sink", f"lake:{self.url}", "--prometheus-port", "0"),
            *("--commit-interval", "0.2s", "--log-format", "json"),
            *("--lateness", f"{LATENESS_S}s", "--keep-fresh", f"{KEEP_FRESH_S}s"),
            *more,
        ]

    def files(self, root: str) -> list[str]:
        """List a root, as a glob does; paths below the lake."""
        try:
            selector = FileSelector(f"{self.base}/{root}", recursive=True, allow_not_found=True)
            found = self.filesystem.get_file_info(selector)
        except FileNotFoundError:  # a folder was tidied up while it was listed
            return self.files(root)
        return [one.path.removeprefix(f"{self.base}/") for one in found if one.is_file]

    def table(self, path: str, columns: list[str] | None = None) -> Any:
        with self.filesystem.open_input_file(f"{self.base}/{path}") as file:
            return pq.ParquetFile(file).read(columns)

    def record(self, path: str) -> dict[str, Any]:
        with self.filesystem.open_input_file(f"{self.base}/{path}") as file:
            record: dict[str, Any] = msgspec.json.decode(file.read())["record"]
            return record

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        store = store_of(self.url, S3Options(**self.s3) if self.s3 else None)
        try:
            await store.open(create=False)
            yield store
        finally:
            await store.close()

    def inputs(self) -> dict[str, int]:
        """Return how far each input is read, over all logs."""
        newest: dict[str, str] = {}
        for path in self.files("_blueflow/logs"):
            folder = path.rpartition("/")[0]
            newest[folder] = min(path, newest.get(folder, path))  # the newest comes first
        found: dict[str, int] = {}
        for path in newest.values():
            with suppress(FileNotFoundError):
                for name, one in self.record(path)["inputs"].items():
                    found[name] = max(one["next"], found.get(name, 0))
        return found


class Globber:
    """Reads both roots in a loop, in a thread, and notes whatever a plain reader may not see."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._ids: dict[str, frozenset[tuple[str, int, int]]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="globber", daemon=True)
        self.looks = Counter[str]()
        self.wrong: list[str] = []
        self.marked: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(60)

    def _watch(self) -> None:
        try:
            while not self._ended.is_set():
                self._look("fresh")
                markers = [one for one in self._lake.files("raw") if one.endswith(".json")]
                seen = self._look("raw")
                for marker in markers:
                    self._check(marker, seen)
                self._ended.wait(_PAUSE_S)
        except Exception as error:  # noqa: BLE001 - it is told where it is joined
            self.wrong.append(f"the reader failed: {error!r}")

    def _look(self, root: str) -> dict[str, set[str]]:
        """Read every file that is there; return their names by hour."""
        by_hour: dict[str, set[str]] = defaultdict(set)
        seen: Counter[tuple[str, int, int]] = Counter()
        for path in self._lake.files(root):
            match = _FILE.fullmatch(path)
            if not path.endswith(".parquet") or match is None:
                continue
            try:
                ids = self._read(path)
            except FileNotFoundError:
                if root == "raw":
                    self.wrong.append(f"{path} went away")
                continue  # its hour is in raw/ by now
            except (ArrowInvalid, OSError) as error:
                self.wrong.append(f"{path} cannot be read: {error!r}")
                continue
            seen.update(ids)
            by_hour[f"{match[2]}/{match[3]}"].add(match[4])
        twice = [one for one, count in seen.items() if count > 1]
        if twice:
            self.wrong.append(f"{root}: {len(twice)} rows twice, such as {twice[0]}")
        self.looks[root] += 1
        return by_hour

    def _check(self, path: str, seen: dict[str, set[str]]) -> None:
        """Check a marker that was there before `seen` was listed."""
        match = _FILE.fullmatch(path)
        assert match is not None
        marker = self._lake.record(path)
        names = seen[f"{match[2]}/{match[3]}"]
        if missing := set(marker["files"]) - names:
            self.wrong.append(f"{path} names {sorted(missing)}, which are not there")
            return
        folder = path.rpartition("/")[0]
        rows = sum(len(self._ids[f"{folder}/{name}"]) for name in marker["files"])
        if rows != marker["rows"]:
            self.wrong.append(f"{path} says {marker['rows']} rows, there are {rows}")
        self.marked.add(f"{match[2]}/{match[3]}")

    def _read(self, path: str) -> frozenset[tuple[str, int, int]]:
        if path not in self._ids:
            table = self._lake.table(path, list(_ID))
            ids = list(zip(*(table[name].to_pylist() for name in _ID), strict=True))
            self._ids[path] = frozenset(ids)
            if len(self._ids[path]) != len(ids):
                self.wrong.append(f"{path} holds a row twice")
        return self._ids[path]


def judge(lake: Lake, ledger: Path, *, through: int | None = None) -> Verdict:
    """Compare both roots, joined at the markers, with what the relay issued."""
    markers: dict[str, dict[str, Any]] = {}
    for path in sorted(one for one in lake.files("raw") if one.endswith(".json")):
        match = _FILE.fullmatch(path)
        assert match is not None
        markers[f"{match[2]}/{match[3]}"] = lake.record(path)  # the newest comes last
    events = []
    for root in ("raw", "fresh"):
        for path in lake.files(root):
            match = _FILE.fullmatch(path)
            if match is None or not path.endswith(".parquet"):
                continue
            marker = markers.get(f"{match[2]}/{match[3]}", {"files": (), "covers": ()})
            whole = (
                match[4] in marker["files"] if root == "raw" else match[4] not in marker["covers"]
            )
            if whole:
                events += [msgspec.json.decode(wire_of(row)) for row in rows_of(lake.table(path))]
    events.sort(key=lambda event: (event["seq"], event["op_index"]))
    return Ledger.load(ledger).compare(events, through=through)


async def seq_of(lake: Lake) -> int:
    return max((await anyio.to_thread.run_sync(lake.inputs)).values(), default=0)


async def seq_sum(lake: Lake) -> int:
    """Return how far all inputs together are read."""
    return sum((await anyio.to_thread.run_sync(lake.inputs)).values())


async def until_committed(lake: Lake, run: Run, before: int) -> None:
    with anyio.fail_after(60):
        while await seq_of(lake) <= before:
            assert run.code is None, run.said()[-3000:]
            await anyio.sleep(0.05)


async def staged(lake: Lake, root: str) -> set[str]:
    """Return the uploads for a root that are neither files yet nor given up."""
    try:
        async with lake.store() as store:
            return await _uploads(store, root)
    except (BucketError, OutputNotWritableError):  # before the first start
        return set()


async def until_staged(lake: Lake, run: Run, root: str, before: set[str]) -> None:
    """Wait until uploads are there that are not files yet: a commit, or a compaction, is at it."""
    async with lake.store() as store:
        with anyio.fail_after(60):
            while not await _uploads(store, root) - before:
                assert run.code is None, run.said()[-3000:]
                await anyio.sleep(0.001)


async def until_marked(globber: Globber, run: Run, hours: int) -> None:
    with anyio.fail_after(120):
        while len(globber.marked) < hours:
            assert run.code is None, run.said()[-3000:]
            assert globber.wrong == []
            await anyio.sleep(0.2)


async def _uploads(store: Store, root: str) -> set[str]:
    return {one.upload_id for one in await store.uploads(f"{root}/")}
