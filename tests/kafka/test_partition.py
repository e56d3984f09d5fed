"""A DID's partition is the one that every other Kafka client computes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from aiokafka import partitioner
from hypothesis import given
from hypothesis import strategies as st

from blueflow.kafka import partition
from blueflow.kafka.partition import murmur2, partition_of, placer

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

DIDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_hashes_and_partitions_are_those_of_kafkas_java_client(data_folder: Path) -> None:
    vectors = json.loads((data_folder / "kafka" / "murmur2.json").read_text("utf-8"))
    assert len(vectors) > 10
    for vector in vectors:
        key = bytes.fromhex(vector["key_hex"])
        assert murmur2(key) == vector["hash_signed"] % 2**32, vector
        assert partition_of(key, 12) == vector["partition_of_12"], vector
        did = key.decode("utf-8", "surrogateescape")
        if did.isprintable():
            assert placer(12)(did) == (key, vector["partition_of_12"])


@given(st.binary(max_size=200))
def test_the_hash_is_that_of_an_independent_implementation(key: bytes) -> None:
    assert murmur2(key) == partitioner.murmur2(key) % 2**32


@given(st.binary(max_size=60), st.integers(1, 10_000))
def test_a_partition_is_that_of_aiokafkas_own_partitioner(key: bytes, partitions: int) -> None:
    numbers = list(range(partitions))
    assert partition_of(key, partitions) == partitioner.DefaultPartitioner()(key, numbers, numbers)


@given(st.lists(DIDS, max_size=20), st.integers(1, 100))
def test_a_placer_gives_every_time_what_the_hash_says(dids: list[str], partitions: int) -> None:
    place = placer(partitions)
    for did in [*dids, *reversed(dids)]:
        assert place(did) == (did.encode(), partition_of(did.encode(), partitions))


def test_a_placer_hashes_a_did_once_and_forgets_what_came_long_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[bytes] = []

    def counted(key: bytes, partitions: int) -> int:
        hashed.append(key)
        return partition_of(key, partitions)

    monkeypatch.setattr(partition, "partition_of", counted)
    monkeypatch.setattr(partition, "PLACES_MAX", 2)
    place, other = placer(3), placer(4)
    for did in ("did:plc:a", "did:plc:b", "did:plc:a", "did:plc:b", "did:plc:a"):
        place(did)
    assert hashed == [b"did:plc:a", b"did:plc:b"]
    other("did:plc:a")  # placers share nothing: each has a number of partitions of its own
    place("did:plc:c")
    place("did:plc:b")
    assert hashed[2:] == [b"did:plc:a", b"did:plc:c", b"did:plc:b"]
