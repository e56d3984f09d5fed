"""Wire JSON out of Kafka as it stands there, for who decodes it another way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from blueflow.kafka.fetcher import Fetcher

if TYPE_CHECKING:
    from aiokafka import ConsumerRecord, TopicPartition


class LineBatch(msgspec.Struct, frozen=True):
    """Consecutive records of one partition.

    Attributes:
        topic: where they were.
        partition: its number.
        lines: their values; empty where there was none.
        offsets: of each; they rise, with gaps.
        next_offset: where the partition goes on behind this batch.
        newest_ms: the newest of their timestamps, milliseconds since 1970: the relay's time.
    """

    topic: str
    partition: int
    lines: Sequence[bytes]
    offsets: Sequence[int]
    next_offset: int
    newest_ms: int


class LineReader(Fetcher[LineBatch]):
    """Batches of committed records, undecoded."""

    def _batch_of(self, partition: TopicPartition, records: list[ConsumerRecord]) -> LineBatch:
        return LineBatch(
            partition.topic,
            partition.partition,
            [record.value or b"" for record in records],
            [record.offset for record in records],
            records[-1].offset + 1,
            max(record.timestamp for record in records),
        )
