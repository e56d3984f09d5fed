from __future__ import annotations

from collections import Counter

import msgspec
import pytest

pytest.importorskip("aiokafka")
pytest.importorskip("confluent_kafka")

import _kafka
import kafka_sink
import produce_kafka
from produce_kafka import Run, Sample


def test_records_are_in_the_shares_of_the_network_and_repeatable() -> None:
    made = _kafka.records(5_000, 1, 1_783_176_000_000_000)
    assert made == _kafka.records(5_000, 1, 1_783_176_000_000_000)
    assert made != _kafka.records(5_000, 2, 1_783_176_000_000_000)
    count = Counter(record.dataset for record in made)
    for dataset, share in _kafka.SHARES.items():
        assert count[dataset] / 5_000 == pytest.approx(share, abs=0.02)
    assert len({record.did for record in made}) > 2_500
    assert 400 < sum(len(record.value) for record in made) / 5_000 < 600
    line = msgspec.json.decode(made[7].value)
    assert line["did"] == made[7].did
    assert line["time_us"] // 1000 == made[7].timestamp_ms


def test_ratios_are_medians_of_the_rounds() -> None:
    rates = {
        name: [{"cpu_s": factor * speed, "wall_s": 1.0} for factor in (1, 2, 4)]
        for name, speed in (
            ("transactional", 300), ("idempotent", 400), ("send", 100), ("aioproducer", 200),
            ("confluent", 400),
        )
    }  # fmt: skip
    found = {case["case"]: case for case in kafka_sink.cases(rates)}
    assert found["idempotent_vs_send"] == {
        "case": "idempotent_vs_send",
        "ours": 800,
        "peer": 200,
        "unit": "messages/s of client CPU",
        "ratio": 4.0,
    }
    assert found["transactional_vs_send"]["ratio"] == 3.0
    assert found["idempotent_vs_aioproducer"]["ratio"] == 2.0
    assert found["idempotent_vs_confluent_wall"]["ratio"] == 1.0


def sample(at_s: float, cpu_s: float, offsets: int) -> Sample:
    return Sample(at_s, cpu_s, offsets, memory=100 + offsets)


def test_a_flat_out_run_is_judged_between_two_moments_that_saw_something_new() -> None:
    samples = [
        sample(0, 0.5, 0), sample(1, 1.0, 110), sample(2, 1.5, 220), sample(3, 2.0, 330),
        sample(4, 9.0, 330),
    ]  # fmt: skip
    end = sample(5, 9.0, 440)  # 40 of these offsets are marks of transactions
    run = produce_kafka.flat_out_of(samples, end, 400)
    assert run == pytest.approx(Run(events_s=100, cpu_us=5_000, memory=430))


def test_a_client_that_wrote_nothing_is_no_result() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        produce_kafka.flat_out([sample(0, 0, 0), sample(1, 1, 0)], 0)


def test_latencies_leave_out_the_start_and_what_came_before_the_bystander() -> None:
    received_s = {2: 10.0, 3: 10.5, 4: 11.0, 5: 12.0}
    seen = [(1, 10.1), (2, 10.3), (3, 10.8), (4, 11.25), (5, 12.5), (5, 12.5)]
    assert produce_kafka.latencies_of(received_s, seen) == [0.25, 0.5, 0.5]


def test_percentiles() -> None:
    p50, p99 = produce_kafka.percentiles([number / 100 for number in range(101)])
    assert (p50, p99) == (0.5, 0.99)
    with pytest.raises(AssertionError, match="too few"):
        produce_kafka.percentiles([1.0])


def test_what_is_less_is_better_for_cpu_and_memory() -> None:
    runs = {"ours": [Run(20_000, 40, 50 << 20)] * 3, "peer": [Run(4_000, 200, 100 << 20)] * 3}
    found = {case["case"]: case["ratio"] for case in produce_kafka.cases(runs)}
    assert found == {"sustained": 5.0, "cpu_per_event": 5.0, "memory": 2.0}
