from __future__ import annotations

import pytest

from blueflow.errors import CommitLogError
from blueflow.lake.layout import Shard, record_key
from blueflow.lake.logrecord import ShardRecord, encode
from blueflow.lake.shardlogs import last_record, last_records, records, shards
from blueflow.testing.lakestore import MemoryObjects

A0, A1, B = Shard("a", 0, 2), Shard("a", 1, 2), Shard("b")


def record(number: int) -> ShardRecord:
    return ShardRecord(number, "commit", "i", float(number), "source", {})


async def filled() -> MemoryObjects:
    store = MemoryObjects()
    for shard, count in ((A0, 12), (A1, 1), (B, 3)):
        for number in range(1, count + 1):
            await store.put_new(record_key(shard, number), encode(record(number)))
    return store


async def test_the_last_record_of_a_log_is_its_highest() -> None:
    store = await filled()
    assert await last_record(store, A0) == record(12)
    assert await last_record(store, Shard("nobody")) is None


async def test_the_last_records_are_those_of_every_shard() -> None:
    store = await filled()
    assert await shards(store) == [A0, A1, B]
    assert await last_records(store) == {A0: record(12), A1: record(1), B: record(3)}
    assert await last_records(store, "b") == {B: record(3)}
    assert await last_records(store, "nobody") == {}


async def test_the_records_of_a_log_come_newest_first() -> None:
    store = await filled()
    assert [one.number async for one in records(store, A0)] == list(range(12, 0, -1))


async def test_files_of_others_in_the_logs_are_passed_over() -> None:
    store = await filled()
    for key in (
        f"{A0.log}.hidden",
        f"{A0.log}000-notes.txt",
        "_blueflow/logs/a/notes/x",
        "_blueflow/logs/a/00-of-2/x",
        "_blueflow/logs/empty/0-of-1/readme",
    ):
        await store.put_new(key, b"foreign")
    assert await last_record(store, A0) == record(12)
    assert await last_records(store) == {A0: record(12), A1: record(1), B: record(3)}
    assert len([one async for one in records(store, A0)]) == 12


async def test_a_record_under_the_key_of_another_is_an_error() -> None:
    store = await filled()
    await store.put_new(record_key(A0, 13), encode(record(7)))
    with pytest.raises(CommitLogError, match="record 7"):
        await last_record(store, A0)


async def test_a_damaged_record_is_an_error() -> None:
    store = await filled()
    store.objects[record_key(B, 3)] = store.objects[record_key(B, 3)][:-9]
    with pytest.raises(CommitLogError):
        await last_records(store)
    assert await last_record(store, A0) == record(12)
