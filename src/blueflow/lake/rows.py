"""From wire JSON or events to sorted Arrow tables, one per dataset and hour. No I/O, no clock.

Rows are turned into columns every few thousand: columns are a fraction of the objects' size, and
the objects are still in the processor's cache.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pyarrow as pa

from blueflow.files.layout import HOUR_US, hour_of
from blueflow.lake.columns import account_batch, operation_batch
from blueflow.lake.lines import Sorted
from blueflow.lake.schema import ORDER, SCHEMAS
from blueflow.records import dataset_of_collection

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.lake.lines import AccountEvent, Envelope, Rejected

Key: TypeAlias = tuple[str, int]  # dataset and hour

CHUNK_ROWS: Final = 4_096
CHUNK_BYTES: Final = 4 << 20
_LINES_AT_ONCE: Final = 1_024
_ENVELOPE_BYTES: Final = 330  # of a line of wire JSON beside its record


class RowBuffer:
    """Takes events in, gives tables out.

    Attributes:
        bytes: of wire JSON held, estimated from the records. What is held in memory is about as
            much, and up to 4,096 rows of each group as objects.
        rows: likewise.
        newest_time_us: the newest time of an event taken in so far, microseconds since 1970; 0
            when none is after 1970.
        groups: what is held, by dataset and hour.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.rows = 0
        self.newest_time_us = 0
        self.groups: dict[Key, Group] = {}

    def add_lines(
        self, lines: Iterable[bytes], *, only: Container[Key] | None = None
    ) -> list[Rejected]:
        """Take in lines of wire JSON, each with one event.

        Args:
            lines: with `source` and `seq`, as blueflow writes them.
            only: the datasets and hours that are wanted; others are passed over.

        Returns:
            The lines that are no events; nothing of them is held.
        """
        rejected: list[Rejected] = []
        ahead, first = iter(lines), 0
        while chunk := list(islice(ahead, _LINES_AT_ONCE)):
            found = Sorted()
            found.add_lines(chunk, first)
            self._hold_all(found, only)
            rejected += found.rejected
            first += len(chunk)
        return rejected

    def add_events(
        self, events: Iterable[Event], *, only: Container[Key] | None = None
    ) -> list[Rejected]:
        """Take in events.

        Args:
            events: of any kind.
            only: the datasets and hours that are wanted; others are passed over.

        Returns:
            The events with a number that has no place in 64 bits, or with text that has none in
            UTF-8; nothing of them is held.
        """
        found = Sorted()
        found.add_events(events)
        self._hold_all(found, only)
        return found.rejected

    def take(self) -> Mapping[Key, Group]:
        """Return what is held, and hold nothing."""
        groups, self.groups = self.groups, {}
        self.bytes = self.rows = 0
        return groups

    def _hold_all(self, found: Sorted, only: Container[Key] | None) -> None:
        for (collection, hour), part in found.operations.items():
            key = dataset_of_collection(collection), hour_of(hour * HOUR_US)
            if only is None or key in only:
                self._hold(key, *part)
        for event in found.accounts:
            key = "accounts", hour_of(event.time_us)
            if only is None or key in only:
                self._hold(key, [event], [b""])

    def _hold(
        self, key: Key, rows: Sequence[Envelope | AccountEvent], records: Sequence[bytes]
    ) -> None:
        size = sum(map(len, records)) + _ENVELOPE_BYTES * len(rows)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(*key)
        newest_us = group.add(rows, records, size)
        self.newest_time_us = max(self.newest_time_us, newest_us)
        self.rows += len(rows)
        self.bytes += size


class Group:
    """The rows of a dataset and hour.

    Attributes:
        dataset: which.
        hour: hours since 1970.
        rows: how many.
        time_min_us: the oldest event time, microseconds since 1970; 0 without rows.
        time_max_us: the newest one.
    """

    def __init__(self, dataset: str, hour: int) -> None:
        self.dataset, self.hour = dataset, hour
        self.rows = self.time_min_us = self.time_max_us = 0
        self._batches: list[Any] = []
        self._pending: list[Any] = []
        self._records: list[bytes] = []
        self._pending_bytes = 0

    def add(
        self, rows: Sequence[Envelope | AccountEvent], records: Sequence[bytes], size: int
    ) -> int:
        """Take in rows of this group; return the newest time of them.

        Args:
            rows: operations, or account-level events; at least one.
            records: the record of each operation as JSON text, empty where there is none.
            size: about as many bytes as they are large.
        """
        times_us = [row.time_us for row in rows]
        oldest_us, newest_us = min(times_us), max(times_us)
        self.time_min_us = min(self.time_min_us, oldest_us) if self.rows else oldest_us
        self.time_max_us = max(self.time_max_us, newest_us) if self.rows else newest_us
        self.rows += len(rows)
        self._pending += rows
        self._records += records
        self._pending_bytes += size
        if self._pending_bytes >= CHUNK_BYTES or len(self._pending) >= CHUNK_ROWS:
            self._make_batch()
        return newest_us

    def table(self) -> Any:
        """Return all rows as a table of the dataset's schema, sorted as `schema.ORDER` says."""
        self._make_batch()
        return in_order(pa.Table.from_batches(self._batches, schema=SCHEMAS[self.dataset]))

    def _make_batch(self) -> None:
        if not self._pending:
            return
        rows, records = self._pending, self._records
        self._pending, self._records, self._pending_bytes = [], [], 0
        if self.dataset == "accounts":
            self._batches.append(account_batch(rows))
        else:
            self._batches.append(operation_batch(self.dataset, rows, records))


def in_order(table: Any) -> Any:
    """Return a table of the lake, sorted by time, source, seq and op_index."""
    return table.combine_chunks().sort_by([(name, "ascending") for name in ORDER])
