from __future__ import annotations

import errno
from pathlib import Path

import pytest

from blueflow.files.disk import Disk


def test_a_folder_is_made_once_and_a_file_is_no_folder(tmp_path: Path) -> None:
    disk, folder = Disk(), tmp_path / "folder"
    disk.make_folder(folder)
    disk.make_folder(folder)
    (folder / "file").touch()
    with pytest.raises(NotADirectoryError):
        disk.make_folder(folder / "file")


def test_a_folder_removed_while_it_was_looked_at_is_missing_and_not_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there(path: Path) -> None:
        raise FileExistsError(errno.EEXIST, "it was there", str(path))

    monkeypatch.setattr(Path, "mkdir", there)
    with pytest.raises(FileNotFoundError):
        Disk().make_folder(tmp_path / "removed")
