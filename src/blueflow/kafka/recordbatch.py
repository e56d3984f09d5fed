"""A record batch, as it stands in a produce request.

Source: the record batch of Kafka's protocol, magic 2 (KIP-98). aiokafka's own `BatchBuilder` takes
half of a producer's time: each record goes through a wrapper, and zstd runs at level 3 in a new
context for every batch. Of wire JSON, identifiers for the most part, level 1 makes batches of the
same size.

aiokafka's compiled encoder puts the records in; compression, header and checksum are done here. An
instance stands in for a `BatchBuilder` in `AIOKafkaProducer.send_batch`, which asks for the methods
below and no others.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from zstandard import ZstdCompressor

from blueflow.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blueflow.kafka.transaction import KafkaRecord

BATCH_BYTES: Final = 384 * 1024  # of records before compression; measured best from 256 to 512 KiB
LEVEL: Final = 1

_MAGIC: Final = 2
_NO_PRODUCER: Final = -1
_HEADER_BYTES: Final = 61
_LENGTH_AT, _CRC_AT, _CHECKED_FROM = 8, 17, 21  # CRC-32C of everything from the attributes on
_BEHIND_LENGTH: Final = 12
_ZSTD: Final = 4  # in the attributes' low bits, as `DefaultRecordBatchBuilder` counts codecs
_CODECS: Final = {None: 0, "snappy": 2, "zstd": _ZSTD}
_INT32, _UINT32, _INT16 = Struct(">i"), Struct(">I"), Struct(">h")
_NO_HEADERS: Final[list[Any]] = []


class Batches:
    """Makes the batches of one producer.

    Args:
        compression: "zstd", "snappy" or None.
        transactional: whether they are parts of transactions.
    """

    def __init__(self, compression: str | None, *, transactional: bool) -> None:
        self._codec = _CODECS[compression]
        self._zstd = ZstdCompressor(level=LEVEL) if compression == "zstd" else None
        self._transactional = transactional

    def of(self, records: Sequence[KafkaRecord]) -> Iterator[RecordBatch]:
        """Put records of one partition into as few batches as they need, in order."""
        first, count = 0, len(records)
        while first < count:
            encoder = DefaultRecordBatchBuilder(
                _MAGIC, 0 if self._zstd else self._codec, int(self._transactional),
                _NO_PRODUCER, _NO_PRODUCER, 0, BATCH_BYTES,
            )  # fmt: skip
            append, taken = encoder.append, 0
            for timestamp_ms, key, value in records[first:] if first else records:
                if append(taken, timestamp_ms, key, value, _NO_HEADERS) is None:
                    break
                taken += 1
            if not taken:
                raise InvariantError("a batch takes its first record, whatever its size")
            first += taken
            yield RecordBatch(encoder, taken, self._zstd)


class RecordBatch:
    """Encoded records. aiokafka sets the producer's numbers just before it sends them."""

    def __init__(self, encoder: Any, count: int, zstd: ZstdCompressor | None) -> None:
        self._encoder, self._count, self._zstd = encoder, count, zstd
        self._buffer: bytearray | None = None

    def record_count(self) -> int:
        """Return the number of records."""
        return self._count

    def size(self) -> int:
        """Return the size in bytes, compressed once it was sent."""
        return len(self._buffer) if self._buffer is not None else self._encoder.size()

    def closed(self) -> bool:
        """Tell that nothing can be added."""
        return True

    def close(self) -> None:
        """Do nothing: it is closed."""

    def _set_producer_state(self, producer_id: int, epoch: int, base_sequence: int) -> None:
        self._encoder.set_producer_state(producer_id, epoch, base_sequence)

    def _build(self) -> bytearray:
        if self._buffer is None:  # a batch that is tried again is the same, byte for byte
            built: bytearray = self._encoder.build()
            self._buffer = built if self._zstd is None else _compressed(built, self._zstd)
        return self._buffer


def _compressed(batch: bytearray, zstd: ZstdCompressor) -> bytearray:
    """Return the batch with compressed records; as it is when that gains nothing."""
    body = zstd.compress(memoryview(batch)[_HEADER_BYTES:])
    if _HEADER_BYTES + len(body) >= len(batch):
        return batch
    made = batch[:_HEADER_BYTES]
    made += body
    (attributes,) = _INT16.unpack_from(made, _CHECKED_FROM)
    _INT32.pack_into(made, _LENGTH_AT, len(made) - _BEHIND_LENGTH)
    _INT16.pack_into(made, _CHECKED_FROM, attributes | _ZSTD)
    _UINT32.pack_into(made, _CRC_AT, calc_crc32c(memoryview(made)[_CHECKED_FROM:]))
    return made
