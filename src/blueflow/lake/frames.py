"""The lake for Polars, which reads its files by itself."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from blueflow.errors import MissingLibraryError
from blueflow.lake.span import hour_start

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.lake.span import Span

try:
    import polars as pl
except ModuleNotFoundError as missing:
    raise MissingLibraryError("polars", "a LazyFrame of a lake") from missing


def lazy_frame(
    paths: Sequence[str], schema: Any, span: Span, storage_options: Mapping[str, str] | None
) -> Any:
    """Return the rows of Parquet files that are in a span as a LazyFrame.

    Args:
        paths: of the files.
        schema: the columns; one that a file lacks is null in its rows.
        span: rows outside of it are cut off.
        storage_options: how to reach S3; None for a folder.
    """
    empty = pl.DataFrame(schema.empty_table())
    if not paths:
        return empty.lazy()
    rows = pl.scan_parquet(
        list(paths),
        schema=empty.schema,
        missing_columns="insert",
        extra_columns="ignore",
        hive_partitioning=False,
        glob=False,
        storage_options=dict(storage_options) if storage_options else None,
    )
    if span.start_us is not None:
        rows = rows.filter(pl.col("time") >= _time(span.start_us))
    if span.end_us is not None:
        rows = rows.filter(pl.col("time") < _time(span.end_us))
    return rows


def lazy_table(table: Any) -> Any:
    """Return an Arrow table as a LazyFrame."""
    return pl.DataFrame(table).lazy()


def _time(time_us: int) -> Any:
    return pl.lit(hour_start(0) + timedelta(microseconds=time_us))
