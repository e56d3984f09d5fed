"""What one transaction holds: whole firehose events, in batches by partition, and their position.

A core: it encodes and counts; time comes in as an argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec

from blueflow.events import decode_line, encode_event
from blueflow.kafka.partition import placer
from blueflow.records import dataset_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from blueflow.events import Event, Position
    from blueflow.kafka.topicnames import TopicNames

CLOCK_AHEAD_US: Final = 300_000_000  # brokers refuse records more than an hour ahead of them
RECORD_OVERHEAD: Final = 128  # what a batch adds to a record that is alone in it, at most
EVENTS_MAX: Final = 20_000  # of one transaction; more gain nothing, and take longer to repeat
QUIET_S: Final = 5.0  # how long a position without events may wait
_DETAIL_EVENT_BYTES_MAX: Final = 256 * 1024


# One record as it is sent: timestamp in milliseconds, key, value. A plain tuple is made in a tenth
# of the time of a named one, and the garbage collector does not look at it again.
KafkaRecord: TypeAlias = tuple[int, bytes, bytes]


class Partition(NamedTuple):
    """One partition of one topic."""

    topic: str
    number: int


class Transaction:
    """Events and positions that become durable together."""

    def __init__(self) -> None:
        self.records: dict[Partition, list[KafkaRecord]] = {}
        self.positions: dict[str, Position] = {}
        self.dead_letters: list[KafkaRecord] = []
        self.events = 0
        self.bytes = 0
        self.began_s = self.events_began_s = 0.0
        self.taken_s: list[float] = []  # when events were taken, once for each batch

    def __bool__(self) -> bool:
        return bool(self.positions)

    def due_s(self, age_s: float) -> float:
        """Return when it is to be committed for its age; infinity while it is empty."""
        if self.events:
            return self.events_began_s + age_s
        return self.began_s + max(age_s, QUIET_S) if self.positions else float("inf")

    def is_full(self, bytes_max: int) -> bool:
        """Tell whether it is to be committed for its size."""
        return self.bytes >= bytes_max or self.events >= EVENTS_MAX


class Assembler:
    """Puts events into transactions.

    Args:
        names: the topics.
        partitions: of each event topic.
        record_bytes_max: what the topics take.
    """

    def __init__(self, names: TopicNames, partitions: int, record_bytes_max: int) -> None:
        self._place: Callable[[str], tuple[bytes, int]] = placer(partitions)
        self._by_dataset = {
            dataset: [Partition(topic, number) for number in range(partitions)]
            for dataset, topic in names.of_dataset.items()
        }
        self._value_bytes_max = record_bytes_max - RECORD_OVERHEAD

    def take(
        self,
        transaction: Transaction,
        events: Sequence[Event],
        through: Position,
        *,
        now_s: float,
        clock_us: int,
    ) -> None:
        """Add events and the position that covers them.

        Args:
            transaction: where to.
            events: in the order of the source.
            through: the position.
            now_s: monotonic.
            clock_us: since 1970.
        """
        place, by_dataset, records = self._place, self._by_dataset, transaction.records
        latest_us, value_bytes_max = clock_us + CLOCK_AHEAD_US, self._value_bytes_max
        size = 0
        for event in events:
            key, number = place(event.did)
            value = encode_event(event)
            time_us = event.time_us
            record = (min(time_us, latest_us) // 1000, key, value)
            partition = by_dataset[dataset_of(event)][number]
            length = len(key) + len(value)
            if length > value_bytes_max:
                detail = f"{length:,} bytes"
                letter = dead_letter(partition, record, "too_large", detail, clock_us)
                transaction.dead_letters.append(letter)
                continue
            size += length
            if (group := records.get(partition)) is None:
                records[partition] = [record]
            else:
                group.append(record)
        if not transaction.positions:
            transaction.began_s = now_s
        if events:
            if not transaction.events:
                transaction.events_began_s = now_s
            transaction.taken_s.append(now_s)
        transaction.events += len(events)
        transaction.bytes += size
        transaction.positions[through.source] = through


def dead_letter(
    partition: Partition, record: KafkaRecord, reason: str, detail: str, clock_us: int
) -> KafkaRecord:
    """Return the record for `dlq` that stands for one that Kafka does not take.

    Value: `{"reason", "detail", "at_us", "topic", "partition", "source", "seq", "op_index", "uri",
    "bytes", "event"}`. `event` is the wire JSON, or null when it is large: then `uri` says where to
    fetch the record from.
    """
    _, key, line = record
    event = decode_line(line, "", 0)
    small = len(line) <= _DETAIL_EVENT_BYTES_MAX
    value = {
        "reason": reason,
        "detail": detail,
        "at_us": clock_us,
        "topic": partition.topic,
        "partition": partition.number,
        "source": event.source,
        "seq": event.seq,
        "op_index": event.op_index,
        "uri": getattr(event, "uri", f"at://{event.did}"),
        "bytes": len(line),
        "event": msgspec.Raw(line) if small else None,
    }
    return clock_us // 1000, key, msgspec.json.encode(value)


def halves(records: Sequence[KafkaRecord]) -> Iterator[Sequence[KafkaRecord]]:
    """Cut records in two, to find the one that fails."""
    middle = len(records) // 2
    yield records[:middle]
    yield records[middle:]


def without(
    records: Mapping[Partition, Sequence[KafkaRecord]],
    failing: Mapping[Partition, Sequence[KafkaRecord]],
) -> dict[Partition, list[KafkaRecord]]:
    """Return the records without those that fail, in their order."""
    left = {}
    for partition, group in records.items():
        out = {id(record) for record in failing.get(partition, ())}
        kept = [record for record in group if id(record) not in out]
        if kept:
            left[partition] = kept
    return left
