"""What peers of blueflow fail at, against a real websocket server; and the source's own rules."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from websockets.asyncio.server import ServerConnection, serve

from blueflow.backoff import Backoff
from blueflow.errors import (
    FrameSizeError,
    FutureCursorError,
    RelayRefusedError,
    RelayUnavailableError,
    SequenceResetError,
    SourceUrlError,
)
from blueflow.events import Position, RepoOp
from blueflow.metrics import Metrics
from blueflow.pipeline import newest, pump
from blueflow.source.firehose import FirehoseSource
from blueflow.source.recorder import Recorder
from blueflow.testing.frames import read_recording
from blueflow.testing.ledger import Ledger
from blueflow.testing.memory import MemorySink
from blueflow.testing.network import SimulatedNetwork
from blueflow.testing.relay import RelaySettings, SimulatedRelay

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from blueflow.interfaces import Rejected
    from blueflow.testing.frames import NetworkFrame

EVENTS = 400
PACED = {"speed": 1, "rate": 1500.0}  # so that a fault meets a consumer that is not far behind
QUICK = Backoff(base_s=0.01, cap_s=0.05)
NETWORK = SimulatedNetwork(records=300, accounts=200)
FRAMES: list[NetworkFrame] = list(islice(NETWORK, EVENTS + 200))


class Collector:
    """A quarantine that keeps what it gets."""

    def __init__(self) -> None:
        self.rejected: list[Rejected] = []

    async def put(self, rejected: Sequence[Rejected], now_s: float) -> None:
        self.rejected += rejected


class Run:
    """One relay, one source, one sink, and what came of it."""

    def __init__(
        self,
        faults: str = "",
        *,
        events: int = EVENTS,
        frames: Iterable[NetworkFrame] = FRAMES,
        relay: dict[str, Any] | None = None,
        **source: Any,
    ) -> None:
        self.ledger = Ledger()
        settings = RelaySettings(limit=events, **(relay or {}))
        self.relay = SimulatedRelay(iter(frames), settings, faults=faults, ledger=self.ledger)
        self.metrics = Metrics()
        self.sink = MemorySink()
        self.quarantine = Collector()
        self.options = {"name": "sim", "backoff": QUICK, "connect_wait_s": 5.0, **source}
        self.source: FirehoseSource | None = None

    async def to_the_end(self, timeout_s: float = 25.0) -> None:
        async with self.relay:
            await self.until(self.relay.settings.limit or 0, timeout_s)

    async def until(self, events: int, timeout_s: float = 25.0) -> None:
        """Run until everything that the relay has issued so far, at least `events`, is taken."""
        self.source = FirehoseSource(self.relay.url, metrics=self.metrics, **self.options)
        stop = anyio.Event()
        watch = asyncio.create_task(self._stop_when(events, stop))
        try:
            with anyio.fail_after(timeout_s):
                await pump(
                    self.source,
                    self.sink,
                    stop=stop,
                    metrics=self.metrics,
                    quarantine=self.quarantine,  # type: ignore[arg-type]
                )
        finally:
            watch.cancel()

    async def _stop_when(self, events: int, stop: anyio.Event) -> None:
        log = self.relay.log
        while True:
            await anyio.sleep(0.01)
            position = newest(self.sink.durable, "sim")  # an epoch before it may have higher seqs
            if log.end >= events and position is not None and position.seq >= log.last_seq:
                stop.set()
                return

    def assert_delivered_is_issued(self, **how: Any) -> None:
        verdict = self.ledger.compare(self.sink.events, **how)
        assert verdict.ok, str(verdict)
        assert verdict.delivered > 0
        assert not self.relay.faults.unfired, self.relay.faults.unfired

    def count(self, family: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"blueflow_{family}", labels)
        assert value is not None, family
        return value

    @property
    def reasons(self) -> Counter[str]:
        return Counter(one.reason for one in self.quarantine.rejected)


async def test_everything_is_delivered_once_and_in_order() -> None:
    run = Run()
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.relay.stats.connections == 1
    assert run.count("source_frames_total") == EVENTS
    assert not run.quarantine.rejected


async def test_the_recorded_frames_come_through(recorded_frames: list[bytes]) -> None:
    from blueflow.testing.frames import read_network_frame  # noqa: PLC0415

    run = Run(frames=map(read_network_frame, recorded_frames), events=100)
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert len(run.sink.events) == 102


def test_seqs_are_far_above_32_bits() -> None:
    assert FRAMES[0].seq > 2**32


async def test_a_64_bit_cursor_survives_the_reconnect() -> None:
    first = 2**53 + 1
    frames = list(islice(SimulatedNetwork(first_seq=first, records=300, accounts=50), 100))
    run = Run("close:1001@50", frames=frames, events=100)
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.sink.events[-1].seq == frames[-1].seq > 2**53


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012, 1013])
@pytest.mark.parametrize("resume", ["inclusive", "exclusive"])
async def test_a_close_reconnects_from_the_cursor(code: int, resume: str) -> None:
    run = Run(f"close:{code}@100,close:{code}@250", relay={"resume": resume})
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason=f"closed_{code}") == 2
    assert run.count("source_duplicate_frames_total") == 0


@pytest.mark.parametrize("kind", ["garbage", "truncated", "text", "oversize"])
async def test_a_bad_frame_does_not_end_the_stream(kind: str) -> None:
    # One a run: a consumer that is behind gets two on one connection, and drops it for the first.
    run = Run(f"{kind}@100")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason="frame_error") == 1
    assert not run.quarantine.rejected  # after the reconnect they were there and good


async def test_the_same_bad_frame_after_the_reconnect_is_stepped_over() -> None:
    run = Run("garbage-stays@100,truncated-stays@150,text-stays@200,oversize-stays@250")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.reasons == {"frame": 4}
    assert run.count("source_reconnects_total", reason="frame_error") == 4


async def test_many_bad_frames_in_a_row_are_stepped_over() -> None:
    run = Run(",".join(f"garbage-stays@{at}" for at in range(100, 130)))
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.reasons == {"frame": 30}
    assert run.count("source_reconnects_total", reason="frame_error") < 30


@pytest.mark.parametrize("plan", ["slow@100", "error:ConsumerTooSlow@100"])
async def test_too_slow_is_told_and_survived(plan: str) -> None:
    run = Run(plan)
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason="too_slow") == 1


async def test_an_unknown_error_frame_reconnects() -> None:
    run = Run("error:Whatever@100")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason="error_frame") == 1


async def test_a_stall_is_noticed() -> None:
    run = Run("stall:60@100", stall_timeout_s=0.4)
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason="stalled") >= 1


async def test_a_half_open_connection_is_noticed() -> None:
    run = Run("half-open:60@100", ping_interval_s=0.3)
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason="ping_timeout") >= 1


async def test_unknown_types_and_ops_are_ignored_and_counted() -> None:
    run = Run("unknown-type@100,unknown-op@200")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_ignored_frames_total", reason="type") == 1
    assert run.count("source_ignored_frames_total", reason="op") == 1


async def test_a_gap_is_legal_and_counted() -> None:
    run = Run("gap:7@100")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_missed_seqs_total") == 7
    assert run.count("source_possible_loss_seqs_total") == 0


async def test_a_duplicate_is_delivered_once() -> None:
    run = Run("duplicate@100")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_duplicate_frames_total") == 1
    assert run.relay.stats.connections == 1


async def test_a_late_frame_is_delivered() -> None:
    run = Run("reorder@100")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_late_frames_total") == 1


async def test_a_remark_of_the_relay_is_counted() -> None:
    run = Run("info:OutdatedCursor@100")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_infos_total", name="OutdatedCursor") == 1


async def test_a_restarted_sequence_stops_with_an_error_that_names_the_choice() -> None:
    run = Run("close:1001@200,restart:1@200", relay=PACED)
    with pytest.raises(SequenceResetError, match="--on-sequence-reset continue"):
        await run.to_the_end()
    before = [entry for entry in run.ledger if entry.index < 200]
    assert {event.seq for event in run.sink.events} == {entry.seq for entry in before}


async def test_a_restarted_sequence_can_go_on_in_a_new_epoch() -> None:
    run = Run("close:1001@200,restart:1@200", relay=PACED, on_sequence_reset="continue")
    await run.to_the_end()
    sources = Counter(event.source for event in run.sink.events)
    assert set(sources) == {"sim", "sim#2"}
    # The relay did not know our cursor, so it went on live; nothing of what it then sent is lost.
    new = [entry.seq for entry in run.ledger if entry.index >= 200]
    had = [event.seq for event in run.sink.events if event.source == "sim#2"]
    assert had == [seq for seq in new if seq >= had[0]]
    assert set(run.sink.durable) == {"sim", "sim#2"}
    assert run.count("source_sequence_resets_total") == 1


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("corrupt-record@100", "hash"),
        ("corrupt-node@100", "hash"),
        ("missing-record@100", "missing_block"),
        ("bomb@100", "nesting"),
    ],
)
async def test_a_commit_that_cannot_be_trusted_is_quarantined_and_the_rest_goes_on(
    plan: str, reason: str
) -> None:
    run = Run(plan)
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert set(run.reasons) == {reason}
    assert run.relay.stats.connections == 1


async def test_check_used_finds_a_corrupted_record() -> None:
    run = Run("corrupt-record@100", check="used")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert set(run.reasons) == {"hash"}


async def test_the_cursor_passes_filtered_events() -> None:
    run = Run("close:1001@300", collections=["app.bsky.feed.post"])
    await run.to_the_end()
    run.assert_delivered_is_issued(wanted=lambda e: e.collection == "app.bsky.feed.post")
    assert run.sink.durable["sim"].seq == FRAMES[EVENTS - 1].seq
    assert run.count("pipeline_filtered_frames_total") > EVENTS / 2


async def test_filters_by_prefix_and_account() -> None:
    dids = Counter(event.did for frame in FRAMES[:EVENTS] for event in frame.events)
    wanted = dids.most_common(1)[0][0]
    run = Run(collections=["app.bsky.feed.*"], dids=[wanted])
    await run.to_the_end()
    assert run.sink.events
    for event in run.sink.events:
        assert isinstance(event, RepoOp)
        assert event.did == wanted
        assert event.collection.startswith("app.bsky.feed.")


@pytest.mark.parametrize("resume", ["inclusive", "exclusive"])
async def test_a_second_run_goes_on_where_the_first_ended(resume: str) -> None:
    run = Run(relay={"resume": resume, "speed": 1, "rate": 2000.0})
    async with run.relay:
        await run.until(150)
        first = len(run.sink.events)
        await run.until(EVENTS)
    assert 0 < first < len(run.sink.events)
    run.assert_delivered_is_issued()
    assert run.count("source_possible_loss_seqs_total") == 0


async def test_what_the_relay_no_longer_has_is_reported() -> None:
    run = Run(relay={"retention": 100, "lag_max": 90})
    run.sink.store.positions["sim"] = Position("sim", FRAMES[10].seq, 1)
    async with run.relay:
        run.relay.log.issue(EVENTS)
        await run.until(EVENTS)
    lost = FRAMES[EVENTS - 100].seq - FRAMES[10].seq - 1
    assert run.count("source_possible_loss_seqs_total") == lost


async def test_oldest_begins_with_the_oldest_event_kept() -> None:
    run = Run(cursor="oldest")
    async with run.relay:
        run.relay.log.issue(300)
        await run.until(EVENTS)
    run.assert_delivered_is_issued()


async def test_a_seq_as_cursor_begins_behind_it() -> None:
    after = FRAMES[100].seq
    run = Run(cursor=after)
    async with run.relay:
        run.relay.log.issue(300)
        await run.until(EVENTS)
    run.assert_delivered_is_issued(after=after)


async def test_the_relay_does_not_know_the_cursor() -> None:
    run = Run(cursor=2**60, relay={"future": "error"})
    with pytest.raises(FutureCursorError):
        await run.to_the_end()


async def test_429_waits_and_comes_back() -> None:
    run = Run("http:429/0@0,http:503@0")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_reconnects_total", reason="http_429") == 1
    assert run.count("source_reconnects_total", reason="http_error") == 1


@pytest.mark.parametrize("status", [501, 404, 400])
async def test_a_server_that_never_will_is_refused_at_once(status: int) -> None:
    run = Run(f"http:{status}@0")
    with pytest.raises(RelayRefusedError, match=str(status)):
        await run.to_the_end()


async def test_an_unreachable_relay_is_told_within_the_time_allowed() -> None:
    source = FirehoseSource("ws://127.0.0.1:1", connect_wait_s=0.2, backoff=QUICK)
    with pytest.raises(RelayUnavailableError, match="connect-wait"):
        await pump(source, MemorySink())


@pytest.mark.parametrize(
    "url", ["http://host", "ftp://host", "wss://", "ws://host:notaport", "ws://a..b"]
)
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(SourceUrlError):
        FirehoseSource(url)


@pytest.mark.parametrize("resume", ["inclusive", "exclusive"])
async def test_a_message_too_large_to_step_over_ends_the_run(resume: str) -> None:
    run = Run("oversize-stays:9000000@100", relay={"resume": resume})
    with pytest.raises(FrameSizeError):
        await run.to_the_end()
    assert run.sink.durable["sim"].seq == FRAMES[99].seq


async def test_reading_waits_while_the_sink_does() -> None:
    class SlowSink(MemorySink):
        async def write(self, events: Any, *, through: Position) -> None:
            await anyio.sleep(0.02)
            await super().write(events, through=through)

    run = Run(buffer_bytes_max=200_000)
    run.sink = SlowSink()
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.count("source_paused_seconds_total") > 0


async def test_a_sink_that_hangs_shows_while_it_does() -> None:
    run = Run(buffer_bytes_max=200_000, frames=FRAMES * 3, events=3 * EVENTS)
    seen: list[tuple[float, float]] = []

    class HangingSink(MemorySink):
        async def write(self, events: Any, *, through: Position) -> None:
            while len(self.events) > 20 and run.count("source_paused_seconds_total") < 0.5:
                seen.append((run.count("source_reading_paused"), run.count("source_buffer_bytes")))
                await anyio.sleep(0.05)
            await super().write(events, through=through)

    run.sink = HangingSink()
    await run.to_the_end()
    assert (seen[-1][0], seen[-1][1] > 200_000) == (1, True)
    assert run.count("source_reading_paused") == 0


async def test_a_consumer_that_was_given_up_comes_back_for_the_rest() -> None:
    run = Run(
        events=8000,
        relay={"lag_max": 1000, "retention": 10_000, "cycle": 500, "speed": 1, "rate": 6000.0},
        buffer_bytes_max=30_000,
    )

    class StalledSink(MemorySink):
        stalled = False

        async def write(self, events: Any, *, through: Position) -> None:
            if not self.stalled and len(self.events) > 50:
                self.stalled = True
                while not run.relay.stats.kicked:
                    await anyio.sleep(0.01)
            await super().write(events, through=through)

    run.sink = StalledSink()
    await run.to_the_end()
    run.assert_delivered_is_issued()
    assert run.relay.stats.kicked >= 1


async def test_stop_is_prompt_while_nothing_comes() -> None:
    run = Run(events=50)
    async with run.relay:
        source = FirehoseSource(run.relay.url, **run.options)
        await source.start(None)
        with anyio.fail_after(5):
            async for batch in source:
                if batch.through and batch.through.seq == FRAMES[49].seq:
                    await source.stop()


async def test_stop_leaves_no_connection_behind() -> None:
    run = Run()
    await run.relay.__aenter__()
    try:
        await run.until(EVENTS)
        with anyio.fail_after(5):
            while run.relay.consumers:
                await anyio.sleep(0.01)
    finally:
        await run.relay.__aexit__(None, None, None)


async def test_a_crash_right_after_a_live_start_loses_nothing() -> None:
    class CrashingSink(MemorySink):
        async def write(self, events: Any, *, through: Position) -> None:
            await super().write(events, through=through)
            if len(self.events) >= 1:  # the first batch is durable: buffered, yet flushed at once
                raise ValueError("a crash")

    run = Run(relay=PACED)
    run.sink = CrashingSink(buffered=True)
    async with run.relay:
        with pytest.raises(ValueError, match="a crash"):
            await run.until(EVENTS)
        run.sink = MemorySink(store=run.sink.store)
        await run.until(EVENTS)
    run.assert_delivered_is_issued()


@pytest.mark.parametrize("slow", [False, True])
async def test_behind_a_restarted_sequence_nothing_is_taken(*, slow: bool) -> None:
    class SlowSink(MemorySink):
        async def write(self, events: Any, *, through: Position) -> None:
            await anyio.sleep(0.05 if slow else 0)
            await super().write(events, through=through)

    run = Run("restart:1@200", events=600)
    run.sink = SlowSink()
    with pytest.raises(SequenceResetError):
        await run.to_the_end()
    before = {entry.seq for entry in run.ledger if entry.index < 200}
    assert {event.seq for event in run.sink.events} == before
    assert run.sink.durable["sim"].seq == max(before)


async def test_a_cursor_that_was_never_issued_is_told_although_the_relay_goes_on_live() -> None:
    run = Run(cursor=2**50)
    with pytest.raises(FutureCursorError, match=str(2**50)):
        await run.to_the_end()
    assert not run.sink.durable


async def test_a_quiet_relay_that_restarts_is_waited_for() -> None:
    run = Run(events=20, relay={"wait_for_consumer": False}, connect_wait_s=0.2)
    port = 0
    async with SimulatedRelay(iter(()), RelaySettings(limit=1)) as quiet:
        port = int(quiet.url.rpartition(":")[2])
        source = FirehoseSource(quiet.url, metrics=run.metrics, **run.options)
        task = asyncio.create_task(pump(source, run.sink, limit=1))
        with anyio.fail_after(5):
            while not source.connected:
                await anyio.sleep(0.01)
    await anyio.sleep(0.5)  # longer than the first connection may take
    assert not task.done()
    again = SimulatedRelay(iter(FRAMES), RelaySettings(limit=20, port=port))
    async with again:
        with anyio.fail_after(10):
            await task
    assert run.sink.events


async def test_a_flood_of_remarks_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    run = Run("info:Chatter@100x300,info:Chatter@150x300")
    await run.to_the_end()
    run.assert_delivered_is_issued()
    said = [one for one in caplog.records if "remarks" in one.message]
    assert 0 < len(said) < 20


async def test_an_empty_message_does_not_spoil_a_recording(tmp_path: Path) -> None:
    """It is no frame: the second time it is stepped over, and what comes behind it is recorded."""
    metrics, path = Metrics(), tmp_path / "frames.bin"

    async def send(connection: ServerConnection) -> None:
        assert connection.request is not None
        cursor = int(connection.request.path.partition("cursor=")[2] or 0)
        for number, one in enumerate(FRAMES[:10]):
            if number == 3 and cursor <= FRAMES[3].seq:
                await connection.send(b"")
            if one.seq > cursor:
                await connection.send(one.data)
        await connection.wait_closed()

    async with serve(send, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        recorder = Recorder(path, metrics)
        source = FirehoseSource(f"ws://127.0.0.1:{port}", backoff=QUICK, recorder=recorder)
        await source.start(None)
        with anyio.fail_after(20):
            async for _ in source:
                if source.position is not None and source.position.seq == FRAMES[9].seq:
                    break
        await source.stop()
    assert [frame.seq for frame in read_recording(path)] == [one.seq for one in FRAMES[:10]]
