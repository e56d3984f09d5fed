"""A folder to read a lake from, with a place to hook in between two of its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
from anyio.lowlevel import checkpoint

from blueflow.lake.store import Object, PendingUpload
from blueflow.testing.lakestore import MemoryObjects

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class FolderStore(MemoryObjects):
    """Reads what is in a folder; what only a writer needs is left as it is in memory.

    Args:
        folder: the lake.
        before_list: called with the prefix before each list.
    """

    def __init__(self, folder: Path, before_list: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.url = str(folder)
        self.folder = folder
        self.closed = 0
        self.unfinished: list[PendingUpload] = []
        self._before_list = before_list or (lambda _prefix: None)

    async def close(self) -> None:
        await checkpoint()
        self.closed += 1

    async def get(self, key: str) -> bytes | None:
        await checkpoint()
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    async def head(self, key: str) -> Object | None:
        await checkpoint()
        path = self.folder / key
        return self._of(path) if path.is_file() else None

    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        await checkpoint()
        self._before_list(prefix)
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        found = (self._of(path) for path in paths)
        return sorted((one for one in found if one.key.startswith(prefix)), key=_key)[:limit]

    async def folders(self, prefix: str) -> Sequence[str]:
        await checkpoint()
        folder = self.folder / prefix
        return (
            sorted(path.name for path in folder.iterdir() if path.is_dir())
            if (folder.is_dir())
            else []
        )

    async def uploads(self, prefix: str) -> Sequence[PendingUpload]:
        await checkpoint()
        return [one for one in self.unfinished if one.key.startswith(prefix)]

    def filesystem(self) -> tuple[Any, str]:
        return pafs.LocalFileSystem(), str(self.folder)

    def _of(self, path: Path) -> Object:
        facts = path.stat()
        return Object(path.relative_to(self.folder).as_posix(), facts.st_size, facts.st_mtime)


def _key(one: Object) -> str:
    return one.key
