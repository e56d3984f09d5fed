"""What a lake needs of the place it lies in: a contract without code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from blueflow.lake.logrecord import Staged

Content: TypeAlias = "bytes | Path"


class Object(msgspec.Struct, frozen=True):
    """An object that is there."""

    key: str
    size: int
    modified_s: float  # seconds since 1970, by the store's clock


class PendingUpload(msgspec.Struct, frozen=True):
    """An upload that nobody completed or aborted yet."""

    key: str
    upload_id: str
    begun_s: float


class Store(Protocol):
    """Objects under keys, and uploads that become objects in one step.

    Every method returns when what it did is durable, and is bounded in time; it tries again what
    may help. Any number of tasks may call. All raise:
        StoreUnavailableError, OutputIOError: it did not answer in time, or failed.
        StoreLoginError: it refuses our credentials or lacks rights.
    """

    @property
    def url(self) -> str:
        """Where it is, without credentials."""

    async def open(self, *, create: bool) -> None:
        """Connect; make the bucket or the folder when it is missing and `create` says so.

        Raises:
            BucketError, OutputNotWritableError: it is missing or cannot be made.
            StoreUnfitError: it does not honour `put_new`; found out with `create` only.
        """

    async def close(self) -> None:
        """Disconnect."""

    async def get(self, key: str) -> bytes | None:
        """Return an object's content; None when there is none."""

    async def put_new(self, key: str, data: bytes) -> bool:
        """Write an object whose name is free, whole or not at all.

        True also when it is there with this very content: an answer that got lost looks like that.
        False: there is another.
        """

    async def head(self, key: str) -> Object | None:
        """Return what is known of an object; None when there is none."""

    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        """Return the objects whose keys begin with `prefix`, by key; at most `limit`.

        What is there was completed before; what was completed before the call is there.
        """

    async def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders right below `prefix`, which ends with `/`; by name."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are fine."""

    async def stage(self, key: str, content: Content) -> Staged:
        """Store a file without making it visible.

        Args:
            key: what it will be called.
            content: the bytes, or the path of a local file with them.
        """

    async def complete(self, staged: Staged) -> None:
        """Make a staged file visible; done again it changes nothing.

        Raises:
            UploadGoneError: the upload is gone, and no object of its size is there.
        """

    async def abort(self, upload: Staged | PendingUpload) -> None:
        """Forget a staged file; one that is gone or completed is fine."""

    async def uploads(self, prefix: str) -> Sequence[PendingUpload]:
        """Return the uploads for keys that begin with `prefix`."""

    def filesystem(self) -> tuple[Any, str]:
        """Return a `pyarrow.fs.FileSystem` and the path of the lake in it, for readers."""
