"""Making lost files anew from partitions, over brokers that do what real ones do seldom.

The rest of the archive is tested over a real broker, in `integration/test_archive.py`.
"""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import anyio
import pyarrow.parquet as pq
import pytest

from blueflow import archiver
from blueflow.errors import InputLostError, RecordsGoneError, StoreUnavailableError
from blueflow.events import RepoOp, encode_event
from blueflow.kafka.eventtopics import Layout
from blueflow.kafka.lines import LineBatch
from blueflow.lake.layout import Shard
from blueflow.lake.logrecord import Input
from blueflow.metrics import Metrics
from blueflow.settings import Settings
from blueflow.testing.lakestore import MemoryObjects
from blueflow.testing.samples import HOUR_US, T0_US

if TYPE_CHECKING:
    from collections.abc import Callable

    from blueflow.lake.logrecord import Staged

POSTS, LIKES = ("bluesky.posts", 0), ("bluesky.likes", 0)
HERE = Shard("default")


class Partition:
    def __init__(self) -> None:
        self.lines: dict[int, bytes] = {}
        self.begin = self.end = 0

    def put(self, seqs: range, *, step_us: int = 1000) -> None:
        for seq in seqs:
            event = RepoOp(
                *("relay.example", seq, 0, "did:plc:a", T0_US + seq * step_us, f"3l{seq:011d}"),
                *("create", "app.bsky.feed.post", f"k{seq}", "bafy", {"text": "x"}),
            )
            self.lines[self.end] = encode_event(event)
            self.end += 1

    def mark(self) -> None:
        """End a transaction: an offset that no reader is handed."""
        self.end += 1

    def forget_before(self, offset: int) -> None:
        self.begin = offset
        self.lines = {at: line for at, line in self.lines.items() if at >= offset}

    def cut_to(self, end: int) -> None:
        self.end = end
        self.lines = {at: line for at, line in self.lines.items() if at < end}


class Brokers:
    """Stand in for `EventTopics` and `LineReader`, to the extent that an archive uses them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.partitions: dict[tuple[str, int], Partition] = {POSTS: Partition(), LIKES: Partition()}
        self.ids = {topic: f"id of {topic}" for topic, _ in self.partitions}
        self.hang = False
        monkeypatch.setattr(archiver, "EventTopics", lambda *_: self)
        monkeypatch.setattr(
            archiver, "LineReader", lambda *args, **more: Reader(self, args[4], **more)
        )

    async def simulated(self) -> bool:
        return False

    async def layout(self) -> Layout:
        return Layout(dict.fromkeys((topic for topic, _ in self.partitions), 1), dict(self.ids))


class Reader:
    def __init__(
        self,
        brokers: Brokers,
        positions: dict[tuple[str, int], int],
        *,
        wanted: Callable[[str, int], bool],
        **_: object,
    ) -> None:
        self._brokers = brokers
        self.positions = {
            name: positions.get(name, one.begin)
            for name, one in brokers.partitions.items()
            if wanted(*name)
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    def ends(self) -> dict[tuple[str, int], tuple[int, int]]:
        return {name: (self._brokers.partitions[name].end, 2**50) for name in self.positions}

    async def poll(self) -> LineBatch | None:
        await anyio.sleep(0.005)
        if self._brokers.hang:
            await anyio.sleep_forever()
        for name, at in self.positions.items():
            one = self._brokers.partitions[name]
            if not one.begin <= at <= one.end:
                raise RecordsGoneError(f"{name[0]}/{name[1]}", at, one.begin, one.end)
            offsets = sorted(offset for offset in one.lines if offset >= at)[:7]
            if offsets:
                self.positions[name] = offsets[-1] + 1
                lines = [one.lines[offset] for offset in offsets]
                return LineBatch(*name, lines, offsets, offsets[-1] + 1, T0_US // 1000)
            self.positions[name] = one.end
        return None


@pytest.fixture
def brokers(monkeypatch: pytest.MonkeyPatch) -> Brokers:
    return Brokers(monkeypatch)


@pytest.fixture
def store() -> MemoryObjects:
    return MemoryObjects()


def seqs(store: MemoryObjects) -> Counter[int]:
    """Count how often each row is in a file that a glob finds."""
    found: Counter[int] = Counter()
    for key, data in store.objects.items():
        if key.endswith(".parquet"):
            found.update(pq.read_table(io.BytesIO(data), columns=["seq"])["seq"].to_pylist())
    return found


async def run(
    store: MemoryObjects,
    until: Callable[[archiver.Archive], bool] | None = None,
    *,
    accept_loss: str = "no",
) -> archiver.Archive:
    """Run an archive until it has what it should, stop it, and return it."""
    settings = Settings(commit_interval_s=0.05, accept_loss=accept_loss, drain_s=2.0)
    connection: Any = None
    archive = archiver.Archive(connection, store, HERE, settings, Metrics(), None)
    stop = anyio.Event()
    with anyio.fail_after(20):
        task = asyncio.create_task(archive.until(stop))
        try:
            while until is not None and not until(archive) and not task.done():
                await anyio.sleep(0.01)
            stop.set()
            await task
        finally:
            task.cancel()
    return archive


def has(store: MemoryObjects, *expected: range) -> Callable[[archiver.Archive], bool]:
    wanted = Counter(seq for some in expected for seq in some)
    return lambda archive: seqs(store) == wanted and not archive._writer.again


async def lose_uploads(
    store: MemoryObjects, *, keep: Callable[[str], bool] = lambda _: False
) -> None:
    """Run until a commit is decided whose uploads, but for some, nobody can complete any more."""
    complete = store.complete

    async def fail(staged: Staged) -> None:
        if staged.key in store.objects or keep(staged.key):
            await complete(staged)
            return
        raise StoreUnavailableError("memory:lake", 0, "it is a test")

    store.complete = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        await run(store, lambda _: False)
    store.complete = complete  # type: ignore[method-assign]
    assert store.pending
    store.pending.clear()


async def test_a_range_of_control_records_only_is_passed(
    brokers: Brokers, store: MemoryObjects
) -> None:
    posts, likes = brokers.partitions[POSTS], brokers.partitions[LIKES]
    posts.put(range(10))
    likes.put(range(100, 110))
    await run(store, has(store, range(10), range(100, 110)))
    posts.put(range(10, 20))
    likes.mark()
    await lose_uploads(store)
    assert len(seqs(store)) == 20
    await run(store, has(store, range(20), range(100, 110)))


async def test_an_archive_that_makes_files_anew_is_not_ready(
    brokers: Brokers, store: MemoryObjects
) -> None:
    brokers.partitions[POSTS].put(range(10))
    await lose_uploads(store)
    brokers.hang = True
    archive = await run(store, lambda archive: archive.health().reason.startswith("making"))
    assert not archive.health().ok


async def test_a_stop_is_heard_while_the_brokers_say_nothing(
    brokers: Brokers, store: MemoryObjects
) -> None:
    brokers.partitions[POSTS].put(range(10))
    await run(store, has(store, range(10)))
    brokers.hang = True
    archive = await run(store, lambda archive: archive.health().ok)
    assert not archive._writer.dirty


async def test_a_topic_that_is_gone_is_told_and_can_be_done_without(
    brokers: Brokers, store: MemoryObjects
) -> None:
    brokers.partitions[POSTS].put(range(10))
    brokers.partitions[LIKES].put(range(100, 110))
    await lose_uploads(store)
    del brokers.partitions[POSTS]
    before = dict(store.objects)
    with pytest.raises(InputLostError, match=r"posts/0: 0 up to 10 .* is not there"):
        await run(store, lambda _: False)
    assert seqs(store) == Counter()
    assert before.items() <= store.objects.items()
    await run(store, has(store, range(100, 110)), accept_loss="yes")


async def test_a_topic_that_was_made_anew_is_told_and_can_be_done_without(
    brokers: Brokers, store: MemoryObjects
) -> None:
    brokers.partitions[POSTS].put(range(10))
    brokers.partitions[LIKES].put(range(100, 110))
    await lose_uploads(store)
    brokers.partitions[POSTS] = Partition()
    brokers.partitions[POSTS].put(range(50, 55))
    brokers.ids["bluesky.posts"] = "another id"
    with pytest.raises(InputLostError, match=r"posts/0: 0 up to 10 .* made anew"):
        await run(store, lambda _: False)
    await run(store, has(store, range(100, 110), range(50, 55)), accept_loss="yes")
    brokers.partitions[POSTS].put(range(55, 60))
    await run(store, has(store, range(100, 110), range(50, 60)))


async def test_what_retention_took_costs_that_and_doubles_nothing(
    brokers: Brokers, store: MemoryObjects
) -> None:
    """One commit has two files; one is visible, and the range of the other is half gone."""
    posts = brokers.partitions[POSTS]
    posts.put(range(10), step_us=HOUR_US // 5)  # two hours
    await lose_uploads(store, keep=lambda key: "hour=16" in key)
    assert 0 < len(seqs(store)) < 10
    posts.forget_before(8)
    posts.put(range(20, 25))
    with pytest.raises(InputLostError, match=r"posts/0: 0 up to 8 .* retention"):
        await run(store, lambda _: False)
    here = seqs(store)
    expected = sorted({*here, 8, 9, *range(20, 25)})
    await run(store, lambda _: seqs(store) == Counter(expected), accept_loss="yes")


@pytest.mark.parametrize("quiet", [False, True])
async def test_what_other_partitions_still_have_is_not_given_up(
    brokers: Brokers, store: MemoryObjects, *, quiet: bool
) -> None:
    posts, likes = brokers.partitions[POSTS], brokers.partitions[LIKES]
    posts.put(range(10))
    likes.put(range(100, 110))
    await lose_uploads(store)
    likes.forget_before(10)
    if not quiet:
        posts.put(range(10, 15))
    await run(store, has(store, range(10 if quiet else 15)), accept_loss="yes")


async def test_a_partition_that_was_cut_off_goes_on_at_its_end(
    brokers: Brokers, store: MemoryObjects
) -> None:
    posts = brokers.partitions[POSTS]
    posts.put(range(20))
    await run(store, has(store, range(20)))
    posts.cut_to(15)  # as an unclean election does
    with pytest.raises(InputLostError, match="ends before that"):
        await run(store, lambda _: False)
    posts.put(range(30, 32))  # at offsets that were read before: nobody can tell
    await run(
        store,
        lambda archive: archive._writer.committed.get("bluesky.posts/0", Input(0)).next == 17,
        accept_loss="yes",
    )
    posts.put(range(32, 35))
    await run(store, has(store, range(20), range(32, 35)))
