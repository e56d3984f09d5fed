"""The sink contract over the lake, in memory, in a folder and on S3."""

from __future__ import annotations

import io
import json
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from blueflow.lake.local import LocalStore
from blueflow.lake.restore import rows_of, wire_of
from blueflow.lake.writer import LakeWriter
from blueflow.testing.contracts import SinkContract
from blueflow.testing.lakestore import MemoryObjects

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from blueflow.interfaces import Sink
    from blueflow.lake.store import Store


class LakeSinkContract(SinkContract):
    commit_bytes_max = 64 * 1024 * 1024

    def store(self) -> Store:
        raise NotImplementedError

    async def make_sink(self) -> Sink:
        return LakeWriter(
            "the store says",
            origin_source=self.source,
            simulated=True,
            commit_bytes_max=self.commit_bytes_max,
            store=self.store(),
        )

    async def stored_events(self) -> Sequence[Mapping[str, Any]]:
        store = self.store()
        await store.open(create=False)
        try:
            found: list[dict[str, Any]] = []
            for one in await store.list("fresh/"):
                data = await store.get(one.key)
                assert data is not None
                table = pq.read_table(io.BytesIO(data))
                found += [json.loads(wire_of(row)) for row in rows_of(table)]
        finally:
            await store.close()
        # A table has no order of its own: its columns tell the one that the source had.
        return sorted(found, key=lambda one: (one["source"], one["seq"], one["op_index"]))


class TestInMemory(LakeSinkContract):
    @pytest.fixture(autouse=True)
    def _new(self) -> None:
        self.memory = MemoryObjects(clock=time.time)

    def store(self) -> Store:
        return self.memory


class TestInMemoryWithACommitForEveryWrite(TestInMemory):
    commit_bytes_max = 1


class TestInAFolder(LakeSinkContract):
    @pytest.fixture(autouse=True)
    def _new(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "lake"

    def store(self) -> Store:
        return LocalStore(self.folder)
