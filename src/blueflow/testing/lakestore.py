"""A place for a lake in memory, as strict and as cancellable as the real ones."""

from __future__ import annotations

import time
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import checkpoint

from blueflow.errors import NoLakeError, UploadGoneError
from blueflow.lake.logrecord import Staged
from blueflow.lake.store import Object, PendingUpload, Store
from blueflow.testing.faults import Faults

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blueflow.lake.store import Content


class MemoryObjects(Store):
    """Objects and uploads in memory: hand the same one to the next writer and it is a restart.

    Args:
        faults: steps once in every call that changes something, before it does.
        after: steps there too, after the change: the answer that gets lost.
        clock: seconds since 1970.
    """

    url = "memory:lake"

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        after: Faults | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.faults, self.after = faults or Faults(), after or Faults()
        self.objects: dict[str, bytes] = {}
        self.pending: dict[str, tuple[PendingUpload, bytes]] = {}
        self._modified_s: dict[str, float] = {}
        self._clock = clock
        self._ids = count(1)

    async def open(self, *, create: bool) -> None:  # noqa: ARG002 - it is there
        """Do nothing: it is there."""
        await checkpoint()

    async def close(self) -> None:
        """Do nothing: another may use it."""
        await checkpoint()

    async def get(self, key: str) -> bytes | None:
        """Return an object."""
        await checkpoint()
        return self.objects.get(key)

    async def put_new(self, key: str, data: bytes) -> bool:
        """Write an object whose name is free."""
        await self._change()
        if key in self.objects:
            return self.objects[key] == data
        self._put(key, data)
        self.after.step()
        await checkpoint()
        return True

    async def head(self, key: str) -> Object | None:
        """Return what is known of an object."""
        await checkpoint()
        return self._object(key) if key in self.objects else None

    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        """Return objects by key."""
        await checkpoint()
        return [self._object(key) for key in sorted(self.objects) if key.startswith(prefix)][:limit]

    async def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of folders."""
        await checkpoint()
        below = (key[len(prefix) :] for key in self.objects if key.startswith(prefix))
        return sorted({key.partition("/")[0] for key in below if "/" in key})

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        await self._change()
        for key in keys:
            self.objects.pop(key, None)
        self.after.step()

    async def stage(self, key: str, content: Content) -> Staged:
        """Store a file that nobody sees."""
        await self._change()
        data = content if isinstance(content, bytes) else content.read_bytes()
        upload = PendingUpload(key, f"upload-{next(self._ids)}", self._clock())
        self.pending[upload.upload_id] = upload, data
        self.after.step()
        await checkpoint()
        return Staged(key, upload.upload_id, ("1",), len(data), sha256(data).hexdigest())

    async def complete(self, staged: Staged) -> None:
        """Make a staged file visible."""
        await self._change()
        found = self.pending.pop(staged.upload_id, None)
        if found is not None:
            self._put(staged.key, found[1])
        elif staged.key not in self.objects or len(self.objects[staged.key]) != staged.size:
            raise UploadGoneError(self.url, staged.key)
        self.after.step()
        await checkpoint()

    async def abort(self, upload: Staged | PendingUpload) -> None:
        """Forget a staged file."""
        await self._change()
        self.pending.pop(upload.upload_id, None)
        self.after.step()

    async def uploads(self, prefix: str) -> Sequence[PendingUpload]:
        """Return what is staged."""
        await checkpoint()
        return [one for one, _ in self.pending.values() if one.key.startswith(prefix)]

    def filesystem(self) -> tuple[Any, str]:
        """Raise: nobody else can read it."""
        raise NoLakeError(self.url)

    async def _change(self) -> None:
        await checkpoint()
        self.faults.step()

    def _put(self, key: str, data: bytes) -> None:
        self.objects[key] = data
        self._modified_s[key] = self._clock()

    def _object(self, key: str) -> Object:
        return Object(key, len(self.objects[key]), self._modified_s[key])
