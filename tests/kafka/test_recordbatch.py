"""Our batches, read back by aiokafka's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given, settings
from hypothesis import strategies as st

from blueflow.kafka.recordbatch import BATCH_BYTES, Batches, RecordBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.kafka.transaction import KafkaRecord

CODECS = {None: 0, "snappy": 2, "zstd": 4}
RECORDS = st.lists(
    st.tuples(st.integers(0, 2**42), st.binary(max_size=40), st.binary(max_size=300)), max_size=60
)


def read(batch: RecordBatch) -> tuple[Any, list[KafkaRecord]]:
    """Return the header as aiokafka's decoder sees it, and the records."""
    memory = MemoryRecords(bytes(batch._build()))
    decoded = memory.next_batch()
    assert decoded is not None
    assert decoded.validate_crc()
    records = [(record.timestamp, record.key, record.value) for record in decoded]
    assert [record.offset for record in MemoryRecords(bytes(batch._build())).next_batch()] == list(
        range(len(records))
    )
    assert memory.next_batch() is None
    return decoded, records


def all_of(batches: Sequence[RecordBatch]) -> list[KafkaRecord]:
    return [record for batch in batches for record in read(batch)[1]]


@settings.get_profile("codec")
@given(RECORDS, st.sampled_from([*CODECS]))
def test_what_goes_in_comes_out(records: list[KafkaRecord], compression: str | None) -> None:
    batches = list(Batches(compression, transactional=True).of(records))
    assert all_of(batches) == records
    assert sum(batch.record_count() for batch in batches) == len(records)


@pytest.mark.parametrize("compression", [*CODECS])
@pytest.mark.parametrize("transactional", [True, False])
def test_the_header_says_what_the_batch_is(compression: str | None, *, transactional: bool) -> None:
    value = b'{"did":"did:plc:a"}' * 20
    records = [(1_783_176_000_000 + n, b"did:plc:a", value) for n in range(50)]
    (batch,) = Batches(compression, transactional=transactional).of(records)
    batch._set_producer_state(2**40, 7, 123)
    header, _ = read(batch)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (2**40, 7, 123)
    assert (header.magic, header.compression_type) == (2, CODECS[compression])
    assert header.is_transactional is transactional
    assert (batch.closed(), batch.record_count()) == (True, 50)
    assert batch.size() == len(batch._build())
    assert compression is None or batch.size() < 50 * len(value) / 10


def test_a_batch_that_is_sent_again_is_the_same_byte_for_byte() -> None:
    (batch,) = Batches("zstd", transactional=True).of([(1, b"k", b"v" * 1000)])
    batch._set_producer_state(1, 0, 0)
    first = bytes(batch._build())
    batch.close()
    assert bytes(batch._build()) == first


def test_what_does_not_shrink_goes_as_it_is() -> None:
    (batch,) = Batches("zstd", transactional=True).of([(1, b"k", b"v")])
    header, records = read(batch)
    assert (header.compression_type, records) == (0, [(1, b"k", b"v")])


def test_batches_are_full_and_a_large_record_goes_alone() -> None:
    small, large = (1, b"k", b"x" * 1000), (2, b"k", b"y" * (2 * BATCH_BYTES))
    batches = list(Batches(None, transactional=True).of([small, large, small, *[small] * 1000]))
    assert [batch.record_count() for batch in batches[:2]] == [1, 1]
    assert batches[2].size() > BATCH_BYTES - 2000
    assert all(batch.size() <= BATCH_BYTES for batch in batches[2:])
    assert all_of(batches) == [small, large, small, *[small] * 1000]
