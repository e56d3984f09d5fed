"""Files of the lake as one Arrow dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from blueflow.files.layout import HOUR_US

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from blueflow.lake.joined import Hour
    from blueflow.lake.span import Span

TIME: Final = pa.timestamp("us", tz="UTC")

_LAST_HOUR: Final = 2_932_896 * 24 - 1  # of the year 9999
_FORMAT: Final = pads.ParquetFileFormat()


def narrowed(schema: Any, columns: Sequence[str] | None) -> Any:
    """Return a schema with some columns, in their order; `time` comes along in any case.

    Raises:
        ValueError: there is no such column.
    """
    if columns is None:
        return schema
    unknown = [name for name in columns if name not in schema.names]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r}; there are {', '.join(schema.names)}")
    names = dict.fromkeys([*columns, "time"])
    return pa.schema([schema.field(name) for name in names])


def dataset_of(hours: Iterable[Hour], schema: Any, place: tuple[Any, str], span: Span) -> Any:
    """Return the rows of some hours as a `pyarrow.dataset.Dataset`.

    No file is opened. A column that a file lacks is null in its rows. An hour that a filter on
    `time` rules out is never opened.

    Args:
        hours: with their files.
        schema: the columns.
        place: the file system, and the path of the lake in it.
        span: rows outside of it are cut off.
    """
    filesystem, root = place
    fragments = [
        _FORMAT.make_fragment(
            f"{root}/{file.key}",
            filesystem,
            partition_expression=_within(hour.hour),
            file_size=file.size,
        )
        for hour in hours
        for file in (*hour.raw, *hour.fresh)
    ]
    whole = pads.FileSystemDataset(fragments, schema, _FORMAT, filesystem)
    cut = between(span)
    # Not a filter of a scanner: a Dataset is what DuckDB and Polars push their own filters into.
    return whole if cut is None else whole.filter(cut)


def between(span: Span) -> Any:
    """Return the condition that a row is in a span; None when it has no bound."""
    conditions = []
    if span.start_us is not None:
        conditions.append(pc.field("time") >= _time(span.start_us))
    if span.end_us is not None:
        conditions.append(pc.field("time") < _time(span.end_us))
    if len(conditions) > 1:
        return conditions[0] & conditions[1]
    return conditions[0] if conditions else None


def _within(hour: int) -> Any:
    """Return what is known of the times of the rows in an hour's files."""
    start, end = hour * HOUR_US, (hour + 1) * HOUR_US
    if hour <= 0:  # the first and the last hour also take what lies beyond
        return pc.field("time") < _time(end)
    if hour >= _LAST_HOUR:
        return pc.field("time") >= _time(start)
    return (pc.field("time") >= _time(start)) & (pc.field("time") < _time(end))


def _time(time_us: int) -> Any:
    return pa.scalar(time_us, TIME)
