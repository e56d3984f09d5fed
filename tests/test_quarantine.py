from __future__ import annotations

import errno
import logging
from base64 import b64decode
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blueflow.interfaces import Rejected
from blueflow.metrics import Metrics
from blueflow.quarantine import MESSAGE_BYTES_MAX, Quarantine

NOW_S = 1_783_180_800.25


class Kept:
    """A quarantine in a folder, and what a reader finds there."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.metrics = Metrics()
        self.folder = folder
        self.quarantine = Quarantine(folder, self.metrics, **options)
        self.number = 0

    async def put(self, *sizes: int, **different: Any) -> None:
        await self.quarantine.put([self.rejected(size, **different) for size in sizes], NOW_S)

    def rejected(self, size: int, **different: Any) -> Rejected:
        self.number += 1
        plain = Rejected("host", 7, self.number, None, "cbor", "broken", bytes([size % 256]) * size)
        return msgspec.structs.replace(plain, **different)

    def entries(self, name: str = "quarantine.jsonl") -> list[Any]:
        path = self.folder / name
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]

    def count(self, family: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"blueflow_pipeline_{family}_total", labels)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "deep" / "quarantine")


async def test_nothing_is_made_before_the_first_entry(kept: Kept) -> None:
    assert not kept.folder.exists()
    await kept.put(3)
    assert [path.name for path in kept.folder.iterdir()] == ["quarantine.jsonl"]


async def test_an_entry_has_everything_a_person_needs(kept: Kept) -> None:
    message = bytes(range(256))
    await kept.put(1, message=message, op_index=3, reason="hash", detail="no match")
    assert kept.entries() == [
        {
            "at": "2026-07-04T16:00:00.250+00:00",
            "source": "host",
            "after_seq": 7,
            "seq": 1,
            "op_index": 3,
            "reason": "hash",
            "detail": "no match",
            "message_bytes": 256,
            "message": kept.entries()[0]["message"],
        }
    ]
    assert b64decode(kept.entries()[0]["message"]) == message


async def test_a_large_message_is_cut_and_says_so(kept: Kept) -> None:
    await kept.put(MESSAGE_BYTES_MAX + 5)
    (entry,) = kept.entries()
    assert entry["message_bytes"] == MESSAGE_BYTES_MAX + 5
    assert len(b64decode(entry["message"])) == MESSAGE_BYTES_MAX


async def test_entries_add_up_over_restarts(kept: Kept) -> None:
    await kept.put(1, 2)
    again = Kept(kept.folder)
    await again.put(3)
    assert [entry["message_bytes"] for entry in again.entries()] == [1, 2, 3]
    assert (kept.quarantine.count, again.quarantine.count) == (2, 1)


async def test_it_stays_within_its_bound_and_counts_what_it_lets_go(tmp_path: Path) -> None:
    kept = Kept(tmp_path, bytes_max=2000)
    for size in range(1, 101):
        await kept.put(size)
        assert kept.size <= 4000
    newest = kept.entries("quarantine.older.jsonl") + kept.entries()
    sizes = [entry["message_bytes"] for entry in newest]
    assert sizes == list(range(sizes[0], 101))
    assert kept.count("dropped", stage="quarantine", reason="full") == sizes[0] - 1
    assert sizes[0] > 50


async def test_one_large_batch_stays_within_the_bound_too(tmp_path: Path) -> None:
    kept = Kept(tmp_path, bytes_max=2000)
    await kept.put(*range(1, 101))
    assert kept.size <= 4000
    newest = kept.entries("quarantine.older.jsonl") + kept.entries()
    sizes = [entry["message_bytes"] for entry in newest]
    assert sizes == list(range(sizes[0], 101))
    assert kept.count("dropped", stage="quarantine", reason="full") == sizes[0] - 1


async def test_an_entry_above_the_bound_is_kept_alone(tmp_path: Path) -> None:
    kept = Kept(tmp_path, bytes_max=100)
    for size in (1000, 1001, 1002):
        await kept.put(size)
    assert [entry["message_bytes"] for entry in kept.entries()] == [1002]
    assert [e["message_bytes"] for e in kept.entries("quarantine.older.jsonl")] == [1001]
    assert kept.count("dropped", stage="quarantine", reason="full") == 1


async def test_operations_of_one_commit_share_its_message(tmp_path: Path) -> None:
    kept, message = Kept(tmp_path, bytes_max=6000), b"m" * 1000
    await kept.put(*[1] * 30, message=message)
    entries = kept.entries("quarantine.older.jsonl") + kept.entries()
    assert len(entries) == 30
    for file in (kept.entries("quarantine.older.jsonl"), kept.entries()):
        assert b64decode(file[0]["message"]) == message  # each file can be read by itself
        assert {entry["message"] for entry in file[1:]} == {None}
    await kept.put(1)
    assert kept.entries()[-1]["message"] is not None


async def test_what_is_counted(kept: Kept) -> None:
    await kept.put(1, 2, 3)
    await kept.put(4, reason="hash")
    await kept.put(5, reason="newer than this list")
    assert kept.count("quarantined", reason="cbor") == 3
    assert kept.count("quarantined", reason="hash") == 1
    assert kept.count("quarantined", reason="other") == 1


async def test_the_log_has_a_sample_and_no_bytes(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        await kept.put(1, message=b"private", detail="line\nbreak\x1b[31m" + "x" * 5000)
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert 1 <= len(records) <= 10
    first = vars(records[0])
    assert first["reason"] == "cbor"
    assert "\n" not in first["detail"]
    assert "\x1b" not in first["detail"]
    assert len(first["detail"]) <= 200
    assert "private" not in caplog.text


@pytest.mark.parametrize("detail", ["\ud800", "\x00", "\N{SNOWMAN}" * 1000, "\udcff" * 1000, ""])
async def test_any_detail_can_be_written(kept: Kept, detail: str) -> None:
    await kept.put(1, detail=detail)
    assert len(kept.entries()) == 1


@pytest.mark.parametrize("half", [b'{"at": "2026', b"\x00\xff"])
async def test_a_line_that_was_cut_off_costs_itself_alone(kept: Kept, half: bytes) -> None:
    await kept.put(1)
    with (kept.folder / "quarantine.jsonl").open("ab") as file:
        file.write(half)  # kill -9, or no space left
    await kept.put(2)
    lines = (kept.folder / "quarantine.jsonl").read_bytes().splitlines()
    assert lines[1] == half
    assert msgspec.json.decode(lines[2])["message_bytes"] == 2


async def test_a_disk_error_is_counted_and_told(
    kept: Kept, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        await kept.put(1, 2)
    assert kept.count("dropped", stage="quarantine", reason="write_error") == 2
    assert kept.count("quarantined", reason="cbor") == 2
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "No space left" in vars(error)["problem"]
    await kept.put(3)  # it tries again
    assert [entry["message_bytes"] for entry in kept.entries()] == [3]


async def test_a_file_in_the_way_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("x")
    kept = Kept(tmp_path / "in-the-way" / "quarantine")
    await kept.put(1)
    assert kept.count("dropped", stage="quarantine", reason="write_error") == 1
