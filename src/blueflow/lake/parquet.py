"""How the lake's files are encoded: the settings of Parquet, in one place.

Measured on a like of the network with one core, per row: zstd level 1 takes 2.9 µs and 179 bytes,
level 2 3.6 µs and 170, level 3 4.7 µs and 172, level 6 10 µs and 169, level 9 17 µs and 167; most
of the bytes are CIDs, which nothing makes smaller. So files that live for a day get level 1, and
those that stay level 2. The Bloom filter costs them 0.7 bytes.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from blueflow.lake.schema import ORDER

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

ROW_GROUP_ROWS: Final = 122_880  # DuckDB's own; it reads a file with as many threads as groups
FRESH_LEVEL: Final = 1
RAW_LEVEL: Final = 2

# Few different values, or the same ones again and again: a dictionary is smaller.
_DICTIONARY: Final = {
    "source": "source",
    "op_index": "op_index",
    "did": "did",
    "operation": "operation",
    "collection": "collection",
    "langs": "langs.list.element",
    "reply_root": "reply_root",
    "hashtags": "hashtags.list.element",
    "mentions": "mentions.list.element",
    "embed_type": "embed_type",
    "subject_uri": "subject_uri",
    "subject_did": "subject_did",
    "via_uri": "via_uri",
    "subject": "subject",
    "kind": "kind",
    "status": "status",
}
# Numbers that rise, and names that begin as the one before: the differences are smaller.
_DELTA: Final = {
    "seq": "DELTA_BINARY_PACKED",
    "time": "DELTA_BINARY_PACKED",
    "created_at": "DELTA_BINARY_PACKED",
    "rev": "DELTA_BYTE_ARRAY",
    "rkey": "DELTA_BYTE_ARRAY",
    "cid": "DELTA_BYTE_ARRAY",
}
# What somebody looks for a range or a value of. Of a text they would cost more than they tell.
_STATISTICS: Final = (
    *ORDER, "did", "rev", "operation", "collection", "rkey", "created_at", "kind", "active",
    "status", "subject", "subject_did", "subject_uri",
)  # fmt: skip
_BLOOM_FILTERS: Final = "bloom_filter_options" in signature(pq.write_table).parameters
_BLOOM_VALUES: Final = 40_000  # different accounts in a row group; more make it less sharp


class ParquetFile:
    """A file that is written table by table, for as many rows as there are. One thread calls.

    The rows have to come in the order that the file is to have. Nothing is synced to the disk.

    Attributes:
        rows: written or held back so far.
    """

    def __init__(self, path: Path, schema: Any, *, level: int = RAW_LEVEL) -> None:
        self.rows = 0
        self._size = 0  # once it is closed
        self._held: list[Any] = []  # less than a row group
        self._held_rows = 0
        self._schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(self._sink, schema, **_settings(schema, level, bloom=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes in the file so far; what is held back for the next row group is not in it."""
        return self._size if self._sink.closed else self._sink.tell()

    def write(self, table: Any) -> None:
        """Append the rows of a table."""
        self.rows += table.num_rows
        self._held.append(table)
        self._held_rows += table.num_rows
        if self._held_rows >= ROW_GROUP_ROWS:
            held = pa.concat_tables(self._held)
            whole = self._held_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            self._writer.write_table(held.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
            self._held, self._held_rows = [held.slice(whole)], self._held_rows - whole

    def close(self) -> int:
        """Write what is held back and the footer; return the size in bytes."""
        if self._sink.closed:
            return self._size
        try:
            if self._held_rows:
                held = pa.concat_tables(self._held)
                self._writer.write_table(held, row_group_size=ROW_GROUP_ROWS)
            self._writer.close()
            self._size = self._sink.tell()
        finally:
            self._sink.close()
        return self._size


def encode(table: Any, *, level: int = FRESH_LEVEL) -> bytes:
    """Return a sorted table of the lake as a Parquet file; equal tables give equal bytes.

    Args:
        table: of one of `schema.SCHEMAS`, sorted as `schema.ORDER` says.
        level: of zstd.
    """
    sink = pa.BufferOutputStream()
    settings = _settings(table.schema, level, bloom=False)
    whole = table.combine_chunks()  # the bounds of chunks would show in those of pages
    pq.write_table(whole, sink, row_group_size=ROW_GROUP_ROWS, **settings)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _settings(schema: Any, level: int, *, bloom: bool) -> dict[str, Any]:
    names = schema.names
    settings = {
        "compression": "zstd",
        "compression_level": level,
        "use_dictionary": [path for name, path in _DICTIONARY.items() if name in names],
        "column_encoding": {name: how for name, how in _DELTA.items() if name in names},
        "sorting_columns": [pq.SortingColumn(names.index(name)) for name in ORDER],
        "write_statistics": [name for name in _STATISTICS if name in names],
        "write_page_index": True,
    }
    if bloom and _BLOOM_FILTERS:
        settings["bloom_filter_options"] = {"did": {"ndv": _BLOOM_VALUES, "fpp": 0.02}}
    return settings
