"""The archive over a real broker: what it keeps, what it refuses, what it says about loss."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pyarrow.parquet as pq
import pytest

from blueflow.archiver import Archive
from blueflow.errors import (
    BlueflowError,
    DrainTimeoutError,
    InputLostError,
    KafkaUnavailableError,
    OtherSourceError,
    StoreUnavailableError,
)
from blueflow.events import Position, encode_event
from blueflow.kafka.connection import Connection
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import TopicWishes
from blueflow.lake.layout import Shard, place_of
from blueflow.lake.restore import rows_of, wire_of
from blueflow.lake.shardlogs import last_record, last_records
from blueflow.metrics import Metrics
from blueflow.settings import Settings
from blueflow.testing.lakestore import MemoryObjects
from blueflow.testing.samples import contract_events

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from blueflow.events import Event
    from blueflow.lake.logrecord import Staged
    from blueflow.testing.services.kafka import KafkaBroker

SOURCE = "archive.example"
RECORDS_TOOL = "org.apache.kafka.tools.DeleteRecordsCommand"
KEPT = ("--config", "max.message.bytes=8388608", "--config", "retention.ms=-1")
TOPIC_TOOL = "org.apache.kafka.tools.TopicCommand"
WHOLE = Shard("default")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(180)


class Topics:
    """Event topics of a test's own, written by the product's sink."""

    def __init__(self, bootstrap: str, route: str = "by-kind") -> None:
        self.bootstrap, self.route = bootstrap, route
        self.prefix = f"archive-{secrets.token_hex(4)}."

    async def write(self, events: Sequence[Event], *, simulated: bool = True) -> None:
        sink = KafkaSink(
            self.bootstrap,
            origin_source=SOURCE,
            simulated=simulated,
            topic_prefix=self.prefix,
            route=self.route,
            topics=TopicWishes(partitions=3, retention_s=math.inf),
        )
        try:
            await sink.resume()
            last = events[-1]
            await sink.write(events, through=Position(SOURCE, last.seq, last.time_us))
            await sink.flush()
        finally:
            await sink.close()


def archive_of(
    topics: Topics,
    store: MemoryObjects,
    *,
    shard: Shard = WHOLE,
    metrics: Metrics | None = None,
    accept_loss: str = "no",
    drain_s: float = 10,
) -> Archive:
    settings = Settings(
        topic_prefix=topics.prefix,
        commit_interval_s=0.2,
        accept_loss=accept_loss,
        drain_s=drain_s,
    )
    return Archive(Connection(topics.bootstrap), store, shard, settings, metrics or Metrics())


def stored(store: MemoryObjects) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for key, data in store.objects.items():
        if place_of(key):
            found += [json.loads(wire_of(row)) for row in rows_of(pq.read_table(io.BytesIO(data)))]
    return sorted(found, key=lambda one: (one["source"], one["seq"], one["op_index"]))


def wire(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [json.loads(encode_event(event)) for event in events]


async def run(archive: Archive, is_done: Callable[[], bool]) -> None:
    """Run an archive until something is so, then stop it as a signal does."""
    stop = anyio.Event()
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archive.until, stop)
            with anyio.fail_after(60):
                while not is_done():
                    await anyio.sleep(0.05)
            stop.set()
    except* BlueflowError as group:
        failure = group.exceptions[0]
    if failure is not None:
        raise failure


def has_rows(store: MemoryObjects, count: int) -> Callable[[], bool]:
    return lambda: len(stored(store)) >= count


@pytest.mark.parametrize("route", ["by-kind", "single"])
async def test_every_event_is_in_the_lake_as_it_was(kafka: KafkaBroker, route: str) -> None:
    topics, store = Topics(kafka.bootstrap, route), MemoryObjects()
    events = contract_events(SOURCE, 60, step_us=60_000_000)
    await topics.write(events[:50])
    await run(archive_of(topics, store), has_rows(store, 50))
    await topics.write(events[50:])
    await run(archive_of(topics, store), has_rows(store, len(events)))
    assert stored(store) == wire(events)
    assert "SIMULATED-DATA.txt" in store.objects


async def test_shards_divide_the_partitions(kafka: KafkaBroker) -> None:
    topics, store = Topics(kafka.bootstrap), MemoryObjects()
    events = [
        msgspec.structs.replace(event, did=f"did:plc:account{at}")
        for at, event in enumerate(contract_events(SOURCE, 60))
    ]
    await topics.write(events)
    for at in range(2):
        shard = Shard("default", at, 2)
        before = len(stored(store))
        await run(archive_of(topics, store, shard=shard), has_rows(store, before + 1))
    assert stored(store) == wire(events)
    logs = await last_records(store)
    numbers = {
        shard.ordinal: {int(name.rpartition("/")[2]) % 2 for name in record.inputs}
        for shard, record in logs.items()
    }
    assert numbers == {0: {0}, 1: {1}}  # 0 and 2 are even


async def test_it_waits_for_topics_and_for_events(kafka: KafkaBroker) -> None:
    topics, store = Topics(kafka.bootstrap), MemoryObjects()
    archive = archive_of(topics, store)
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(archive.until, stop)
        with anyio.fail_after(30):
            while "waiting" not in archive.health().reason:
                await anyio.sleep(0.05)
        assert not archive.health().ok
        events = contract_events(SOURCE, 5)
        await topics.write(events)
        with anyio.fail_after(60):
            while len(stored(store)) < len(events):
                await anyio.sleep(0.05)
        assert archive.health().ok
        stop.set()
    assert stored(store) == wire(events)


async def test_made_up_events_do_not_come_to_a_live_lake(kafka: KafkaBroker) -> None:
    live, simulated, store = Topics(kafka.bootstrap), Topics(kafka.bootstrap), MemoryObjects()
    await live.write(contract_events(SOURCE, 5), simulated=False)
    await run(archive_of(live, store), has_rows(store, 5))
    await simulated.write(contract_events(SOURCE, 5))
    before = dict(store.objects)
    with pytest.raises(OtherSourceError):
        await run(archive_of(simulated, store), lambda: False)
    assert store.objects == before


async def test_records_that_are_no_events_are_counted_and_left_out(kafka: KafkaBroker) -> None:
    from confluent_kafka import Producer  # noqa: PLC0415 - as a stranger would

    topics, store, metrics = Topics(kafka.bootstrap), MemoryObjects(), Metrics()
    events = contract_events(SOURCE, 10)
    await topics.write(events)
    stranger = Producer({"bootstrap.servers": kafka.bootstrap})
    stranger.produce(f"{topics.prefix}posts", b"not an event", partition=1)
    assert stranger.flush(10) == 0
    archive = archive_of(topics, store, metrics=metrics)
    await run(archive, lambda: len(stored(store)) == len(events) and _rejected(metrics) == 1)
    assert stored(store) == wire(events)


def _rejected(metrics: Metrics) -> int:
    return metrics.lake.rejected.total


async def test_what_retention_removed_is_named_and_gone_on_behind_only_when_told(
    kafka: KafkaBroker, tmp_path: Path
) -> None:
    topics, store, metrics = Topics(kafka.bootstrap), MemoryObjects(), Metrics()
    events = contract_events(SOURCE, 120)
    await topics.write(events[:40])
    await run(archive_of(topics, store), has_rows(store, 40))
    await topics.write(events[40:80])
    name = f"{topics.prefix}posts"
    removed = [{"topic": name, "partition": number, "offset": -1} for number in range(3)]
    file = tmp_path / "offsets.json"
    file.write_text(json.dumps({"version": 1, "partitions": removed}))
    await kafka.tool(RECORDS_TOOL, "--offset-json-file", str(file))
    await topics.write(events[80:])
    before = stored(store)
    with pytest.raises(InputLostError, match=r"posts/\d: \d+ up to \d+ \(exclusive\) is lost"):
        await run(archive_of(topics, store), lambda: False)
    archive = archive_of(topics, store, metrics=metrics, accept_loss="yes")
    others = [event for event in wire(events[40:80]) if _dataset(event) != "posts"]
    wanted = [*wire(events[:40]), *others, *wire(events[80:])]
    await run(archive, has_rows(store, len(wanted)))
    assert Counter(map(_key, before)) <= Counter(map(_key, stored(store)))
    assert stored(store) == sorted(wanted, key=_key)
    assert metrics.lake.lost.total > 0


def _dataset(event: Mapping[str, Any]) -> str:
    posts = event.get("commit", {}).get("collection") == "app.bsky.feed.post"
    return "posts" if posts else "others"


def _key(event: Mapping[str, Any]) -> tuple[str, int, int]:
    return event["source"], event["seq"], event["op_index"]


async def test_a_topic_that_was_made_anew_is_noticed(kafka: KafkaBroker) -> None:
    topics, store = Topics(kafka.bootstrap), MemoryObjects()
    events = contract_events(SOURCE, 60)
    await topics.write(events[:30])
    await run(archive_of(topics, store), has_rows(store, 30))
    name = f"{topics.prefix}posts"
    await kafka.tool(TOPIC_TOOL, "--delete", "--topic", name)
    await kafka.tool(TOPIC_TOOL, "--create", "--topic", name, "--partitions", "3", *KEPT)
    await topics.write(events[30:])
    with pytest.raises(InputLostError, match="made anew"):
        await run(archive_of(topics, store), lambda: False)
    await run(archive_of(topics, store, accept_loss="yes"), has_rows(store, len(events)))
    assert stored(store) == wire(events)


async def test_files_whose_uploads_expired_are_made_anew_from_the_topics(
    kafka: KafkaBroker,
) -> None:
    topics, store, metrics = Topics(kafka.bootstrap), MemoryObjects(), Metrics()
    events = contract_events(SOURCE, 90)
    await topics.write(events[:30])
    await run(archive_of(topics, store), has_rows(store, 30))
    await topics.write(events[30:60])
    complete = store.complete

    async def fail(staged: Staged) -> None:
        if staged.key not in store.objects:
            raise StoreUnavailableError("memory:lake", 0, "it is a test")

    store.complete = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await run(archive_of(topics, store), lambda: False)
    store.complete = complete  # type: ignore[method-assign]
    record = await last_record(store, Shard("default"))
    assert record is not None
    assert record.files
    assert {file.staged.upload_id for file in record.files} <= set(store.pending)
    store.pending.clear()
    await topics.write(events[60:])
    await run(archive_of(topics, store, metrics=metrics), has_rows(store, len(events)))
    assert stored(store) == wire(events)
    assert metrics.lake.repaired_files.total == len(record.files)


async def test_brokers_that_are_away_are_named() -> None:
    with pytest.raises(KafkaUnavailableError, match=r"127\.0\.0\.1:1"):
        await run(archive_of(Topics("127.0.0.1:1"), MemoryObjects()), lambda: False)


async def test_a_stop_is_heard_while_the_store_is_away(kafka: KafkaBroker) -> None:
    """At the beginning, and in a commit: that one is given up after the time to drain."""
    topics, store = Topics(kafka.bootstrap), MemoryObjects()
    await topics.write(contract_events(SOURCE, 5))

    async def hang(*_: object, **__: object) -> None:
        await anyio.sleep_forever()

    store.open = hang  # type: ignore[method-assign]
    await run(archive_of(topics, store), lambda: True)
    late, staging = MemoryObjects(), anyio.Event()

    async def stage(*_: object) -> None:
        staging.set()
        await anyio.sleep_forever()

    late.stage = stage  # type: ignore[assignment]
    with pytest.raises(DrainTimeoutError):
        await run(archive_of(topics, late, drain_s=0.5), staging.is_set)
    assert stored(late) == []


def test_the_runner_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "KAFKA" not in name}
    done = subprocess.run(
        [sys.executable, str(ROOT / "runners" / "archive.py"), "--lake", str(tmp_path / "lake")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("BF-002: kafka_bootstrap_servers")
    assert done.stderr.count("\n") == 1
