"""`blueflow.firehose`: every event, the cursor file, and nothing left behind."""

# ruff: noqa: ASYNC240 - the files of these tests are small

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import blueflow
import blueflow.cursorfile
import blueflow.syncreader
from blueflow.client import Firehose
from blueflow.errors import (
    CursorError,
    CursorFileError,
    OutputNotWritableError,
    RecordingError,
    SettingError,
    SourceUrlError,
)
from blueflow.events import Position, RepoOp, encode_lines
from blueflow.interfaces import Batch, Rejected
from blueflow.testing.contracts import contract_events
from blueflow.testing.memory import ListSource, batches_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from blueflow.events import Event

FRAMES = Path(__file__).parent / "data" / "firehose" / "frames.bin"
URL = f"replay:{FRAMES}"
FIRST_SEQ = 31_527_015_322
OPERATIONS = 102
NAME = "list.example"
EVENTS = contract_events(NAME, 30)


@pytest.fixture
def cursor(tmp_path: Path) -> Path:
    return tmp_path / "my.cursor"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save at every chance."""
    monkeypatch.setattr(blueflow.cursorfile, "SAVE_S", 0.0)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "blueflow-firehose"]
    assert left == []


def position_in(path: Path) -> Position:
    return msgspec.json.decode(path.read_bytes(), type=Position)


def listed(*, size: int = 7, cursor: Path | None = None, **options: Any) -> Firehose:
    """Return a stream of made-up events."""
    return Firehose(ListSource(batches_of(EVENTS, size), **options), cursor)


# What comes


async def test_events_come_one_by_one_and_in_order() -> None:
    async with blueflow.firehose(URL) as events:
        seqs = [event.seq async for event in events]
    assert len(seqs) == OPERATIONS
    assert seqs == sorted(seqs)
    assert set(seqs) == set(range(FIRST_SEQ, FIRST_SEQ + 100))


async def test_batches_are_the_same_events() -> None:
    async with blueflow.firehose(URL) as stream:
        one_by_one = [event async for event in stream]
    async with blueflow.firehose(URL) as stream:
        lists = [batch async for batch in stream.batches()]
    assert [event for batch in lists for event in batch] == one_by_one
    assert all(lists)
    assert list(blueflow.firehose(URL).sync()) == one_by_one


async def test_only_what_is_wanted_comes() -> None:
    posts = blueflow.firehose(URL, collections=["app.bsky.feed.post"])
    async with posts:
        found = [post async for post in posts if isinstance(post, RepoOp)]
    assert {post.collection for post in found} == {"app.bsky.feed.post"}
    by_name = list(blueflow.firehose(URL, collections="app.bsky.feed.post").sync())
    assert by_name == found
    by_set = list(blueflow.firehose(URL, collections={"app.bsky.feed.post"}).sync())
    assert by_set == found
    did = found[0].did
    assert {event.did for event in blueflow.firehose(URL, dids=[did]).sync()} == {did}


async def test_a_post_becomes_a_model_on_demand() -> None:
    async with blueflow.firehose(URL, collections=["app.bsky.feed.post"]) as posts:
        async for post in posts:
            assert isinstance(post, RepoOp)
            if post.record:
                assert post.model().text == post.record["text"]
                break


@pytest.mark.parametrize("limit", [0, 1, 50, OPERATIONS, OPERATIONS + 1])
def test_sync_ends_after_its_limit(limit: int) -> None:
    found = list(blueflow.firehose(URL).sync(limit=limit))
    assert len(found) == min(limit, OPERATIONS)


async def test_sync_works_where_a_loop_is_running() -> None:
    assert len(list(blueflow.firehose(URL).sync(limit=20))) == 20


async def test_ways_of_reading_can_be_mixed_and_lose_nothing() -> None:
    async with listed() as stream:
        found = [await anext(stream), await anext(stream)]
        async for events in stream.batches():
            found += events
            break
        async for event in stream:
            found.append(event)
            if len(found) % 5 == 0:
                break
        async for events in stream.batches():
            found += events
    assert found == EVENTS


async def test_a_wait_that_is_cancelled_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "slow.jsonl"
    path.write_bytes(encode_lines(contract_events("x", 3, step_us=150_000)))
    found: list[Event] = []
    timeouts = 0
    async with blueflow.firehose(f"replay:{path}", speed=1) as stream:
        while len(found) < 4:
            try:
                found.append(await asyncio.wait_for(anext(stream), 0.03))
            except TimeoutError:
                timeouts += 1
    assert found == contract_events("x", 3)[:4] or len(found) == 4
    assert [event.seq for event in found] == [1, 2, 3, 3]
    assert timeouts > 0


# The cursor file


@pytest.mark.usefixtures("at_once")
async def test_the_cursor_moves_when_the_next_event_is_asked_for(cursor: Path) -> None:
    stream = listed(cursor=cursor)
    seqs: list[int] = []
    async with stream:
        for _ in range(15):
            event = await anext(stream)
            await saved(stream)
            handled = position_in(cursor).seq if cursor.exists() else 0
            assert handled < event.seq  # what is in the user's hands is not handled yet
            assert handled >= max((seq for seq in seqs if seq < seqs[-1]), default=0)
            seqs.append(event.seq)
    assert position_in(cursor).seq < seqs[-1]


async def saved(stream: Firehose) -> None:
    """Wait for a save that is under way."""
    assert stream._cursor is not None
    if stream._cursor._saving is not None:
        await asyncio.wait([stream._cursor._saving])


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("stop_at", range(1, len(EVENTS) + 1, 3))
async def test_an_event_whose_handling_fails_comes_again_and_none_is_lost(
    cursor: Path, size: int, stop_at: int
) -> None:
    handled: list[Event] = []

    async def handle(stream: Firehose) -> None:
        async for event in stream:
            if len(handled) == stop_at - 1:
                raise ZeroDivisionError(event.seq)
            handled.append(event)

    with pytest.raises(ZeroDivisionError) as caught:
        async with listed(size=size, cursor=cursor) as stream:
            await handle(stream)
    async with listed(size=size, cursor=cursor) as stream:
        again = [event async for event in stream]
    assert again[0].seq == caught.value.args[0]  # the whole commit, at most
    assert again == EVENTS[len(EVENTS) - len(again) :]
    assert len(handled) + len(again) <= len(EVENTS) + 1


async def test_a_stream_read_to_its_end_is_handled_whole(cursor: Path) -> None:
    for expected in (OPERATIONS, 0):
        async with blueflow.firehose(URL, cursor=cursor) as stream:
            assert len([event async for event in stream]) == expected
    assert position_in(cursor).source == "frames.bin"
    assert position_in(cursor).seq == FIRST_SEQ + 99


async def test_the_cursor_of_batches_moves_with_the_next_batch(cursor: Path) -> None:
    async with listed(cursor=cursor) as stream:
        lists = stream.batches()
        first, second = await anext(lists), await anext(lists)
        await lists.aclose()
    assert position_in(cursor).seq == first[-1].seq
    async with listed(cursor=cursor) as stream:
        assert (await anext(stream.batches()))[0].seq == second[0].seq


@pytest.mark.parametrize("limit", [1, 5, 9, len(EVENTS)])
def test_sync_goes_on_where_it_was(cursor: Path, limit: int) -> None:
    found: list[Event] = []
    while part := list(listed(cursor=cursor).sync(limit=limit)):
        found += part
        if limit == 1:  # a limit within a commit: the commit comes again, nobody can split it
            break
    assert found[:limit] == EVENTS[:limit]
    assert {event.seq for event in found} == {event.seq for event in EVENTS} or limit == 1


def test_sync_counts_the_event_in_hand_as_not_handled(cursor: Path) -> None:
    for event in listed(cursor=cursor).sync():
        if event.seq == 9:
            break
    assert position_in(cursor).seq == 8
    assert next(iter(listed(cursor=cursor).sync())).seq == 9


@pytest.mark.usefixtures("at_once")
def test_sync_saves_on_the_way(cursor: Path) -> None:
    for event in listed(cursor=cursor).sync():
        handled = position_in(cursor).seq if cursor.exists() else 0
        assert handled in {event.seq - 1, event.seq - 2, max(0, handled)}
        assert handled < event.seq
    assert position_in(cursor).seq == EVENTS[-1].seq


@pytest.mark.usefixtures("at_once")
async def test_the_cursor_moves_past_what_is_not_wanted(cursor: Path) -> None:
    class Filtered(ListSource):
        async def __aiter__(self) -> AsyncIterator[Batch]:
            for seq in count(1):
                await asyncio.sleep(0)
                yield Batch((), Position(NAME, seq), 1)

    async with Firehose(Filtered([]), cursor) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        with anyio.fail_after(10):
            while not cursor.exists() or position_in(cursor).seq < 10:
                await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_a_late_event_is_not_covered_before_it_is_handled(cursor: Path) -> None:
    late = [EVENTS[0], EVENTS[3], EVENTS[1], EVENTS[5]]
    source = ListSource([Batch(late, Position(NAME, late[3].seq, 0))])
    async with Firehose(source, cursor) as stream:
        await anext(stream)
        await anext(stream)
        await anext(stream)  # two are handled, and the third is older than the second
    assert position_in(cursor).seq == EVENTS[0].seq


async def test_lines_are_resumed_by_their_number(cursor: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode_lines(EVENTS))
    async with blueflow.firehose(f"replay:{path}", cursor=cursor) as stream:
        for _ in range(8):
            await anext(stream)
    assert position_in(cursor) == Position("events.jsonl", 7, EVENTS[6].time_us)
    rest = list(blueflow.firehose(f"replay:{path}", cursor=cursor).sync())
    assert rest == EVENTS[7:]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"31527015322", b'{"source": "frames.bin"}', b"\xff\xfe", b'{"source":1,"seq":2}'],
)
async def test_a_damaged_cursor_file_is_refused_and_left_alone(
    cursor: Path, content: bytes
) -> None:
    cursor.write_bytes(content)
    with pytest.raises(CursorFileError, match="it holds no position") as caught:
        await blueflow.firehose(URL, cursor=cursor).start()
    assert isinstance(caught.value, CursorError)
    with pytest.raises(CursorFileError):
        list(blueflow.firehose(URL, cursor=cursor).sync())
    assert cursor.read_bytes() == content


async def test_a_cursor_file_of_another_source_is_refused_and_left_alone(cursor: Path) -> None:
    content = b'{"source":"bsky.network","seq":5,"time_us":6}'
    cursor.write_bytes(content)
    with pytest.raises(CursorFileError, match=r"is of bsky\.network, not of frames\.bin"):
        async with blueflow.firehose(URL, cursor=cursor):
            pytest.fail("it began")
    assert cursor.read_bytes() == content


async def test_an_epoch_of_the_source_is_the_same_source(cursor: Path) -> None:
    cursor.write_bytes(msgspec.json.encode(Position(f"{NAME}#2", 5)))
    source = ListSource([])
    async with Firehose(source, cursor):
        assert source._after == Position(f"{NAME}#2", 5)


async def test_a_cursor_file_without_a_place_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritableError, match="its folder does not exist"):
        await blueflow.firehose(URL, cursor=tmp_path / "no" / "my.cursor").start()
    with pytest.raises(CursorFileError, match="Is a directory"):
        await blueflow.firehose(URL, cursor=tmp_path).start()


@pytest.mark.usefixtures("at_once")
async def test_a_cursor_file_that_cannot_be_written_any_more_ends_the_loop(cursor: Path) -> None:
    (cursor.parent / "my.cursor.new").mkdir()
    with pytest.raises(OutputNotWritableError):  # noqa: PT012 - the next event or the end tells
        async with listed(cursor=cursor) as stream:
            async for _ in stream:
                await saved(stream)
    with pytest.raises(OutputNotWritableError):
        list(listed(cursor=cursor).sync())
    assert not cursor.exists()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("by_batches", [False, True])
async def test_a_save_that_fails_costs_a_program_that_goes_on_no_event(
    cursor: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    by_batches: bool,
) -> None:
    blocked, failed = cursor.parent / "my.cursor.new", 0
    got: list[Event] = []
    async with listed(size=3, cursor=cursor) as stream:
        take = stream._take_batch

        async def take_slowly() -> None:
            await take()
            await saved(stream)  # so that it fails while a batch is waited for

        monkeypatch.setattr(stream, "_take_batch", take_slowly)
        while True:
            await saved(stream)
            if failed and blocked.is_dir():
                blocked.rmdir()
            elif len(got) >= 9 and not failed and not blocked.is_dir():
                blocked.mkdir()  # saving fails for a while
            try:
                if by_batches:
                    got += await anext(stream.batches())
                else:
                    got.append(await anext(stream))
            except OutputNotWritableError:
                failed += 1
            except StopAsyncIteration:
                break
    assert failed
    assert got == EVENTS
    assert position_in(cursor).seq == EVENTS[-1].seq


@pytest.mark.usefixtures("at_once")
async def test_the_last_save_is_tried_although_the_one_before_it_failed(cursor: Path) -> None:
    stream = await listed(size=3, cursor=cursor).start()
    await anext(stream)
    (cursor.parent / "my.cursor.new").mkdir()
    got = [await anext(stream) for _ in range(3)]  # the save of the first one fails meanwhile
    await saved(stream)
    (cursor.parent / "my.cursor.new").rmdir()
    await stream.stop()
    assert position_in(cursor).seq == got[-1].seq - 1  # the last one is in hand


@pytest.mark.parametrize(
    ("given", "first"), [(FIRST_SEQ + 50, 51), (f"{FIRST_SEQ + 60}", 61), ("oldest", 0)]
)
async def test_a_cursor_can_be_a_seq_or_a_word(given: str | int, first: int) -> None:
    async with blueflow.firehose(URL, cursor=given) as stream:
        assert (await anext(stream)).seq == FIRST_SEQ + first
    assert not Path(str(given)).exists()


async def test_a_path_is_a_file_whatever_its_name(tmp_path: Path) -> None:
    for name in ("live", "123"):
        async with blueflow.firehose(URL, cursor=Path(name)) as stream:
            await anext(stream)
            await anext(stream)
        assert position_in(tmp_path / name).seq == FIRST_SEQ


# Wrong use


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"chek": "used"}, "no such setting"),
        ({"limit": 10}, "sync takes a limit"),
        ({"sink": "stdout"}, "not about a source"),
        ({"check": "most"}, "is none of all, used, none"),
        ({"collections": ["post"]}, "is no collection"),
        ({"dids": ["me"]}, "is no DID"),
        ({"cursor": -1}, "is neither saved, live, oldest nor a seq"),
        ({"stall_timeout_s": "soon"}, "is not a duration"),
    ],
)
def test_a_setting_that_is_wrong_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError, match=told) as caught:
        blueflow.firehose(URL, **settings)
    assert "blueflow.firehose" in str(caught.value)


def test_the_environment_and_the_file_of_commands_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blueflow.toml").write_text("this is no TOML")
    monkeypatch.setenv("BLUEFLOW_COLLECTIONS", "app.bsky.feed.like")
    assert len(list(blueflow.firehose(URL).sync())) == OPERATIONS


def test_none_is_the_default() -> None:
    assert len(list(blueflow.firehose(URL, stall_timeout_s=None, cursor=None).sync())) == OPERATIONS


def test_a_source_that_is_none() -> None:
    with pytest.raises(SourceUrlError):
        blueflow.firehose("bsky.network")


async def test_a_recording_that_is_not_there_is_told_where_it_is_read() -> None:
    with pytest.raises(RecordingError):
        await anext(blueflow.firehose("replay:none"))
    with pytest.raises(RecordingError):
        list(blueflow.firehose("replay:none").sync())


async def test_a_stream_is_read_once() -> None:
    stream = await blueflow.firehose(URL).start()
    assert await stream.start() is stream
    with pytest.raises(RuntimeError, match="async for"):
        stream.sync()
    await stream.stop()
    await stream.stop()
    assert [event async for event in stream] == []
    assert [events async for events in stream.batches()] == []
    with pytest.raises(RuntimeError, match="read once"):
        await stream.start()


async def test_a_stop_in_the_middle_ends_the_loop(cursor: Path) -> None:
    async with listed(cursor=cursor) as stream:
        found = []
        async for event in stream:
            found.append(event)
            if len(found) == 3:
                await stream.stop()
    assert found == EVENTS[:3]
    assert [event.seq for event in found] == [1, 2, 3]
    assert position_in(cursor).seq == 2


# Input that cannot be read


async def test_input_that_cannot_be_read_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rejected = Rejected(NAME, 1, 2, None, "cbor", "broken\n" + "x" * 500, b"private")
    batch = Batch((), Position(NAME, 9), 100, 100, [rejected] * 100)
    assert [event async for event in Firehose(ListSource([batch]), None)] == []
    assert list(Firehose(ListSource([batch]), None).sync()) == []
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(records) <= 12
    assert vars(records[0])["reason"] == "cbor"
    assert "\n" not in vars(records[0])["detail"]
    assert "private" not in caplog.text


# Nothing is left behind


class Relay:
    """A websocket server that sends the recorded frames for ever and counts connections."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames = frames
        self.open = self.total = 0
        self.url = ""

    async def serve(self, connection: ServerConnection) -> None:
        self.open += 1
        self.total += 1
        with suppress(ConnectionClosed):
            for frame in self.frames:
                await connection.send(frame)
            await connection.wait_closed()
        self.open -= 1

    async def until_closed(self) -> None:
        with anyio.fail_after(10):
            while self.open:
                await asyncio.sleep(0.005)
        assert self.total > 0


@pytest.fixture
def relay(recorded_frames: list[bytes]) -> Relay:
    return Relay(recorded_frames)


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[str]:
    async with serve(relay.serve, "127.0.0.1", 0, compression=None) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if "firehose" in task.get_name()}


async def with_block(url: str) -> None:
    async with blueflow.firehose(url) as stream:
        async for _ in stream:
            break


async def with_an_error(url: str) -> None:
    with suppress(ZeroDivisionError):
        async with blueflow.firehose(url) as stream:
            async for _ in stream:
                raise ZeroDivisionError


async def start_and_stop(url: str) -> None:
    stream = await blueflow.firehose(url).start()
    await anext(stream)
    await stream.stop()


async def no_block(url: str) -> None:
    async for _ in blueflow.firehose(url):
        break


async def no_block_and_batches(url: str) -> None:
    async for _ in blueflow.firehose(url).batches():
        break


async def forgotten(url: str) -> None:
    stream = await blueflow.firehose(url).start()
    await anext(stream)


async def in_a_thread(url: str) -> None:
    def read() -> None:
        for _ in blueflow.firehose(url).sync():
            break

    await asyncio.to_thread(read)


async def in_a_thread_forgotten(url: str) -> None:
    def read() -> None:
        next(iter(blueflow.firehose(url).sync()))

    await asyncio.to_thread(read)


async def cancelled(url: str) -> None:
    reading = asyncio.ensure_future(_read_all(url))
    await asyncio.sleep(0.3)
    reading.cancel()
    await asyncio.wait([reading])


async def _read_all(url: str) -> None:
    async with blueflow.firehose(url) as stream:
        async for _ in stream:
            pass


@pytest.mark.parametrize(
    "read",
    [
        with_block, with_an_error, start_and_stop, no_block, no_block_and_batches, forgotten,
        in_a_thread, in_a_thread_forgotten, cancelled,
    ],
)  # fmt: skip
async def test_no_connection_and_no_task_is_left(relay: Relay, read: Callable[[str], Any]) -> None:
    async with running(relay) as url:
        await read(url)
        gc.collect()
        await relay.until_closed()
        with anyio.fail_after(10):
            while tasks():
                await asyncio.sleep(0.005)
    assert relay.total == 1


async def test_a_forgotten_stream_still_saves_its_place(cursor: Path) -> None:
    async for event in listed(cursor=cursor):
        if event.seq == 9:
            break
    gc.collect()
    with anyio.fail_after(10):
        while not cursor.exists():
            await asyncio.sleep(0.001)
    assert position_in(cursor).seq == 8


async def test_a_start_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ListSource([])

    async def fail(_: object) -> None:
        await asyncio.sleep(0)
        raise RecordingError("x", -1, "gone")

    monkeypatch.setattr(source, "start", fail)
    with pytest.raises(RecordingError):
        await Firehose(source, None).start()
    assert source._stopped.is_set()


async def test_a_stop_while_it_starts_leaves_nothing(relay: Relay, cursor: Path) -> None:
    async with running(relay) as url:
        for ticks in range(1, 12):
            stream = blueflow.firehose(url, source_name="frames.bin", cursor=cursor)
            starting = asyncio.create_task(stream.start())
            for _ in range(ticks):
                await asyncio.sleep(0)
            await stream.stop()
            await starting
            await stream.stop()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert not tasks()


def test_a_loop_over_sync_that_fails_ends_its_thread() -> None:
    def fail() -> None:
        for event in listed(endless=True).sync():
            raise ZeroDivisionError(event.seq)

    with pytest.raises(ZeroDivisionError):
        fail()
    gc.collect()  # the fixture looks for the thread


def test_an_error_of_the_source_comes_out_of_sync() -> None:
    class Failing(ListSource):
        async def __aiter__(self) -> AsyncIterator[Batch]:
            async for batch in super().__aiter__():
                yield batch
            raise RecordingError("x", 7, "damaged")

    found: list[Event] = []
    with pytest.raises(RecordingError):
        found.extend(Firehose(Failing(batches_of(EVENTS, 7)), None).sync())
    assert found == EVENTS
