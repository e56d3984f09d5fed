"""The contract of a lake's store over every store, the memory double included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.s3 import new_bucket, options_of

from blueflow.lake.local import LocalStore
from blueflow.lake.s3 import S3Store
from blueflow.testing.contracts import StoreContract
from blueflow.testing.lakestore import MemoryObjects

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.lake.s3 import S3Options
    from blueflow.lake.store import Store
    from blueflow.testing.services.s3 import SeaweedServer

PAGE = 1000  # what a server lists, and removes, at once


class TestMemoryObjects(StoreContract):
    @pytest.fixture(autouse=True)
    def _new_store(self) -> None:
        self.store = MemoryObjects()

    async def make_store(self) -> Store:
        return self.store


class TestLocalStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _new_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "a lake=1"

    async def make_store(self) -> Store:
        return LocalStore(self.folder)

    async def test_arrow_reads_it(self) -> None:
        async with self._opened() as store:
            await arrow_reads(store)


class TestSeaweed(StoreContract):
    many = PAGE + 5

    @pytest.fixture(autouse=True)
    def _new_bucket(self, seaweed: SeaweedServer) -> None:
        self.options = options_of(seaweed)
        self.bucket = new_bucket()

    async def make_store(self) -> Store:
        return S3Store(f"s3://{self.bucket}/of several/lakes", self.options)

    async def test_arrow_reads_it(self) -> None:
        async with self._opened() as store:
            await arrow_reads(store)


class TestMoto(StoreContract):
    # moto answers 500 to the completion of an upload that was aborted, and says 2010 of all.
    test_an_upload_that_is_gone_is_told = None  # type: ignore[assignment]
    test_an_upload_says_when_it_began = None  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def _new_bucket(self, moto: S3Options) -> None:
        self.options = moto
        self.bucket = new_bucket()

    async def make_store(self) -> Store:
        return S3Store(f"s3://{self.bucket}", self.options)


async def arrow_reads(store: Store) -> None:
    key = "raw/posts/year=2026/a b.parquet"
    await store.put_new(key, b"content")
    files, root = store.filesystem()
    with files.open_input_file(f"{root}/{key}") as file:
        assert file.read() == b"content"
