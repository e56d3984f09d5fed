"""A lake in a local folder: what S3 gives by conditional PUTs and uploads, by link and fsync.

A new object is written under a hidden name, synced, and linked to its own: a link is exclusive, and
what it names is whole. An upload is a hidden file; completing it links it into its place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, unquote

import anyio

from blueflow.errors import BlueflowError, UploadGoneError
from blueflow.files.disk import Disk, output_error
from blueflow.files.worker import Worker
from blueflow.lake.layout import BOOKKEEPING
from blueflow.lake.logrecord import Staged
from blueflow.lake.store import Object, PendingUpload, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from blueflow.lake.store import Content

CLOSE_WAIT_S: Final = 5.0
_STAGING: Final = f"{BOOKKEEPING}/staging"
_UPLOAD: Final = re.compile(r"([0-9a-f]{16})-(.+)\.part")
_PIECE_BYTES: Final = 4 * 1024 * 1024
_TRIES: Final = 3  # whoever tidies up removes an empty folder now and then, not all the time
_PART: Final = "file"  # an upload has one part

_T = TypeVar("_T")


class LocalStore(Store):
    """Objects are files below a folder; see `Store`.

    Calls block in a thread of the store's own, one after the other.

    Args:
        root: the folder.
        disk: the calls that touch the file system.
    """

    def __init__(self, root: Path | str, disk: Disk | None = None) -> None:
        self._root = Path(root)
        self._disk = disk or Disk()
        self._staging = self._root / _STAGING
        self._worker = Worker(f"lake {root}")
        self._closed = False
        self._ours: dict[str, str] = {}  # checksums of what this process staged and synced

    @property
    def url(self) -> str:
        """The folder, as it was named."""
        return str(self._root)

    async def open(self, *, create: bool) -> None:
        """Look for the folder; make it when `create` says so. Its parent has to be there."""
        await self._run(partial(self._open, create=create), starting=True)

    async def close(self) -> None:
        """End the thread; waits 5 s for a disk that does not answer."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await self._worker.close(lambda: None, wait_s=CLOSE_WAIT_S)

    async def get(self, key: str) -> bytes | None:
        """Return a file's content."""
        return await self._run(partial(self._get, key))

    async def put_new(self, key: str, data: bytes) -> bool:
        """Write a file whose name is free."""
        return await self._run(partial(self._put_new, key, data))

    async def head(self, key: str) -> Object | None:
        """Return what is known of a file."""
        return await self._run(partial(self._head, key))

    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        """Return files by key; what is hidden is not there."""
        return await self._run(partial(self._list, prefix, limit))

    async def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of folders."""
        return await self._run(partial(self._folders, prefix))

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove files, and the folders that are empty then."""
        await self._run(partial(self._delete, keys))

    async def stage(self, key: str, content: Content) -> Staged:
        """Write a hidden file."""
        return await self._run(partial(self._stage, key, content))

    async def complete(self, staged: Staged) -> None:
        """Link a hidden file into its place."""
        await self._run(partial(self._complete, staged))

    async def abort(self, upload: Staged | PendingUpload) -> None:
        """Remove a hidden file."""
        await self._run(partial(self._abort, upload.upload_id))

    async def uploads(self, prefix: str) -> Sequence[PendingUpload]:
        """Return the hidden files that would become `prefix…`."""
        return await self._run(partial(self._uploads, prefix))

    def filesystem(self) -> tuple[Any, str]:
        """Return Arrow's local file system and the folder."""
        from pyarrow.fs import LocalFileSystem  # noqa: PLC0415 - only readers need it

        return LocalFileSystem(), str(self._root.absolute())

    async def _run(self, call: Callable[[], _T], *, starting: bool = False) -> _T:
        try:
            return await self._worker.run(call)
        except OSError as error:
            raise output_error(self._root, error, starting=starting) from error

    def _open(self, *, create: bool) -> None:
        disk = self._disk
        if not create:
            if disk.names(self._root) is None:
                raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(self._root))
            return
        for folder in (self._root, self._root / BOOKKEEPING, self._staging):
            disk.make_folder(folder)
        with suppress(PermissionError):  # one that may be entered, not listed, is not ours to sync
            disk.sync_folder(self._root.parent)
        for folder in (self._root, self._root / BOOKKEEPING):
            disk.sync_folder(folder)
        first, second = (self._hidden(f"{BOOKKEEPING}/probe") for _ in range(2))
        disk.close(disk.create(first))  # find out now whether it is writable and knows links
        disk.link(first, second)
        disk.unlink(second)
        disk.unlink(first)

    def _get(self, key: str) -> bytes | None:
        try:
            return self._disk.read(self._root / key)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def _put_new(self, key: str, data: bytes) -> bool:
        if (there := self._get(key)) is not None:
            return there == data
        hidden = self._hidden(key)
        try:
            self._write(hidden, data)
            try:
                self._link(hidden, key)
            except FileExistsError:
                return self._get(key) == data
        finally:
            with suppress(OSError):
                self._disk.unlink(hidden)
        return True

    def _head(self, key: str) -> Object | None:
        try:
            found = (self._root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Object(key, found.st_size, found.st_mtime)

    def _list(self, prefix: str, limit: int | None) -> Sequence[Object]:
        folder, _, begin = prefix.rpartition("/")
        found = list(self._walk(folder, begin, frozenset()))
        return sorted(found, key=lambda one: one.key)[:limit]

    def _walk(self, folder: str, begin: str, above: frozenset[tuple[int, int]]) -> Iterator[Object]:
        """Yield the files below a folder whose name in it begins so; not those of the staging.

        A link to a folder is followed, unless it leads to one `above` it.
        """
        if folder == _STAGING:
            return
        try:
            entries = list(os.scandir(self._root / folder))
            itself = (self._root / folder).stat()
        except (FileNotFoundError, NotADirectoryError):
            return
        if (itself.st_dev, itself.st_ino) in above:
            return
        above |= {(itself.st_dev, itself.st_ino)}
        for entry in entries:
            if not entry.name.startswith(begin):
                continue
            key = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    yield from self._walk(key, "", above)
                elif entry.is_file():
                    found = entry.stat()
                    yield Object(key, found.st_size, found.st_mtime)
            except FileNotFoundError:  # removed meanwhile
                continue

    def _folders(self, prefix: str) -> Sequence[str]:
        try:
            entries = list(os.scandir(self._root / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []
        above, _, staging = _STAGING.rpartition("/")
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and (prefix.rstrip("/"), entry.name) != (above, staging)
        )

    def _delete(self, keys: Sequence[str]) -> None:
        folders = set()
        for key in keys:
            path = self._root / key
            with suppress(FileNotFoundError, NotADirectoryError):
                self._disk.unlink(path)
                folders.add(path.parent)
        for folder in folders:
            with suppress(FileNotFoundError):
                self._disk.sync_folder(folder)
            self._tidy(folder)

    def _tidy(self, folder: Path) -> None:
        """Remove folders of an hour, a day, … that are empty."""
        while "=" in folder.name:
            try:
                folder.rmdir()
            except OSError:  # not empty, or not ours to remove
                return
            folder = folder.parent

    def _stage(self, key: str, content: Content) -> Staged:
        hidden = self._hidden(key)
        try:
            size, checksum = self._write(hidden, content)
            self._disk.sync_folder(self._staging)
        except BaseException:
            with suppress(OSError):
                self._disk.unlink(hidden)
            raise
        self._ours[hidden.name] = checksum
        return Staged(key, hidden.name, (_PART,), size, checksum)

    def _complete(self, staged: Staged) -> None:
        hidden = self._staging / staged.upload_id
        path = self._root / staged.key
        try:
            if self._is_whole(hidden, staged):
                self._link(hidden, staged.key)
                self._abort(staged.upload_id)
                return
        except FileExistsError as error:
            if self._disk.size(path) != staged.size:
                raise _taken(path) from error
        except FileNotFoundError:
            if hidden.exists():
                raise
        # Another process may have completed it, just now or before.
        if self._disk.size(path) != staged.size:
            raise UploadGoneError(self.url, staged.key)
        self._sync_above(path)  # it may be in its place in memory only
        self._abort(staged.upload_id)

    def _is_whole(self, hidden: Path, staged: Staged) -> bool:
        """Tell whether a hidden file is there; one of another process may be cut off."""
        if self._disk.size(hidden) is None:
            return False
        if self._ours.get(hidden.name) == staged.sha256:
            return True
        whole = self._disk.size(hidden) == staged.size
        return whole and self._disk.sha256(hidden) == staged.sha256

    def _abort(self, upload_id: str) -> None:
        self._ours.pop(upload_id, None)
        if _UPLOAD.fullmatch(upload_id):
            with suppress(FileNotFoundError):
                self._disk.unlink(self._staging / upload_id)

    def _uploads(self, prefix: str) -> Sequence[PendingUpload]:
        found = []
        for name in sorted(self._disk.names(self._staging) or ()):
            match = _UPLOAD.fullmatch(name)
            key = unquote(match[2]) if match else ""
            if match and key.startswith(prefix):
                with suppress(FileNotFoundError):
                    begun_s = (self._staging / name).stat().st_mtime
                    found.append(PendingUpload(key, name, begun_s))
        return found

    def _hidden(self, key: str) -> Path:
        """Return a new name in the staging that says what it will be."""
        if not self._staging.exists():  # copies of a lake often lack folders that were empty
            self._disk.make_folder(self._staging)
        name = quote(key, safe="=")
        return self._staging / f"{secrets.token_hex(8)}-{name}.part"

    def _write(self, path: Path, content: Content) -> tuple[int, str]:
        """Write and sync a new file; return its size and checksum."""
        digest, size = hashlib.sha256(), 0
        descriptor = self._disk.create(path)
        try:
            for piece in _pieces(content):
                digest.update(piece)
                size += len(piece)
                self._disk.write(descriptor, piece)
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)
        return size, digest.hexdigest()

    def _link(self, hidden: Path, key: str) -> None:
        path = self._root / key
        for tries_left in reversed(range(_TRIES)):
            try:
                for folder in self._above(path):
                    self._disk.make_folder(folder)
                self._disk.link(hidden, path)
                break
            except FileNotFoundError:  # a folder was tidied up just before the link
                if not tries_left:
                    raise
        self._sync_above(path)

    def _above(self, path: Path) -> Sequence[Path]:
        """Return the folders from the root down to a file."""
        parts = path.relative_to(self._root).parts[:-1]
        return [self._root.joinpath(*parts[: at + 1]) for at in range(len(parts))]

    def _sync_above(self, path: Path) -> None:
        for folder in (*reversed(self._above(path)), self._root):  # it has the name of the topmost
            with suppress(FileNotFoundError):
                self._disk.sync_folder(folder)


def _pieces(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _taken(path: Path) -> BlueflowError:
    error = FileExistsError(errno.EEXIST, "a file that is not ours has the name", str(path))
    return output_error(path, error)
