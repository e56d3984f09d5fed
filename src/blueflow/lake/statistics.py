"""How much a lake holds."""

from __future__ import annotations

from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any, Final

import anyio.to_thread
import msgspec

from blueflow.lake.scan import dataset_of
from blueflow.lake.schema import SCHEMAS
from blueflow.lake.span import Span, hour_start
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blueflow.lake.joined import Hour, Joined
    from blueflow.lake.store import Store

_HEADS: Final = (
    *("dataset", "rows", "bytes", "files", "hours", "first hour", "last hour"),
    *("marked hours", "late versions"),
)


class DatasetStats(msgspec.Struct, frozen=True):
    """What a lake holds of one dataset, in whole hours.

    Attributes:
        dataset: which.
        rows: in both roots; each is counted once.
        bytes: of the files that hold them.
        files: how many those are.
        hours: how many have files or a marker.
        first_hour: the oldest one; None without any.
        last_hour: the newest one.
        marked_hours: how many are whole and compacted in `raw/`.
        late_versions: how often marked hours got late rows.
    """

    dataset: str
    rows: int
    bytes: int
    files: int
    hours: int
    first_hour: datetime | None
    last_hour: datetime | None
    marked_hours: int
    late_versions: int

    def cells(self) -> tuple[str, ...]:
        """Return what stands in the table."""
        ends = (f"{one:%Y-%m-%dT%H}" if one else "-" for one in (self.first_hour, self.last_hour))
        counts = (self.rows, self.bytes, self.files, self.hours)
        marks = (self.marked_hours, self.late_versions)
        return (self.dataset, *(f"{n:,}" for n in counts), *ends, *(f"{n:,}" for n in marks))


class LakeStats(msgspec.Struct, frozen=True):
    """What a lake holds, by dataset: `stats["posts"].rows`. It shows itself as a table.

    Attributes:
        url: where it is.
        simulated: it holds no real data.
        datasets: all of them.
    """

    url: str
    simulated: bool
    datasets: tuple[DatasetStats, ...]

    def __getitem__(self, dataset: str) -> DatasetStats:
        """Return what there is of one dataset."""
        for one in self.datasets:
            if one.dataset == dataset:
                return one
        raise KeyError(dataset)

    def __iter__(self) -> Iterator[DatasetStats]:
        """Iterate over the datasets."""
        return iter(self.datasets)

    def __repr__(self) -> str:
        rows = [_HEADS, *(one.cells() for one in self.datasets)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{head}</th>" for head in _HEADS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in one.cells()) + "</tr>"
            for one in self.datasets
        )
        title = escape(self._title())
        return f"<table><caption>{title}</caption><tr>{heads}</tr>{rows}</table>"

    def _title(self) -> str:
        return f"{self.url}{' (simulated data)' if self.simulated else ''}"


async def count(store: Store, joined: Joined, simulated: bool, span: Span) -> LakeStats:  # noqa: FBT001
    """Count what the hours of a span hold.

    Raises:
        CommitLogError: a marker is damaged, or names a file that is not there.
        BlueflowError: what the store raises.
    """
    counted = [
        await anyio.to_thread.run_sync(
            stats_of, dataset, await joined.hours(dataset, span), store.filesystem()
        )
        for dataset in DATASETS
    ]
    return LakeStats(store.url, simulated, tuple(counted))


def stats_of(dataset: str, hours: Sequence[Hour], place: tuple[Any, str]) -> DatasetStats:
    """Count what some hours hold; reads the ends of the files that no marker counts.

    Args:
        dataset: which.
        hours: in order.
        place: the file system, and the path of the lake in it.
    """
    uncounted = [hour._replace(raw=()) for hour in hours if hour.fresh]
    fresh = dataset_of(uncounted, SCHEMAS[dataset], place, Span())
    files = [file for hour in hours for file in (*hour.raw, *hour.fresh)]
    markers = [hour.marker for hour in hours if hour.marker]
    return DatasetStats(
        dataset,
        rows=sum(marker.rows for marker in markers) + (fresh.count_rows() if uncounted else 0),
        bytes=sum(file.size for file in files),
        files=len(files),
        hours=len(hours),
        first_hour=hour_start(hours[0].hour) if hours else None,
        last_hour=hour_start(hours[-1].hour) if hours else None,
        marked_hours=len(markers),
        late_versions=sum(marker.version - 1 for marker in markers),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
