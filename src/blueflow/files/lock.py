"""One writer per folder."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import TYPE_CHECKING, Final

from blueflow.errors import OutputLockedError

if TYPE_CHECKING:
    from pathlib import Path

_HOLDER_BYTES_MAX: Final = 400


class FolderLock:
    """A lock file that the kernel frees when its process ends, however it ends.

    The file stays, with the last holder's process id and host in it: its content is for people, the
    kernel's lock on it is what counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            OutputLockedError: another writer has it, maybe in this very process.
            OSError: the file cannot be opened.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, _HOLDER_BYTES_MAX).decode(errors="replace").strip()
                raise OutputLockedError(str(self._path.parent.parent), holder) from error
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def check(self) -> None:
        """Make sure that the lock file is still the one we hold.

        Raises:
            OutputLockedError: somebody removed or replaced it, so a second writer may be at work.
        """
        if self._descriptor is None:
            raise OutputLockedError(str(self._path.parent.parent), "this writer was closed")
        ours = os.fstat(self._descriptor)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise OutputLockedError(str(self._path.parent.parent), "the lock file was taken away")

    def release(self) -> None:
        """Let the next writer in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
