"""What the next record of a shard's log says. Pure: no store, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blueflow.lake.logrecord import Repair, ShardRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from blueflow.lake.logrecord import Input, LakeFile, Lost, Reads


def claim_after(
    last: ShardRecord | None,
    gone: Sequence[LakeFile],
    *,
    instance: str,
    made_s: float,
    reads: Reads,
) -> ShardRecord:
    """Return the record by which a process takes a shard over.

    Args:
        last: the last record; None when there is none.
        gone: files of it that cannot be completed any more.
        instance: the process.
        made_s: its clock.
        reads: what kind of input it reads.
    """
    if last is None:
        return ShardRecord(1, "claim", instance, made_s, reads, {})
    repair = last.repair
    if gone:  # a commit; nothing is published while a repair is due, so it has none of its own
        repair = Repair(tuple(gone), last.since, last.inputs)
    return ShardRecord(
        last.number + 1,
        "claim",
        instance,
        made_s,
        reads,
        last.inputs,
        watermark_us=last.watermark_us,
        repair=repair,
        rows=last.rows,
        bytes=last.bytes,
    )


def commit_after(
    last: ShardRecord,
    files: Sequence[LakeFile],
    inputs: Mapping[str, Input],
    *,
    since: Mapping[str, Input],
    watermark_us: int,
    lost: Sequence[Lost],
    instance: str,
    made_s: float,
) -> ShardRecord:
    """Return the record that publishes files; see `ShardLog.publish`.

    One that replaces files keeps the range they were made from: should their uploads go as well,
    they can be made once more.
    """
    again = last.repair is not None
    return ShardRecord(
        last.number + 1,
        "commit",
        instance,
        made_s,
        last.reads,
        {**last.inputs, **inputs},
        since=dict(last.repair.since if last.repair else since),
        watermark_us=max(last.watermark_us, watermark_us),
        files=tuple(files),
        lost=tuple(lost),
        rows=last.rows + (0 if again else sum(file.rows for file in files)),
        bytes=last.bytes + (0 if again else sum(file.staged.size for file in files)),
    )


def seal_after(last: ShardRecord, *, instance: str, made_s: float) -> ShardRecord:
    """Return the record that ends a log, until somebody claims it again."""
    return ShardRecord(
        last.number + 1,
        "seal",
        instance,
        made_s,
        last.reads,
        last.inputs,
        watermark_us=last.watermark_us,
        rows=last.rows,
        bytes=last.bytes,
    )


def furthest(records: Iterable[ShardRecord]) -> dict[str, Input]:
    """Return how far each input was read by whoever read it furthest.

    A topic that was made anew counts from its beginning.
    """
    found: dict[str, Input] = {}
    for record in records:
        for name, one in record.inputs.items():
            other = found.get(name, one)
            found[name] = max(other, one, key=lambda read: (read.generation, read.next))
    return found
