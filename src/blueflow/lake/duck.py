"""The lake in SQL: views for DuckDB, which brings the memory and the disk that a query takes."""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from blueflow.errors import MissingLibraryError
from blueflow.lake.live import IDENTITY, ORDER, RECORD, STILL_THERE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from blueflow.lake.span import Span

_VERSION: Final = f"row({', '.join(f'r.{name}' for name in ORDER)})"
_IDENTITY: Final = ", ".join(f"r.{name}" for name in IDENTITY)
_SAME_RECORD: Final = " AND ".join(f"n.{name} = r.{name}" for name in RECORD)


def connect() -> Any:
    """Return a connection to a DuckDB in memory, which may use the system's folder for scratch.

    Raises:
        MissingLibraryError: duckdb is not installed.
    """
    try:
        import duckdb  # noqa: PLC0415 - it is not among the extra's libraries
    except ModuleNotFoundError as error:
        raise MissingLibraryError("duckdb", "SQL over a lake") from error
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory = {_text(tempfile.gettempdir())}")
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def named_in(sql: str, names: Iterable[str]) -> list[str]:
    """Return which of some names a query may name."""
    words = set(re.findall(r"\w+", sql.lower()))
    return [name for name in names if name in words]


def reads_s3(connection: Any, secret: Mapping[str, str]) -> bool:
    """Teach a connection to read S3 by itself; False when it cannot.

    The extension httpfs is loaded if it is here, by `INSTALL httpfs` or as the package
    duckdb-extension-httpfs; it is never downloaded.

    Args:
        connection: to DuckDB.
        secret: what `duckdb_secret` returned.
    """
    if not secret or not any(_loads(connection, name) for name in ("httpfs", *_packaged())):
        return False
    told = ", ".join(f"{name} {_text(value)}" for name, value in secret.items())
    connection.execute(f"CREATE SECRET blueflow (TYPE s3, {told})")
    return True


def _packaged() -> list[str]:
    """Return where a package has the extension for this version of DuckDB."""
    package = find_spec("duckdb_extension_httpfs")
    places = (package.submodule_search_locations if package else None) or ()
    name = f"extensions/v{version('duckdb')}/httpfs.duckdb_extension"
    return [str(path) for place in places if (path := Path(place) / name).exists()]


def _loads(connection: Any, extension: str) -> bool:
    try:
        connection.load_extension(extension)
    except Exception:  # noqa: BLE001 - its classes of errors changed; Arrow reads instead
        return False
    return True


def add_files(connection: Any, view: str, paths: Sequence[str], schema: Any, span: Span) -> None:
    """Make a view of the rows in Parquet files that are in a span.

    It has all columns of the schema, even those that no file has.
    """
    connection.register(f"{view} columns", schema.empty_table())
    if not paths:
        connection.execute(f'CREATE VIEW "{view}" AS SELECT * FROM "{view} columns"')  # noqa: S608
        return
    files = (
        f"read_parquet([{', '.join(map(_text, paths))}], "
        "union_by_name = true, hive_partitioning = false)"
    )
    there = _columns(connection, files)
    columns = ", ".join(
        f'r."{column}"' if column in there else f'NULL::{kind} AS "{column}"'
        for column, kind in _columns(connection, f'"{view} columns"').items()
    )
    connection.execute(
        f'CREATE VIEW "{view}" AS SELECT {columns} FROM {files} r WHERE {_between(span)}'  # noqa: S608
    )


def add_removed(connection: Any, accounts: str) -> None:
    """Make the table `removed accounts` from the account events since the start."""
    still = ", ".join(map(_text, STILL_THERE))
    connection.execute(f"""
        CREATE TABLE "removed accounts" AS
        SELECT did, last.t AS removed FROM (
            SELECT did, max({{t: time, source: source, seq: seq, active: active, status: status}})
                AS last
            FROM "{accounts}" WHERE kind = 'account' GROUP BY did
        ) WHERE NOT last.active AND coalesce(last.status, '') NOT IN ({still})
        """)  # noqa: S608 - names and words of our own


def add_living(connection: Any, view: str, rows: str, span: Span) -> None:
    """Make a view of the newest versions that are still there; see `live`.

    Args:
        connection: has the table `removed accounts`.
        view: its name.
        rows: a view of every operation since the start of the span.
        span: what to show.
    """
    connection.execute(f"""
        CREATE VIEW "{view}" AS
        SELECT r.* FROM "{rows}" r
        JOIN (
            SELECT {", ".join(RECORD)}, max({_VERSION}) AS newest FROM "{rows}" r GROUP BY ALL
        ) n ON {_SAME_RECORD} AND n.newest = {_VERSION}
        LEFT JOIN "removed accounts" a ON a.did = r.did
        WHERE {_between(span)} AND r.operation <> 'delete'
            AND (a.removed IS NULL OR r.time > a.removed)
        QUALIFY row_number() OVER (PARTITION BY {_IDENTITY}) = 1 -- of an event that is there twice
        """)  # noqa: S608 - names and numbers of our own


def _between(span: Span) -> str:
    conditions = ["true"]
    if span.start_us is not None:
        conditions.append(f"r.time >= {_time(span.start_us)}")
    if span.end_us is not None:
        conditions.append(f"r.time < {_time(span.end_us)}")
    return " AND ".join(conditions)


def _time(time_us: int) -> str:
    return f"make_timestamptz({time_us})"


def _columns(connection: Any, relation: str) -> dict[str, str]:
    rows = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()  # noqa: S608
    return {row[0]: row[1] for row in rows}


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
