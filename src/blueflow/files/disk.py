"""The calls that touch a file system, one method each, so that tests can fail any of them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from contextlib import suppress
from stat import S_ISDIR
from typing import TYPE_CHECKING, Final

from blueflow.errors import BlueflowError, OutputIOError, OutputNotWritableError

if TYPE_CHECKING:
    from pathlib import Path

_READ_BYTES: Final = 1024 * 1024
_NOT_WRITABLE: Final = frozenset({
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
})  # fmt: skip


class Disk:
    """A local file system. Every method raises `OSError`; `output_error` makes it one of ours."""

    def make_folder(self, path: Path) -> None:
        """Make the folder unless it is there; its parent must exist."""
        try:
            path.mkdir()
        except FileExistsError as error:
            if not S_ISDIR(path.stat().st_mode):  # `is_dir` takes one removed just now for a file
                raise NotADirectoryError(errno.ENOTDIR, "it is no folder", str(path)) from error

    def create(self, path: Path) -> int:
        """Open a new file for writing; it must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of `data`."""
        written = os.write(descriptor, data)
        while written < len(data):  # a full disk writes a part first, and fails the next time
            written += os.write(descriptor, memoryview(data)[written:])

    def sync(self, descriptor: int) -> None:
        """Return when the file's content is on the disk."""
        full_sync = getattr(fcntl, "F_FULLFSYNC", None)
        if full_sync is not None:  # macOS: fsync alone leaves the data in the drive's cache
            with suppress(OSError):  # network volumes do not know it
                fcntl.fcntl(descriptor, full_sync)
                return
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close the file."""
        os.close(descriptor)

    def link(self, existing: Path, new: Path) -> None:
        """Give a file a second name, which must not exist."""
        os.link(existing, new)

    def unlink(self, path: Path) -> None:
        """Remove a name of a file."""
        path.unlink()

    def sync_folder(self, path: Path) -> None:
        """Return when the names in the folder are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def names(self, path: Path) -> list[str] | None:
        """Return the names in a folder, in any order; None when there is no such folder."""
        try:
            return [entry.name for entry in path.iterdir()]
        except FileNotFoundError:
            return None

    def size(self, path: Path) -> int | None:
        """Return a file's length in bytes; None when there is no such file."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def read(self, path: Path) -> bytes:
        """Return a file's content."""
        return path.read_bytes()

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file's content, in hex."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
        return digest.hexdigest()


def output_error(path: Path | str, error: OSError, *, starting: bool = False) -> BlueflowError:
    """Return our error for a failed call; `path` is what the user named.

    While `starting`, missing rights and missing folders are the user's to correct; later the same
    codes mean that somebody took the folder away.
    """
    place = str(error.filename or path)
    problem = error.strerror or repr(error)
    if starting and error.errno in _NOT_WRITABLE:
        return OutputNotWritableError(place, problem)
    return OutputIOError(place, problem)
