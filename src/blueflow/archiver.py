"""Kafka's event topics to the shard of a lake, each event once."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from blueflow.errors import BlueflowError, DrainTimeoutError, InputLostError, RecordsGoneError, sole
from blueflow.health import Check
from blueflow.kafka.eventtopics import EventTopics
from blueflow.kafka.fetcher import STALL_TIMEOUT_S
from blueflow.kafka.lines import LineReader
from blueflow.kafka.watermark import Watermark
from blueflow.lake.describe import describe
from blueflow.lake.logrecord import Input, Lost
from blueflow.lake.shard import ShardLog, new_instance
from blueflow.lake.shardwriter import COMMIT_BYTES_MAX, COMMIT_INTERVAL_S, ShardWriter
from blueflow.logs import Throttle
from blueflow.pipeline import unless
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Mapping

    from blueflow.kafka.connection import Connection
    from blueflow.kafka.eventtopics import Layout
    from blueflow.kafka.lines import LineBatch
    from blueflow.lake.keeper import Keeper
    from blueflow.lake.layout import Shard
    from blueflow.lake.store import Store
    from blueflow.metrics import Metrics
    from blueflow.settings import Settings

_LOOK_S: Final = 60.0  # for topics and partitions that are new
_WAIT_S: Final = 5.0  # for topics that are not there yet
_PROGRESS_S: Final = 10.0
_STALE_S: Final = 120.0
_CLOSE_S: Final = 7.0

_logger = logging.getLogger(__name__)


class Archive:
    """Reads a shard's share of the partitions and writes it to the shard's part of a lake.

    Args:
        connection: the brokers.
        store: of the lake, not open yet.
        shard: reads the partitions whose number, divided by the number of shards, leaves its own.
        settings: the prefix of the topics, and how often to commit.
        metrics: where to count.
        keeper: compacts and tidies up meanwhile.
    """

    def __init__(
        self,
        connection: Connection,
        store: Store,
        shard: Shard,
        settings: Settings,
        metrics: Metrics,
        keeper: Keeper | None = None,
    ) -> None:
        self._connection, self._store, self._shard = connection, store, shard
        self._keeper = keeper
        self._settings, self._metrics = settings, metrics.lake
        self._topics = EventTopics(connection, settings.topic_prefix)
        self._accept_loss = settings.accept_loss == "yes"
        log = ShardLog(store, shard, reads="kafka", instance=new_instance(), clock=time.time)
        self._writer = ShardWriter(
            log,
            self._metrics,
            commit_interval_s=settings.commit_interval_s or COMMIT_INTERVAL_S,
            commit_bytes_max=settings.commit_bytes_max or COMMIT_BYTES_MAX,
            lateness_s=settings.lateness_s,
            accept_loss=self._accept_loss,
        )
        self._watermark: Watermark[tuple[str, int]] = Watermark()
        self._newest_ms = 0
        self._rejects = Throttle()
        self._records = 0
        self._moved_s = time.monotonic()
        self._state = "starting"

    async def until(self, stop: anyio.Event) -> None:
        """Read and write until `stop` is set; then publish everything taken.

        Raises:
            InputLostError: records were gone before they were read.
            DrainTimeoutError: the lake did not take everything in time.
            BlueflowError: Kafka or the store failed.
        """
        failure: BaseException | None = None
        try:
            if await unless(stop, self._begin(stop)) is None:
                _logger.info("stopped before anything began")
                return
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._show_progress)
                tasks.start_soon(self._end_in_time, stop)
                if self._keeper is not None:
                    tasks.start_soon(self._keeper.run)
                await unless(stop, self._read_until_stopped())
                if not self._writer.again:  # else it begins anew with the next start
                    await self._writer.flush()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failure = sole(group)
        finally:
            with anyio.move_on_after(_CLOSE_S, shield=True):
                await self._writer.close()
                await self._store.close()
        if failure is not None:
            raise failure  # outside of the handler, which would make the group its context

    async def _begin(self, stop: anyio.Event) -> bool | None:
        """Open the lake and take the shard over; None when stopped before there were events."""
        await self._store.open(create=True)
        simulated = await self._first_data(stop)
        if simulated is None:
            return None
        await describe(self._store, simulated=simulated)
        await self._writer.begin()
        return True

    def health(self) -> Check:
        """Say whether the archive works; what `/readyz` asks."""
        idle_s = time.monotonic() - self._moved_s
        if idle_s > _STALE_S:
            return Check(ok=False, reason=f"{self._state}; nothing moved for {idle_s:.0f} s")
        return Check(ok=self._state == "reading", reason=self._state)

    async def _first_data(self, stop: anyio.Event) -> bool | None:
        """Wait for events, and tell whether they are made up; None when stopped."""
        throttle = Throttle()
        while not stop.is_set():
            simulated = await self._topics.simulated()
            if simulated is not None:
                return simulated
            self._say("waiting for topics with events")
            if throttle.admit(time.time()) is not None:
                extra = {"topic_prefix": self._settings.topic_prefix}
                _logger.warning("there are no events to archive yet", extra=extra)
            with anyio.move_on_after(_WAIT_S):
                await stop.wait()
        return None

    async def _read_until_stopped(self) -> bool:
        await self._make_anew()
        while True:
            await self._read()

    async def _make_anew(self) -> None:
        """Read once more what files have to be made from whose upload the store has forgotten."""
        while left := list(self._writer.again):
            layout = await self._topics.layout()
            self._give_up_gone(layout)
            places = {name: again.reached.next for name, again in self._writer.again.items()}

            # What has been read goes on only with all: nothing is committed meanwhile.
            async def is_over(left: list[str] = left) -> bool:
                return list(self._writer.again) != left

            if places:
                state = "making lost files anew"
                await self._read_while(layout, places, is_over, state=state, only=places)
        await self._writer.flush()

    async def _read(self) -> None:
        """Read until topics or partitions are new."""
        layout = await self._topics.layout()
        self._check_ids(layout)
        looked_s = time.monotonic()

        async def is_over() -> bool:
            nonlocal looked_s
            if time.monotonic() - looked_s < _LOOK_S:
                return False
            looked_s = time.monotonic()
            try:
                return await self._topics.layout() != layout
            except BlueflowError as error:
                if not error.retryable:
                    raise
                _logger.warning("nobody tells whether topics are new", extra={"error": str(error)})
                return False  # what is read now tells sooner whether the brokers are away

        places = {name: one.next for name, one in self._writer.taken.items()}
        await self._read_while(layout, places, is_over, state="reading")

    async def _read_while(
        self,
        layout: Layout,
        places: Mapping[str, int],
        is_over: Callable[[], Awaitable[bool]],
        *,
        state: str,
        only: Container[str] | None = None,
    ) -> None:
        """Read partitions from the places given, others from their beginning, until it is over."""

        def wanted(topic: str, number: int) -> bool:
            ours = number % self._shard.total == self._shard.ordinal
            return ours and (only is None or _name(topic, number) in only)

        reader = LineReader(
            self._connection,
            frozenset(DATASETS),
            self._settings.topic_prefix,
            "oldest",
            {
                (topic, number): places[_name(topic, number)]
                for topic, count in layout.partitions.items()
                for number in range(count)
                if _name(topic, number) in places and wanted(topic, number)
            },
            stall_timeout_s=self._settings.stall_timeout_s or STALL_TIMEOUT_S,
            wanted=wanted,
        )
        self._watermark = Watermark()
        try:
            async with reader:
                self._say(state)
                while not await is_over():
                    await self._writer.room()
                    batch = await reader.poll()
                    if batch is not None:
                        self._take(batch, layout)
                    self._note(reader)
                    await self._writer.commit_if_due()
        except RecordsGoneError as error:
            self._lose(error, layout)

    def _take(self, batch: LineBatch, layout: Layout) -> None:
        name = _name(batch.topic, batch.partition)
        known = self._writer.taken.get(name, Input(0))
        time_us, topic_id = batch.newest_ms * 1000, layout.ids[batch.topic]
        after = Input(batch.next_offset, time_us, topic_id, known.generation)
        rejected = self._writer.add_lines(name, batch.lines, batch.offsets, after)
        self._records += len(batch.lines)
        self._newest_ms = max(self._newest_ms, batch.newest_ms)
        self._moved_s = time.monotonic()
        if rejected:
            self._metrics.rejected.inc(len(rejected))
            if self._rejects.admit(time.time()) is not None:
                first = rejected[0]
                extra = {
                    "topic": batch.topic,
                    "partition": batch.partition,
                    "offset": batch.offsets[first.index],
                    "problem": first.problem,
                    "rejected": len(rejected),
                }
                _logger.warning("a record is no event and is left out", extra=extra)

    def _note(self, reader: LineReader) -> None:
        """Note positions that moved without records, and up to when all is read."""
        positions, ends = reader.positions, reader.ends()
        for (topic, number), offset in positions.items():
            name = _name(topic, number)
            again = self._writer.again.get(name)
            before = again.reached if again else self._writer.taken.get(name)
            if before is not None and before.next < offset:
                self._writer.move(name, msgspec.structs.replace(before, next=offset))
        if self._newest_ms and not self._writer.again:
            now_ms = time.time_ns() // 1_000_000
            watermark_ms = self._watermark.step(self._newest_ms, positions, ends, now_ms)
            self._writer.expect_nothing_before(watermark_ms * 1000)
        if all(end is not None and positions[one] >= end for one, (end, _) in ends.items()):
            self._moved_s = time.monotonic()  # there is nothing more to read

    def _check_ids(self, layout: Layout) -> None:
        """Refuse to go on in a topic that was made anew: its offsets mean other records."""
        for name, one in list(self._writer.taken.items()):
            topic_id = self._new_id(layout, name, one)
            if topic_id:
                lost = Lost(name, one.next, one.next, "the topic was made anew")
                self._accept(lost)
                self._writer.skip(lost, Input(0, one.time_us, topic_id, one.generation + 1))

    def _give_up_gone(self, layout: Layout) -> None:
        """Refuse to make files anew from what is not there any more, or do without it."""
        for name, again in list(self._writer.again.items()):
            topic, _, number = name.rpartition("/")
            if int(number) >= layout.partitions.get(topic, 0):
                why = "the topic or the partition is not there"
            elif self._new_id(layout, name, again.reached):
                why = "the topic was made anew"
            else:
                continue
            self._accept(Lost(name, again.reached.next, again.until.next, why))
            self._writer.give_up(name)

    @staticmethod
    def _new_id(layout: Layout, name: str, known: Input) -> str:
        """Return a topic's id when it is not the one that was read; else nothing."""
        topic_id = layout.ids.get(name.rpartition("/")[0], "")
        return topic_id if known.topic_id and topic_id != known.topic_id else ""

    def _lose(self, error: RecordsGoneError, layout: Layout) -> None:
        """Stop, or go on behind what is gone, as the operator says."""
        name, truncated = error.partition, error.end < error.wanted
        why = "retention removed the records before they were archived"
        if truncated:
            why = "the partition ends before that: its records were removed, or the topic made anew"
        again = self._writer.again.get(name)
        if again is not None:
            end = again.until.next if truncated else min(error.oldest, again.until.next)
            self._accept(Lost(name, error.wanted, end, why))
            self._writer.give_up(name, None if truncated else error.oldest)
            return
        known = self._writer.taken.get(name, Input(0))
        topic_id = layout.ids.get(name.rpartition("/")[0], "")
        same = bool(topic_id) and topic_id == known.topic_id
        # Of the same topic the records that are left were read before they were the last ones.
        begin = error.end if truncated and same else error.oldest
        lost = Lost(name, error.wanted, max(begin, error.wanted), why)
        self._accept(lost)
        generation = known.generation + (begin < error.wanted)
        self._writer.skip(lost, Input(begin, known.time_us, topic_id, generation))

    def _accept(self, lost: Lost) -> None:
        if not self._accept_loss:
            raise InputLostError(lost.input, lost.first, lost.end, lost.why)
        extra = {"input": lost.input, "first": lost.first, "end": lost.end, "why": lost.why}
        _logger.warning("input is lost, and that is accepted", extra=extra)

    async def _end_in_time(self, stop: anyio.Event) -> None:
        """Bound what comes after a stop: a commit may hang in a store that is away."""
        await stop.wait()
        drain_s = self._settings.drain_s
        _logger.info("stopping: publishing everything", extra={"drain_s": drain_s})
        await anyio.sleep(drain_s)
        raise DrainTimeoutError(drain_s)

    async def _show_progress(self) -> None:
        records, then_s = self._records, time.monotonic()
        while True:
            await anyio.sleep(_PROGRESS_S)
            now_s = time.monotonic()
            extra = {
                "records": self._records,
                "records_per_s": round((self._records - records) / (now_s - then_s), 1),
                "behind_s": round(time.time() - self._newest_ms / 1000, 1)
                if self._newest_ms
                else None,
                "state": self._state,
            }
            records, then_s = self._records, now_s
            _logger.info("progress", extra=extra)

    def _say(self, state: str) -> None:
        self._state, self._moved_s = state, time.monotonic()


def _name(topic: str, number: int) -> str:
    return f"{topic}/{number}"
