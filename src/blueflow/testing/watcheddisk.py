"""The real disk with a step before every change: to fail or kill a commit at any moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blueflow.files.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class WatchedDisk(Disk):
    """Calls `step` before every call that changes something, and in the middle of each write.

    `Faults(n, OSError(...)).step` fails the n-th change.

    Args:
        step: called without arguments.
        synced: False leaves the fsyncs out, which makes sweeps quick. A killed process loses
            nothing that the kernel has; for power loss there is `PowerLossDisk`.
    """

    def __init__(self, step: Callable[[], None], *, synced: bool = True) -> None:
        self._step, self._synced = step, synced

    def make_folder(self, path: Path) -> None:
        """Step, then do it."""
        self._step()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        """Step, then do it."""
        self._step()
        return super().create(path)

    def write(self, descriptor: int, data: bytes) -> None:
        """Step, write a half, step, write the rest."""
        self._step()
        super().write(descriptor, data[: len(data) // 2])
        self._step()
        super().write(descriptor, data[len(data) // 2 :])

    def sync(self, descriptor: int) -> None:
        """Step, then do it."""
        self._step()
        if self._synced:
            super().sync(descriptor)

    def link(self, existing: Path, new: Path) -> None:
        """Step, then do it."""
        self._step()
        super().link(existing, new)

    def unlink(self, path: Path) -> None:
        """Step, then do it."""
        self._step()
        super().unlink(path)

    def sync_folder(self, path: Path) -> None:
        """Step, then do it."""
        self._step()
        if self._synced:
            super().sync_folder(path)
