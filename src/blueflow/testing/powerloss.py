"""A disk in memory that loses power: what was not synced may be gone, in any combination."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from blueflow.files.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable


class _File:
    def __init__(self) -> None:
        self.data = b""
        self.safe = b""


class _Folder:
    def __init__(self) -> None:
        self.names: dict[str, _Node] = {}
        self.safe: dict[str, _Node] = {}


_Node: TypeAlias = _File | _Folder


class PowerLossError(Exception):
    """The machine is off."""


class PowerLossDisk(Disk):
    """Names are safe once their folder was synced, content once its file was.

    Args:
        crash_at: the call (from 1) before which the power goes; 0 is never.
        root: what the power left of an earlier disk.
    """

    def __init__(self, crash_at: int = 0, root: _Folder | None = None) -> None:
        self.root = root or _Folder()
        self.calls = 0
        self._crash_at = crash_at
        self._open: dict[int, _File] = {}
        self.before_each: Callable[[], None] = lambda: None

    def after_power_loss(self, keep: Callable[[], bool]) -> PowerLossDisk:
        """Return the disk as the next start finds it; `keep` decides over each unsynced change."""
        return PowerLossDisk(root=_survivor(self.root, keep))

    def make_folder(self, path: Path) -> None:
        """Make the folder; its name is safe when its parent is synced."""
        self._step()
        folder, name = self._parent(path)
        folder.names.setdefault(name, _Folder())

    def create(self, path: Path) -> int:
        """Open a new, empty file."""
        self._step()
        folder, name = self._parent(path)
        if name in folder.names:
            raise FileExistsError(path)
        file = folder.names[name] = _File()
        descriptor = 100 + self.calls
        self._open[descriptor] = file
        return descriptor

    def write(self, descriptor: int, data: bytes) -> None:
        """Write in two steps, between which the power may go."""
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            self._step()
            self._open[descriptor].data += piece

    def sync(self, descriptor: int) -> None:
        """Make the file's content safe."""
        self._step()
        file = self._open[descriptor]
        file.safe = file.data

    def close(self, descriptor: int) -> None:
        """Forget the descriptor."""
        del self._open[descriptor]

    def link(self, existing: Path, new: Path) -> None:
        """Give the file a second name."""
        self._step()
        source, source_name = self._parent(existing)
        target, target_name = self._parent(new)
        if target_name in target.names:
            raise FileExistsError(new)
        target.names[target_name] = source.names[source_name]

    def unlink(self, path: Path) -> None:
        """Remove the name."""
        self._step()
        folder, name = self._parent(path)
        if name not in folder.names:
            raise FileNotFoundError(path)
        del folder.names[name]

    def sync_folder(self, path: Path) -> None:
        """Make the folder's names safe."""
        self._step()
        folder = self._find(path)
        if not isinstance(folder, _Folder):
            raise FileNotFoundError(path)
        folder.safe = dict(folder.names)

    def names(self, path: Path) -> list[str] | None:
        """Return the folder's names."""
        folder = self._find(path)
        return list(folder.names) if isinstance(folder, _Folder) else None

    def size(self, path: Path) -> int | None:
        """Return the file's length."""
        file = self._find(path)
        return len(file.data) if isinstance(file, _File) else None

    def read(self, path: Path) -> bytes:
        """Return the file's content."""
        file = self._find(path)
        if not isinstance(file, _File):
            raise FileNotFoundError(path)
        return file.data

    def sha256(self, path: Path) -> str:
        """Return the content's hash."""
        return hashlib.sha256(self.read(path)).hexdigest()

    def files(self, folder: _Folder | None = None, path: Path = Path("/")) -> dict[Path, bytes]:
        """Return every file by path."""
        found: dict[Path, bytes] = {}
        for name, node in (folder or self.root).names.items():
            if isinstance(node, _File):
                found[path / name] = node.data
            else:
                found |= self.files(node, path / name) if node.names else {}
        return found

    def _step(self) -> None:
        self.before_each()
        self.calls += 1
        if self.calls == self._crash_at:
            raise PowerLossError

    def _find(self, path: Path) -> _Node | None:
        node: _Node | None = self.root
        for name in path.parts[1:]:
            if not isinstance(node, _Folder):
                return None
            node = node.names.get(name)
        return node

    def _parent(self, path: Path) -> tuple[_Folder, str]:
        folder = self._find(path.parent)
        if not isinstance(folder, _Folder):
            raise FileNotFoundError(path.parent)
        return folder, path.name


def _survivor(node: Any, keep: Callable[[], bool], seen: dict[int, _Node] | None = None) -> Any:
    """Copy what survives; two names of one file stay two names of one file."""
    seen = {} if seen is None else seen
    if id(node) in seen:
        return seen[id(node)]
    if isinstance(node, _File):
        file = seen[id(node)] = _File()
        file.data = node.data if node.data == node.safe or keep() else node.safe
        file.safe = file.data
        return file
    folder = _Folder()
    for name in sorted({*node.names, *node.safe}):
        now, before = node.names.get(name), node.safe.get(name)
        survivor = now if now is before or keep() else before
        if survivor is not None:
            folder.names[name] = _survivor(survivor, keep, seen)
    folder.safe = dict(folder.names)
    return folder
