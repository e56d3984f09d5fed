"""Which partition a DID belongs to, as Kafka's Java clients compute it. A core.

Every event topic uses this one function with the same number of partitions, so a DID's events are
in the partition of the same number in each: consumers can join them without a shuffle.
"""

from __future__ import annotations

from functools import lru_cache
from struct import unpack_from
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES_MAX: Final = 65_536  # about 20 MB; the accounts active within minutes fit

_SEED: Final = 0x9747B28C
_M: Final = 0x5BD1E995
_MASK: Final = 0xFFFFFFFF
_POSITIVE: Final = 0x7FFFFFFF


def murmur2(data: bytes) -> int:
    """Return the 32-bit MurmurHash2 of `data`, unsigned, with Kafka's seed.

    Source: `Utils.murmur2` of Kafka's Java clients, which their default partitioner uses for
    records with a key. The tests have its answers.
    """
    length = len(data)
    mixed = _SEED ^ length
    blocks = length >> 2
    for word in unpack_from(f"<{blocks}I", data):
        word = word * _M & _MASK  # noqa: PLW2901 - it is mixed in place
        word = (word ^ word >> 24) * _M & _MASK  # noqa: PLW2901 - as above
        mixed = mixed * _M & _MASK ^ word
    if rest := data[blocks << 2 :]:
        mixed = (mixed ^ int.from_bytes(rest, "little")) * _M & _MASK
    mixed = (mixed ^ mixed >> 13) * _M & _MASK
    return mixed ^ mixed >> 15


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of a record with this key, from 0 to `partitions` - 1."""
    return (murmur2(key) & _POSITIVE) % partitions


def placer(partitions: int) -> Callable[[str], tuple[bytes, int]]:
    """Make a function DID -> (key, partition) that remembers recent answers.

    The hash costs a few microseconds in Python, more than all else that is done for a record.
    """

    @lru_cache(maxsize=PLACES_MAX)
    def place(did: str) -> tuple[bytes, int]:
        key = did.encode()
        return key, partition_of(key, partitions)

    return place
