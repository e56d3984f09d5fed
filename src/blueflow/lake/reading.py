"""Reading a lake, in a notebook or a script: no event loop is needed, and a running one is fine."""

from __future__ import annotations

import time
from datetime import datetime
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blueflow.lake import duck
from blueflow.lake.access import duckdb_secret, storage_options
from blueflow.lake.address import store_of
from blueflow.lake.background import Background
from blueflow.lake.joined import Joined, open_to_read
from blueflow.lake.live import living, outdated, removed_accounts
from blueflow.lake.scan import between, dataset_of, narrowed
from blueflow.lake.schema import SCHEMAS
from blueflow.lake.shard import new_instance
from blueflow.lake.span import Moment, Span, hour_start
from blueflow.lake.statistics import LakeStats, count
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from blueflow.lake.expiry import Expired
    from blueflow.lake.joined import Hour
    from blueflow.lake.s3client import S3Options
    from blueflow.lake.store import Store
    from blueflow.lake.verify import Finding

ACCOUNTS: Final = "accounts"
_GONE: Final = ("No files found", "404 (Not Found)")  # what DuckDB calls it, in a folder and in S3
_TRIES: Final = 3  # each meets a file that the keeper removed after it was listed


class DataFile(msgspec.Struct, frozen=True):
    """One Parquet file of a lake.

    Attributes:
        dataset: what it holds.
        hour: whose rows; when that hour begins, UTC.
        root: `raw` when the hour is whole and compacted, else `fresh`.
        path: what pandas, DuckDB and Polars take: a path, or an address such as `s3://…`.
        size: bytes.
        key: the same, relative to the lake.
    """

    dataset: str
    hour: datetime
    root: str
    path: str
    size: int
    key: str


def open(  # noqa: A001 - it is read as `blueflow.lake.open`
    url: str | Path, *, s3: S3Options | None = None
) -> Lake:
    """Open a lake to read it.

    Args:
        url: a folder, or `s3://BUCKET[/PREFIX]`.
        s3: endpoint and credentials; by default those of the environment (MINIO_ENDPOINT,
            MINIO_ACCESS_KEY, MINIO_SECRET_KEY), else AWS and what its own tools would take.

    Raises:
        NoLakeError: there is no lake.
        BucketError, StoreLoginError, StoreUnavailableError: it cannot be reached.
    """
    if not str(url).startswith("s3://"):
        return Lake(store_of(str(url)))
    from blueflow.lake.s3client import S3Options  # noqa: PLC0415 - a folder needs no S3 client

    s3 = s3 or S3Options.of_environment()
    return Lake(store_of(str(url), s3), s3)


class Lake:
    """A lake to read; `blueflow.lake.open` makes one.

    Every method may be called from any thread, with or without a running event loop, and returns
    when it is done; in async code use `anyio.to_thread.run_sync`. A thread of its own talks to the
    store. It ends with `close`, `with`, or the last reference.

    Times are datetimes with a time zone, dates, or text such as `2026-07-04` or `2026-07-04T16`
    (UTC unless it says); the start is included, the end is not, and without them it is everything.
    Datasets are `posts`, `likes`, `reposts`, `follows`, `other` (every other collection) and
    `accounts` (identity, account and sync events).

    With `live=True` only the newest version of each record comes, and only if neither the record
    nor its account was removed up to now, be that after the end of what is asked for.

    Args:
        store: holds the lake.
        s3: how DuckDB and Polars reach it; None is a folder.
    """

    def __init__(self, store: Store, s3: S3Options | None = None) -> None:
        self._store, self._s3 = store, s3
        self._joined = Joined(store)
        self._background = Background(store.close)
        try:
            description = self._background.run(open_to_read, store)
        except BaseException:
            self._background.close()
            raise
        self.simulated = description.simulated

    @property
    def url(self) -> str:
        """Where it is."""
        return self._store.url

    def files(
        self, dataset: str, start: Moment | None = None, end: Moment | None = None
    ) -> list[DataFile]:
        """Return the files of the hours between two times; each row is in one of them.

        Files in `fresh/` are removed 26 h after their hour was compacted: do not keep the list.

        Raises:
            ValueError: there is no such dataset, or a time is none.
            CommitLogError: a marker is damaged, or names a file that is not there.
        """
        return files_of(self._store, dataset, self._hours(dataset, Span.of(start, end)))

    def scan(
        self,
        dataset: str,
        start: Moment | None = None,
        end: Moment | None = None,
        *,
        columns: Sequence[str] | None = None,
        live: bool = False,
    ) -> Any:
        """Return the rows between two times as a `pyarrow.dataset.Dataset`.

        It has the columns of docs/lake-schema.md, whatever the age of a file, and exactly the rows
        of that time. Nothing is read until it is asked for rows: `.to_table()`, `.to_batches()`,
        `.head(5)`, `.count_rows()`; DuckDB takes it by the name of its variable.

        Args:
            dataset: which.
            start: the oldest event time.
            end: where to stop.
            columns: only these, and `time`, by which rows are cut.
            live: only what is left (see the class). This one reads at once and holds the rows in
                memory, and for a while about 350 bytes for each row from the start up to now; for
                more than that take `duckdb(…, live=True)`.

        Raises:
            ValueError: there is no such dataset or column, or a time is none.
            CommitLogError: a marker is damaged, or names a file that is not there.
        """
        span = Span.of(start, end)
        schema = narrowed(_schema(dataset), columns)
        if live and dataset != ACCOUNTS:
            return self._again(lambda: self._living(dataset, span, schema))
        return dataset_of(self._hours(dataset, span), schema, self._place(), span)

    def duckdb(
        self,
        sql: str,
        start: Moment | None = None,
        end: Moment | None = None,
        *,
        live: bool = False,
        params: Any = None,
    ) -> Any:
        """Return the answer to a query as a `DuckDBPyRelation`: `.df()`, `.pl()`, `.arrow()`.

        Each dataset is a view of its name: `SELECT count(*) FROM posts`.

        Args:
            sql: one query.
            start: the oldest event time of the views.
            end: where they stop.
            live: only what is left (see the class); what does not fit into memory goes to disk.
            params: values for `?` or `$name` in the query.

        Raises:
            MissingLibraryError: duckdb is not installed.
            ValueError: a time is none.
            CommitLogError: a marker is damaged, or names a file that is not there.
        """
        names = duck.named_in(sql, DATASETS)
        return self._again(
            lambda: self._connection(names, Span.of(start, end), live=live).sql(sql, params=params)
        )

    def duckdb_connection(
        self, start: Moment | None = None, end: Moment | None = None, *, live: bool = False
    ) -> Any:
        """Return a `DuckDBPyConnection` with a view for each dataset, for many queries.

        It shows the lake as it is now, for at most 26 h. Arguments and errors as for `duckdb`.
        """
        return self._again(lambda: self._connection(DATASETS, Span.of(start, end), live=live))

    def polars(
        self,
        dataset: str,
        start: Moment | None = None,
        end: Moment | None = None,
        *,
        live: bool = False,
    ) -> Any:
        """Return the rows between two times as a `polars.LazyFrame`.

        Polars reads the files itself; with `live` it gets what `scan` returns.

        Raises:
            MissingLibraryError: polars is not installed.
            ValueError: there is no such dataset, or a time is none.
            CommitLogError: a marker is damaged, or names a file that is not there.
        """
        from blueflow.lake.frames import lazy_frame, lazy_table  # noqa: PLC0415 - not in the extra

        if live and dataset != ACCOUNTS:
            return lazy_table(self.scan(dataset, start, end, live=True).to_table())
        paths = [one.path for one in self.files(dataset, start, end)]
        options = storage_options(self._s3) if self._s3 else None
        return lazy_frame(paths, _schema(dataset), Span.of(start, end), options)

    def stats(self, start: Moment | None = None, end: Moment | None = None) -> LakeStats:
        """Return how much there is of each dataset, in the whole hours between two times.

        Raises:
            ValueError: a time is none.
            CommitLogError: a marker is damaged, or names a file that is not there.
        """
        span = Span.of(start, end)
        return self._background.run(count, self._store, self._joined, self.simulated, span)

    def expire(
        self, *, raw_days: float = 90, processed_days: float = 365, dry_run: bool = False
    ) -> Expired:
        """Remove what is older than it has to be kept, for good; return how much that was.

        Args:
            raw_days: how long the hours of `raw/` and `fresh/` are kept.
            processed_days: how long those of `processed/` are.
            dry_run: remove nothing, and tell what would be.

        Raises:
            CommitLogError: the log of an hour is damaged.
            StoreLoginError, OutputIOError: we may not remove anything.
        """
        from blueflow.lake.expiry import expire  # noqa: PLC0415 - few need it

        return self._background.run(
            partial(
                expire,
                self._store,
                now_s=time.time(),
                instance=new_instance(),
                raw_days=raw_days,
                processed_days=processed_days,
                dry_run=dry_run,
            )
        )

    def verify(self, *, deep: bool = False) -> list[Finding]:
        """Check that logs, files and markers agree; an empty list is a lake without a fault.

        Args:
            deep: also read every file and compare its checksum.
        """
        from blueflow.lake.verify import verify  # noqa: PLC0415 - few need it

        return self._background.run(partial(verify, self._store, deep=deep))

    def close(self) -> None:
        """Disconnect; what `scan` and `polars` returned can still be read."""
        self._background.close()

    def __enter__(self) -> Self:
        """Return the lake."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self.close()

    def __repr__(self) -> str:
        return f"<Lake {self.url}{', simulated data' if self.simulated else ''}>"

    def _repr_html_(self) -> str:
        note = " (simulated data)" if self.simulated else ""
        names = ", ".join(DATASETS)
        return (
            f"<b>Lake</b> {escape(self.url)}{note}<br>datasets: {names}<br>"
            "<code>.stats() .files(…) .scan(…) .duckdb(…) .polars(…)</code>"
        )

    def _hours(self, dataset: str, span: Span) -> list[Hour]:
        _schema(dataset)
        return self._background.run(self._joined.hours, dataset, span)

    def _living(self, dataset: str, span: Span, schema: Any) -> Any:
        import pyarrow.dataset as pads  # noqa: PLC0415 - as `scan` does

        place, whole = self._place(), _schema(dataset)
        everything = dataset_of(self._hours(dataset, span.since()), whole, place, span.since())
        accounts = dataset_of(
            self._hours(ACCOUNTS, span.since()), _schema(ACCOUNTS), place, span.since()
        )
        cut = between(span)
        rows = everything if cut is None else everything.filter(cut)
        left = living(rows, outdated(everything), removed_accounts(accounts), schema)
        return pads.dataset(left)

    def _connection(self, names: Iterable[str], span: Span, *, live: bool) -> Any:
        connection = duck.connect()
        natively = self._s3 is None or duck.reads_s3(connection, duckdb_secret(self._s3))
        since = span.since()
        if live:
            self._add_view(connection, f"{ACCOUNTS} since", ACCOUNTS, since, natively=natively)
            duck.add_removed(connection, f"{ACCOUNTS} since")
        for name in names:
            if live and name != ACCOUNTS:
                self._add_view(connection, f"{name} since", name, since, natively=natively)
                duck.add_living(connection, name, f"{name} since", span)
            else:
                self._add_view(connection, name, name, span, natively=natively)
        return connection

    def _add_view(
        self, connection: Any, view: str, dataset: str, span: Span, *, natively: bool
    ) -> None:
        """Make a view of the rows of a dataset that are in a span."""
        hours = self._hours(dataset, span)
        if natively:
            paths = [one.path for one in files_of(self._store, dataset, hours)]
            duck.add_files(connection, view, paths, _schema(dataset), span)
        else:
            connection.register(view, dataset_of(hours, _schema(dataset), self._place(), span))

    def _again(self, read: Callable[[], Any]) -> Any:
        """Read, and anew when a file that was listed went away before it was opened."""
        for _ in range(_TRIES - 1):
            try:
                return read()
            except FileNotFoundError:
                continue
            except Exception as error:
                if not any(sign in str(error) for sign in _GONE):
                    raise
        return read()

    def _place(self) -> tuple[Any, str]:
        filesystem, root = self._store.filesystem()
        return filesystem, root.rstrip("/")


def files_of(store: Store, dataset: str, hours: Iterable[Hour]) -> list[DataFile]:
    """Return the files of some hours of a dataset, as users see them."""
    root = store.filesystem()[1].rstrip("/")
    base = f"s3://{root}" if store.url.startswith("s3://") else root
    return [
        DataFile(dataset, hour_start(hour.hour), kind, f"{base}/{one.key}", one.size, one.key)
        for hour in hours
        for kind, objects in (("raw", hour.raw), ("fresh", hour.fresh))
        for one in objects
    ]


def _schema(dataset: str) -> Any:
    if dataset not in SCHEMAS:
        raise ValueError(f"no dataset {dataset!r}; there are {', '.join(DATASETS)}")
    return SCHEMAS[dataset]
