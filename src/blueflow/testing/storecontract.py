"""What every store of a lake has to keep. Public in `blueflow.testing.contracts`."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from blueflow.errors import UploadGoneError
from blueflow.lake.layout import Shard, fresh_key, hour_key, marker_key, raw_key, record_key
from blueflow.testing.faults import cancel_at
from blueflow.testing.samples import expect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from blueflow.lake.logrecord import Staged
    from blueflow.lake.store import Store

RACERS: Final = 20
_AT_ONCE: Final = 16
_DAY_S: Final = 86_400
_PART_BYTES: Final = 8 * 1024 * 1024
_HOUR: Final = 495_000
_SHARD: Final = Shard("Night-1.b_c", 3, 16)
_KEYS: Final = (  # every character that keys of a lake have
    fresh_key(_SHARD, 1, "posts", _HOUR),
    raw_key("likes", _HOUR, 2, 1),
    marker_key("likes", _HOUR, 2),
    record_key(_SHARD, 7),
    hour_key("other", _HOUR, 1),
    "_blueflow/lake.json",
)


class StoreContract(ABC):
    """What `blueflow.lake.store.Store` promises; each test has a store of its own."""

    many: ClassVar[int] = 40  # objects in one folder; more than the store lists in one answer

    @abstractmethod
    async def make_store(self) -> Store:
        """Return a new store over the place of this test, not open; called again: a restart."""

    async def test_what_is_not_there_is_none(self) -> None:
        """And not an error, whatever is asked."""
        async with self._opened() as store:
            for key in ("nothing", *_KEYS):
                expect(await store.get(key) is None, f"get({key!r}) found something")
                expect(await store.head(key) is None, f"head({key!r}) found something")
            expect(list(await store.list("fresh/")) == [], "list found something")
            expect(list(await store.folders("fresh/")) == [], "folders found something")
            expect(list(await store.uploads("")) == [], "uploads found something")
            await store.delete([])
            await store.delete(["nothing", *_KEYS])

    async def test_an_object_has_the_key_the_size_and_the_content_it_was_given(self) -> None:
        """Keys of every kind; a restart and a reader see the same."""
        before_s = time.time()
        contents = {key: f"content of {key}".encode() for key in _KEYS} | {"raw/empty": b""}
        async with self._opened() as store:
            for key, data in contents.items():
                expect(await store.put_new(key, data), f"{key} was free")
        for create in (True, False):
            async with self._opened(create=create) as store:
                for key, data in contents.items():
                    expect(await store.get(key) == data, f"{key} has another content")
                    found = await store.head(key)
                    expect(found and (found.key, found.size) == (key, len(data)), f"{found}")
                    near = found and abs(found.modified_s - before_s) < _DAY_S
                    expect(near, f"{found} was not modified now")
                    listed = list(await store.list(key))
                    expect(listed == [found], f"list gives {listed}, head {found}")

    async def test_a_key_is_written_once(self) -> None:
        """The same content again is a lost answer; another one changes nothing."""
        async with self._opened() as store:
            for key in _KEYS:
                expect(await store.put_new(key, b"first"), f"{key} was free")
                expect(not await store.put_new(key, b"second"), f"{key} was taken")
                expect(not await store.put_new(key, b"first "), f"{key} was taken")
                expect(await store.put_new(key, b"first"), f"{key} has this very content")
                expect(await store.get(key) == b"first", f"{key} was changed")

    async def test_a_race_has_one_winner(self) -> None:
        """Of 20 tasks over two clients; what is there is the winner's."""
        async with self._opened() as one, self._opened() as two:
            for key in _KEYS[:2]:
                contents = [f"content of task {number}".encode() for number in range(RACERS)]
                won = await asyncio.gather(
                    *(
                        (one, two)[number % 2].put_new(key, data)
                        for number, data in enumerate(contents)
                    )
                )
                winners = [data for data, first in zip(contents, won, strict=True) if first]
                expect(len(winners) == 1, f"{len(winners)} of {RACERS} tasks believe they won")
                expect(await one.get(key) == winners[0], "another content than the winner's")

    async def test_a_list_is_complete_in_the_order_of_keys_and_cut_at_a_limit(self) -> None:
        """More than one answer of a server holds; a prefix ends where it likes."""
        keys = [f"_blueflow/logs/p/0-of-1/{10**12 - n:012d}-{n:012d}.json" for n in self._numbers()]
        others = ["_blueflow/logs/p/0-of-11/x", "_blueflow/logs/p1/0-of-1/x", "raw/a"]
        async with self._opened() as store:
            await _put_all(store, [*keys, *others])
            keys.sort()
            found = [one.key for one in await store.list("_blueflow/logs/p/0-of-1/")]
            expect(found == keys, f"{len(found)} of {len(keys)} keys, or in another order")
            for limit in (1, 2, self.many - 1, self.many, self.many + 1):
                found = [
                    one.key for one in await store.list("_blueflow/logs/p/0-of-1/9", limit=limit)
                ]
                expect(found == keys[:limit], f"limit={limit} gives {len(found)} keys")
            prefixes = (
                "_blueflow/logs/p",
                "_blueflow/logs/p/0-of-1",
                keys[0][:-7],
                "raw/",
                "",
                "z",
            )
            for prefix in prefixes:
                found = [one.key for one in await store.list(prefix)]
                wanted = sorted(key for key in [*keys, *others] if key.startswith(prefix))
                expect(found == wanted, f"list({prefix!r}) gives {len(found)} of {len(wanted)}")

    async def test_folders_are_named_once_in_order(self) -> None:
        """Those right below; objects beside them are none."""
        hours = [f"fresh/posts/year=2026/month=07/day=04/hour={hour:02d}/a" for hour in (3, 23, 0)]
        async with self._opened() as store:
            await _put_all(store, [*hours, hours[0] + "b", "fresh/posts/year=2026/x", "fresh/y/z"])
            cases = {
                "fresh/": ["posts", "y"],
                "fresh/posts/year=2026/": ["month=07"],
                "fresh/posts/year=2026/month=07/day=04/": ["hour=00", "hour=03", "hour=23"],
                "fresh/y/": [],
                "fresh/n/": [],
            }
            for prefix, names in cases.items():
                found = list(await store.folders(prefix))
                expect(found == names, f"folders({prefix!r}) gives {found}")

    async def test_what_is_removed_is_gone_and_the_rest_stays(self) -> None:
        """More keys than a server takes in one request, and removed twice."""
        keys = [f"fresh/posts/year=2026/hour={n % 3}/{n:06d}" for n in self._numbers()]
        async with self._opened() as store:
            await _put_all(store, [*keys, "fresh/posts/kept"])
            for _ in range(2):
                await store.delete([*keys, "fresh/posts/never"])
            left = [one.key for one in await store.list("fresh/")]
            expect(left == ["fresh/posts/kept"], f"{len(left)} keys are left")
            expect(await store.get(keys[0]) is None, "a removed object can be read")
            expect(
                await store.put_new(keys[0], b"anew"), "the name of a removed object is not free"
            )

    async def test_a_staged_file_is_seen_by_nobody_until_it_is_completed(self) -> None:
        """Not by readers of the store, in no list; only among the uploads."""
        key = _KEYS[0]
        async with self._opened() as store, self._opened() as other:
            await store.put_new("fresh/posts/other", b"")
            staged = await store.stage(key, b"rows")
            for one in (store, other):
                await _expect_invisible(one, key)
                listed = [found.key for found in await one.list("fresh/")]
                expect(listed == ["fresh/posts/other"], f"{listed} are listed")
                expect(list(await one.folders("fresh/posts/")) == [], "a folder is there already")
                pending = [(up.key, up.upload_id) for up in await one.uploads("fresh/")]
                expect(pending == [(key, staged.upload_id)], f"uploads are {pending}")
            expect(await store.put_new(key + "x", b"1"), "a key beside a staged one is free")
            await store.complete(staged)
            for one in (store, other):
                expect(await one.get(key) == b"rows", "what was staged is not there")
                expect(list(await one.uploads("")) == [], "a completed upload is still one")

    async def test_content_of_every_size_arrives_whole(self) -> None:
        """Bytes and files; nothing, a byte, around the size of a part, and several parts."""
        sizes = (0, 1, _PART_BYTES - 1, _PART_BYTES, _PART_BYTES + 1, 20 * 1024 * 1024)
        async with self._opened() as store:
            for number, size in enumerate(sizes):
                data = Random(size).randbytes(size)
                with tempfile.NamedTemporaryFile() as file:
                    file.write(data)
                    file.flush()
                    for kind, content in (("bytes", data), ("file", Path(file.name))):
                        key = f"raw/posts/{kind}-{number}.parquet"
                        staged = await store.stage(key, content)
                        _expect_described(staged, key, data)
                        await store.complete(staged)
                        found = await store.head(key)
                        expect(found and found.size == size, f"{size} bytes became {found}")
                        expect(await store.get(key) == data, f"{size} bytes of {kind} are others")

    async def test_to_complete_again_changes_nothing(self) -> None:
        """By the same process, and by those that start after it."""
        async with self._opened() as store:
            staged = await store.stage(_KEYS[1], b"once")
        for _ in range(2):
            async with self._opened() as store:
                await store.complete(staged)
                await store.complete(staged)
                expect(await store.get(_KEYS[1]) == b"once", "the content changed")
                expect(list(await store.uploads("")) == [], "the upload is still there")
        async with self._opened() as store:
            await asyncio.gather(*(store.complete(staged) for _ in range(4)))

    async def test_an_upload_that_is_gone_is_told(self) -> None:
        """Aborted by anybody, however often; a file of another size is not ours."""
        async with self._opened() as store:
            for key, content in (("fresh/gone", b"1"), ("fresh/gone-empty", b"")):
                staged = await store.stage(key, content)
                await store.abort(staged)
                await store.abort(staged)
                for _ in range(2):
                    await _expect_gone(store, staged)
                await _expect_invisible(store, key)
            staged = await store.stage("fresh/other", b"of this size")
            (pending,) = await store.uploads("fresh/o")
            await store.abort(pending)
            await store.put_new("fresh/other", b"of another")
            await _expect_gone(store, staged)
            expect(await store.get("fresh/other") == b"of another", "another's file was replaced")

    async def test_to_abort_what_is_completed_changes_nothing(self) -> None:
        """A janitor may be late."""
        async with self._opened() as store:
            staged = await store.stage(_KEYS[0], b"rows")
            (pending,) = await store.uploads(_KEYS[0])
            await store.complete(staged)
            await store.abort(staged)
            await store.abort(pending)
            expect(await store.get(_KEYS[0]) == b"rows", "a completed file was removed")
            await store.complete(staged)

    async def test_uploads_are_told_apart(self) -> None:
        """Several at once, two of them for one key; by what their keys begin with."""
        async with self._opened() as store:
            staged = [await store.stage(key, key.encode()) for key in (*_KEYS[:3], _KEYS[0])]
            pending = await store.uploads("")
            found = sorted((one.key, one.upload_id) for one in pending)
            expect(found == sorted((one.key, one.upload_id) for one in staged), f"{found}")
            raw = [one.key for one in await store.uploads("raw/")]
            expect(sorted(raw) == sorted(_KEYS[1:3]), f"uploads of raw/ are {raw}")
            await store.complete(staged[3])
            await store.abort(staged[0])
            expect(await store.get(_KEYS[0]) == _KEYS[0].encode(), "the other upload was aborted")

    async def test_an_upload_says_when_it_began(self) -> None:
        """So that a janitor tells an old one."""
        async with self._opened() as store:
            await store.stage(_KEYS[0], b"rows")
            (pending,) = await store.uploads("")
            expect(abs(pending.begun_s - time.time()) < _DAY_S, f"{pending} did not begin now")

    async def test_many_tasks_may_stage_and_complete_at_once(self) -> None:
        """Each finds what it stored."""
        async with self._opened() as store:

            async def one(number: int) -> None:
                key, data = f"raw/posts/{number:03d}", Random(number).randbytes(100_000 + number)
                staged = await store.stage(key, data)
                await store.complete(staged)
                expect(await store.get(key) == data, f"{key} holds something else")

            await asyncio.gather(*(one(number) for number in range(RACERS)))
            expect(len(await store.list("raw/posts/")) == RACERS, "files are missing")

    async def test_a_cancelled_put_wrote_all_or_nothing(self) -> None:
        """At every suspension; and then again, as a restart does."""
        for suspension in count(1):
            key, data = f"_blueflow/logs/{suspension}", Random(suspension).randbytes(100_000)
            async with self._opened() as store:
                reached = await cancel_at(suspension, partial(store.put_new, key, data))
                expect(await store.get(key) in {None, data}, "a part of it is there")
            async with self._opened() as store:
                expect(await store.put_new(key, data), "what was ours before is another's now")
                expect(await store.get(key) == data, "another content is there")
            if not reached:
                return

    async def test_a_cancelled_completion_did_all_or_nothing(self) -> None:
        """At every suspension; and then again, as a restart does."""
        for suspension in count(1):
            key, data = f"fresh/{suspension}", Random(suspension).randbytes(100_000)
            async with self._opened() as store:
                staged = await store.stage(key, data)
                reached = await cancel_at(suspension, partial(store.complete, staged))
                expect(await store.get(key) in {None, data}, "a part of it is there")
            async with self._opened() as store:
                await store.complete(staged)
                expect(await store.get(key) == data, "another content is there")
            if not reached:
                return

    async def test_a_cancelled_upload_is_seen_by_nobody(self) -> None:
        """At every suspension; what is left of it can be aborted."""
        data = Random(1).randbytes(_PART_BYTES + 1)
        for suspension in count(1):
            async with self._opened() as store:
                reached = await cancel_at(suspension, partial(store.stage, "fresh/a", data))
            async with self._opened() as store:
                await _expect_invisible(store, "fresh/a")
                for pending in await store.uploads(""):
                    await store.abort(pending)
                expect(list(await store.uploads("")) == [], "an upload cannot be aborted")
            if not reached:
                return

    def _numbers(self) -> Iterable[int]:
        return range(1, self.many + 1)

    @asynccontextmanager
    async def _opened(self, *, create: bool = True) -> AsyncIterator[Store]:
        store = await self.make_store()
        await store.open(create=create)
        try:
            yield store
        finally:
            await store.close()


async def _put_all(store: Store, keys: Iterable[str]) -> None:
    room = asyncio.Semaphore(_AT_ONCE)

    async def put(key: str) -> None:
        async with room:
            expect(await store.put_new(key, b"{}"), f"{key} was free")

    await asyncio.gather(*map(put, keys))


def _expect_described(staged: Staged, key: str, data: bytes) -> None:
    expect((staged.key, staged.size) == (key, len(data)), f"{staged} is not what was staged")
    checksum = hashlib.sha256(data).hexdigest()
    expect(staged.sha256 == checksum, f"{staged.sha256} is not the checksum of {key}")


async def _expect_invisible(store: Store, key: str) -> None:
    expect(await store.get(key) is None, f"{key} can be read")
    expect(await store.head(key) is None, f"{key} is there")
    expect(list(await store.list(key)) == [], f"{key} is listed")


async def _expect_gone(store: Store, staged: Staged) -> None:
    try:
        await store.complete(staged)
    except UploadGoneError as error:
        expect(error.key == staged.key, f"{error} names another file")
        return
    raise AssertionError("an upload that is gone was completed")
