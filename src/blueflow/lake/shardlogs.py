"""What the logs of the shards say, newest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blueflow.errors import CommitLogError
from blueflow.lake.layout import LOGS, Shard, record_key, record_number, shard_of
from blueflow.lake.logrecord import ShardRecord, decode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blueflow.lake.store import Store


async def last_record(store: Store, shard: Shard) -> ShardRecord | None:
    """Return the newest record of a shard's log; None when it has none.

    Costs one list of one key and one get, whatever the length of the log.

    Raises:
        CommitLogError: it is damaged, or not the record that its key names.
        BlueflowError: what the store raises.
    """
    newest = await store.list(shard.log, limit=1)
    if newest and record_number(newest[0].key) is None:  # somebody else's file
        newest = await store.list(shard.log)
    for found in newest:
        number = record_number(found.key)
        if number is not None:
            record = await _read(store, shard, found.key, number)
            if record is None:  # only a record far behind the newest is ever removed
                raise CommitLogError(found.key, "it went away while it was read")
            return record
    return None


async def last_records(store: Store, pipeline: str | None = None) -> dict[Shard, ShardRecord]:
    """Return the newest record of every log that has one.

    Args:
        store: holds the lake.
        pipeline: only the shards of this one.

    Raises:
        CommitLogError: one is damaged; the others do not make up for it.
        BlueflowError: what the store raises.
    """
    found: dict[Shard, ShardRecord] = {}
    for shard in await shards(store, pipeline):
        record = await last_record(store, shard)
        if record is not None:
            found[shard] = record
    return found


async def shards(store: Store, pipeline: str | None = None) -> list[Shard]:
    """Return every shard that has a log, in order; of one pipeline, or of all."""
    pipelines = [pipeline] if pipeline is not None else await store.folders(LOGS)
    found: list[Shard] = []
    for name in pipelines:
        for folder in await store.folders(f"{LOGS}{name}/"):
            shard = shard_of(folder, name)
            if shard is not None and shard.log == f"{LOGS}{name}/{folder}/":
                found.append(shard)
    return sorted(found)


async def records(store: Store, shard: Shard) -> AsyncIterator[ShardRecord]:
    """Yield the records of a shard's log that are kept, newest first.

    Raises:
        CommitLogError: one is damaged, or not the record that its key names.
        BlueflowError: what the store raises.
    """
    for found in await store.list(shard.log):
        number = record_number(found.key)
        if number is not None:
            record = await _read(store, shard, found.key, number)
            if record is not None:  # else the oldest ones were removed meanwhile
                yield record


async def _read(store: Store, shard: Shard, key: str, number: int) -> ShardRecord | None:
    data = await store.get(key)
    if data is None:
        return None
    record = decode(key, ShardRecord, data)
    if record.number != number or key != record_key(shard, number):
        raise CommitLogError(key, f"it holds record {record.number} of the log")
    return record
