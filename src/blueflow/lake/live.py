"""What is left of records that were changed, deleted, or whose account was removed.

A record is one (did, collection, rkey). Its versions are ordered by `rev`, the repository's own
clock: two relays may tell the same commit at different times, and its order not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Iterator

IDENTITY: Final = ("source", "seq", "op_index")
RECORD: Final = ("did", "collection", "rkey")
ORDER: Final = ("rev", "op_index", "time", "source", "seq")  # the last is the newest
NEEDED: Final = (*IDENTITY, "did", "time", "operation")  # to tell whether a row is left
STILL_THERE: Final = ("desynchronized", "throttled")  # not active, but not removed either

_BATCH_ROWS: Final = 131_072


class Outdated(NamedTuple):
    """Versions that are not the newest ones of their records.

    Attributes:
        identities: of these, as a table of `IDENTITY`.
        doubled: whether an event is there twice, as when two pipelines wrote the same source.
    """

    identities: Any
    doubled: bool


def outdated(since: Any) -> Outdated:
    """Find the versions that are not the newest ones of their records.

    Args:
        since: a Dataset with every operation from the start of what is read up to now.
    """
    records = since.to_table(columns=list(RECORD))
    counts = records.group_by(list(RECORD)).aggregate([([], "count_all")])
    several = counts.filter(pc.field("count_all") > 1).select(list(RECORD))
    found = [_empty(since, (*RECORD, *ORDER))]
    if several.num_rows:
        found += (
            rows.join(several, keys=list(RECORD), join_type="left semi")
            for rows in _batches(since, list(dict.fromkeys((*RECORD, *ORDER))))
        )
    versions = pa.concat_tables(found, promote_options="default")
    versions = versions.sort_by([(name, "ascending") for name in (*RECORD, *ORDER)])
    copies = _same_as_next(versions, (*RECORD, *ORDER))  # not older than what they are copies of
    older = pc.and_not(_same_as_next(versions), copies)
    identities = versions.filter(older).select(list(IDENTITY))
    return Outdated(identities, bool(pc.any(copies).as_py()))


def removed_accounts(accounts: Any) -> Any:
    """Return `did` and `removed`, the time, of accounts whose last status says that they are gone.

    Args:
        accounts: a Dataset of account events from the start of what is read up to now.
    """
    columns = ["did", "time", "source", "seq", "op_index", "active", "status"]
    rows = accounts.to_table(columns=columns, filter=pc.field("kind") == "account")
    rows = rows.sort_by([(name, "ascending") for name in ("did", "time", "source", "seq")])
    last = rows.filter(pc.invert(_same_as_next(rows, ("did",))))
    there = pc.is_in(last["status"], value_set=pa.array(STILL_THERE))
    gone = last.filter(pc.and_(pc.equal(last["active"], False), pc.invert(there)))  # noqa: FBT003
    return pa.table({"did": gone["did"], "removed": gone["time"]})


def living(rows: Any, outdated: Outdated, removed: Any, schema: Any) -> Any:
    """Return the rows that are the newest version of a record that is still there, as a table.

    Of an event that is there twice, one row.

    Args:
        rows: a Dataset with what is read, and all columns of `NEEDED`.
        outdated: what the function of this name returned.
        removed: what `removed_accounts` returned.
        schema: the columns to return.
    """
    columns = list(dict.fromkeys([*schema.names, *NEEDED]))
    kept = [schema.empty_table()]
    identities = []
    for batch in _batches(rows, columns, pc.field("operation") != "delete"):
        number = pa.array(range(batch.num_rows), pa.int32())
        left = batch.select([*IDENTITY, "did", "time"]).append_column("number", number)
        left = left.join(outdated.identities, keys=list(IDENTITY), join_type="left anti")
        left = left.join(removed, keys="did", join_type="left outer")
        # A row behind the removal: the account came back, and the event that said so is missing.
        back = pc.or_kleene(pc.is_null(left["removed"]), pc.greater(left["time"], left["removed"]))
        numbers = left.filter(back)["number"].combine_chunks().sort()
        kept.append(batch.select(schema.names).take(numbers).cast(schema))
        if outdated.doubled:
            identities.append(batch.select(list(IDENTITY)).take(numbers))
    found = pa.concat_tables(kept)
    return found.take(_firsts(pa.concat_tables(identities))) if identities else found


def _firsts(identities: Any) -> Any:
    """Return where each identity is for the first time, in order."""
    number = pa.array(range(identities.num_rows), pa.int64())
    groups = identities.append_column("number", number).group_by(list(IDENTITY))
    return groups.aggregate([("number", "min")])["number_min"].combine_chunks().sort()


def _batches(rows: Any, columns: list[str], condition: Any = None) -> Iterator[Any]:
    scanner = rows.scanner(columns=columns, filter=condition, batch_size=_BATCH_ROWS)
    for batch in scanner.to_batches():
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _empty(rows: Any, columns: tuple[str, ...]) -> Any:
    return pa.schema([rows.schema.field(name) for name in dict.fromkeys(columns)]).empty_table()


def _same_as_next(rows: Any, keys: tuple[str, ...] = RECORD) -> Any:
    """Return for each row of a sorted table whether the next one has the same keys."""
    count = rows.num_rows
    if count == 0:
        return pa.array([], pa.bool_())
    same = pa.array([True] * (count - 1), pa.bool_())
    for key in keys:
        column = rows[key].combine_chunks()
        same = pc.and_(same, pc.equal(column.slice(0, count - 1), column.slice(1)))
    return pa.concat_arrays([_flat(same), pa.array([False])])


def _flat(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
