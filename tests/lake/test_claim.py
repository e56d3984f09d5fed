"""What the next record of a shard's log says."""

from __future__ import annotations

from itertools import permutations

from blueflow.lake.claim import claim_after, furthest, seal_after
from blueflow.lake.logrecord import Input, ShardRecord


def record(made_s: float, **inputs: Input) -> ShardRecord:
    return ShardRecord(7, "commit", "a", made_s, "kafka", inputs, watermark_us=5, rows=3, bytes=9)


def test_each_input_counts_as_far_as_anybody_read_it() -> None:
    records = [
        record(1, a=Input(9), b=Input(2)),
        record(2, a=Input(4), c=Input(1)),
        record(3, b=Input(8)),
    ]
    for some in permutations(records):
        assert furthest(some) == {"a": Input(9), "b": Input(8), "c": Input(1)}


def test_of_a_topic_that_was_made_anew_the_latest_generation_counts() -> None:
    old, new = Input(90, topic_id="old"), Input(3, topic_id="new", generation=1)
    for some in permutations([record(1, a=old), record(2, a=new)]):
        assert furthest(some) == {"a": new}


def test_a_claim_and_a_seal_move_nothing() -> None:
    last = record(1, a=Input(9))
    claim = claim_after(last, [], instance="b", made_s=2, reads="kafka")
    seal = seal_after(last, instance="b", made_s=2)
    for one in (claim, seal):
        assert (one.number, one.inputs, one.watermark_us) == (8, last.inputs, 5)
        assert (one.rows, one.bytes, one.files, one.since) == (3, 9, (), {})
    first = claim_after(None, [], instance="b", made_s=2, reads="source")
    assert (first.number, first.inputs) == (1, {})
