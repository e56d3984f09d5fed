"""The contract of a lake's store can fail: each broken store is caught, by the test meant to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from anyio.lowlevel import checkpoint

from blueflow.errors import UploadGoneError
from blueflow.testing.contracts import StoreContract
from blueflow.testing.lakestore import MemoryObjects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.lake.logrecord import Staged
    from blueflow.lake.store import Content, Object, PendingUpload, Store


class Overwriting(MemoryObjects):
    async def put_new(self, key: str, data: bytes) -> bool:
        self.objects.pop(key, None)
        return await super().put_new(key, data)


class LooksFirst(MemoryObjects):
    """Looks, waits, writes: a race has several winners."""

    async def put_new(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return self.objects[key] == data
        await checkpoint()
        self._put(key, data)
        return True


class Suspicious(MemoryObjects):
    """Takes what it wrote itself for another's."""

    async def put_new(self, key: str, data: bytes) -> bool:
        return key not in self.objects and await super().put_new(key, data)


class InPieces(MemoryObjects):
    async def put_new(self, key: str, data: bytes) -> bool:
        if key not in self.objects:
            self._put(key, data[: len(data) // 2])
            await checkpoint()
            self.objects.pop(key)
        return await super().put_new(key, data)


class Disordered(MemoryObjects):
    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        return list(reversed(await super().list(prefix)))[:limit]


class OnePage(MemoryObjects):
    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        return await super().list(prefix, limit=min(limit or 20, 20))


class Visible(MemoryObjects):
    async def stage(self, key: str, content: Content) -> Staged:
        staged = await super().stage(key, content)
        self._put(key, b"")
        return staged


class Once(MemoryObjects):
    """To complete again is an error."""

    async def complete(self, staged: Staged) -> None:
        if staged.upload_id not in self.pending:
            raise UploadGoneError(self.url, staged.key)
        await super().complete(staged)


class Credulous(MemoryObjects):
    """Whatever is completed is fine."""

    async def complete(self, staged: Staged) -> None:
        if staged.upload_id in self.pending:
            await super().complete(staged)


class Halving(MemoryObjects):
    async def stage(self, key: str, content: Content) -> Staged:
        staged = await super().stage(key, content)
        upload, data = self.pending[staged.upload_id]
        self.pending[staged.upload_id] = upload, data[: 8 * 1024 * 1024]
        return staged


class Careless(MemoryObjects):
    """Aborting what is completed removes it."""

    async def abort(self, upload: Staged | PendingUpload) -> None:
        if upload.upload_id not in self.pending:
            self.objects.pop(upload.key, None)
        await super().abort(upload)


class Forgetful(MemoryObjects):
    async def uploads(self, prefix: str) -> Sequence[PendingUpload]:
        return [one for one in await super().uploads("") if one.key == prefix]


class Strict(MemoryObjects):
    """To remove what is not there is an error."""

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self.objects[key]


class Unsigned(MemoryObjects):
    async def stage(self, key: str, content: Content) -> Staged:
        return msgspec.structs.replace(await super().stage(key, content), sha256="")


class Flat(MemoryObjects):
    async def folders(self, prefix: str) -> Sequence[str]:
        return [one.key.removeprefix(prefix) for one in await self.list(prefix)]


BROKEN = [
    (Overwriting, "test_a_key_is_written_once"),
    (LooksFirst, "test_a_race_has_one_winner"),
    (Suspicious, "test_a_key_is_written_once"),
    (InPieces, "test_a_cancelled_put_wrote_all_or_nothing"),
    (Disordered, "test_a_list_is_complete_in_the_order_of_keys_and_cut_at_a_limit"),
    (OnePage, "test_a_list_is_complete_in_the_order_of_keys_and_cut_at_a_limit"),
    (Visible, "test_a_staged_file_is_seen_by_nobody_until_it_is_completed"),
    (Visible, "test_a_cancelled_upload_is_seen_by_nobody"),
    (Once, "test_to_complete_again_changes_nothing"),
    (Once, "test_a_cancelled_completion_did_all_or_nothing"),
    (Credulous, "test_an_upload_that_is_gone_is_told"),
    (Halving, "test_content_of_every_size_arrives_whole"),
    (Unsigned, "test_content_of_every_size_arrives_whole"),
    (Careless, "test_to_abort_what_is_completed_changes_nothing"),
    (Forgetful, "test_uploads_are_told_apart"),
    (Strict, "test_what_is_removed_is_gone_and_the_rest_stays"),
    (Strict, "test_what_is_not_there_is_none"),
    (Flat, "test_folders_are_named_once_in_order"),
]


@pytest.mark.parametrize(("broken", "test"), BROKEN)
async def test_a_broken_store_is_caught(broken: type[MemoryObjects], test: str) -> None:
    store = broken()

    class Contract(StoreContract):
        async def make_store(self) -> Store:
            return store

    case: Any = getattr(Contract(), test)
    with pytest.raises((AssertionError, UploadGoneError, KeyError)):
        await case()
