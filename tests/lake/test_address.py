from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from blueflow.errors import LakeUrlError, MissingExtraError
from blueflow.lake.address import store_of
from blueflow.lake.local import LocalStore
from blueflow.lake.s3 import S3Store
from blueflow.lake.s3client import S3Options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("address", ["lake", "a/b c=1", "/lake", "file:///lake", "./s3:bucket"])
def test_folders(address: str) -> None:
    store = store_of(address)
    assert isinstance(store, LocalStore)
    assert store.url == address.removeprefix("file://").removeprefix("./")


def test_the_folder_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_of("~/lake").url == str(tmp_path / "lake")


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/of/lakes/", "s3://bucket/of/lakes"),
    ],
)
def test_buckets(address: str, url: str) -> None:
    store = store_of(address, S3Options())
    assert isinstance(store, S3Store)
    assert store.url == url


@pytest.mark.parametrize(
    "address", ["", "file://", "s3://", "http://user:password@host/lake", "a\0b", "gs://bucket"]
)
def test_what_is_neither(address: str) -> None:
    with pytest.raises(LakeUrlError) as caught:
        store_of(address, S3Options())
    assert "password" not in str(caught.value)


def test_a_bucket_needs_the_extra_and_a_folder_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("blueflow.lake.s3")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiobotocore.config", None)
    with pytest.raises(MissingExtraError, match=r"blueflow\[lake\]"):
        store_of("s3://bucket")
    assert store_of("lake").url == "lake"
