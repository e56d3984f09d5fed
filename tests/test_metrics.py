from __future__ import annotations

import math
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from blueflow import decode, events
from blueflow import metrics as families
from blueflow.kafka import supervisor
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def clock() -> list[float]:
    return [1_000.0]


@pytest.fixture
def metrics(clock: list[float]) -> Metrics:
    return Metrics(CollectorRegistry(), clock=lambda: clock[0])


@pytest.mark.needs("promtool")
def test_promtool_has_no_complaint() -> None:
    metrics = Metrics()
    metrics.describe(pipeline="default", source="bsky.network", sink="jsonl", simulated=False)
    metrics.source.newest(1, 1)
    metrics.kafka.records.inc()
    check = subprocess.run(
        ["promtool", "check", "metrics"],  # noqa: S607 - from PATH, as the operator has it
        input=metrics.exposition(),
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, b"")


def test_names_follow_the_rules() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.kafka.records.inc()
    for family in metrics.registry.collect():
        assert re.fullmatch(r"blueflow_[a-z_]+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith(("_total", "_s", "_us", "_ms", "_count")), family.name


def test_every_known_series_exists_before_its_first_event(metrics: Metrics) -> None:
    assert value(metrics, "blueflow_source_reconnects_total", reason="too_slow") == 0
    for stage, reason in families.DROPS:
        name = "blueflow_pipeline_dropped_total"
        assert value(metrics, name, stage=stage, reason=reason) == 0


def test_families_of_kafka_exist_from_their_first_use_on(metrics: Metrics) -> None:
    assert b"blueflow_kafka" not in metrics.exposition()
    assert metrics.kafka is metrics.kafka
    for name, label, known in (
        ("transactions", "outcome", families.TRANSACTION_OUTCOMES),
        ("producer_rebuilds", "reason", families.REBUILD_REASONS),
        ("dead_letters", "reason", families.DLQ_REASONS),
    ):
        for one in (*known, "other"):
            assert value(metrics, f"blueflow_kafka_{name}_total", **{label: one}) == 0


def test_an_unknown_label_counts_as_other(metrics: Metrics) -> None:
    before = metrics.exposition().count(b"\n")
    metrics.source.reconnects["closed_1000"].inc()
    metrics.source.reconnects["<script>"].inc(2)
    metrics.pipeline.dropped["nowhere", "no reason"].inc()
    metrics.pipeline.operations["app.bsky.feed.post", "create"].inc(3)
    metrics.pipeline.operations["com.example.mine", "delete"].inc(4)
    metrics.pipeline.operations["app.bsky.feed.post", "explode"].inc(5)
    assert value(metrics, "blueflow_source_reconnects_total", reason="closed_1000") == 1
    assert value(metrics, "blueflow_source_reconnects_total", reason="other") == 2
    assert value(metrics, "blueflow_pipeline_dropped_total", stage="other", reason="other") == 1
    counted: Callable[[str, str], float | None] = lambda collection, operation: value(  # noqa: E731
        metrics,
        "blueflow_pipeline_operations_total",
        collection=collection,
        operation=operation,
    )
    assert counted("post", "create") == 3
    assert counted("other", "delete") == 4
    assert counted("other", "other") == 5
    assert metrics.exposition().count(b"\n") == before  # strangers cannot make series


def test_labels_cover_what_the_cores_can_say() -> None:
    assert set(decode.REJECT_REASONS) <= set(families.REJECT_REASONS)
    assert set(families.KINDS) == set(events._KINDS.values())
    assert set(supervisor._REASONS.values()) == set(families.REBUILD_REASONS)


def test_running_totals_of_a_core_are_counted_once(metrics: Metrics) -> None:
    for total in (3, 3, 10):
        metrics.source.missed_seqs.reach(total)
    assert value(metrics, "blueflow_source_missed_seqs_total") == 10
    with pytest.raises(ValueError, match="non-negative"):
        metrics.source.missed_seqs.reach(9)
    metrics.source.missed_seqs.inc(2)
    assert value(metrics, "blueflow_source_missed_seqs_total") == 12


def test_the_lag_grows_while_nothing_arrives(metrics: Metrics, clock: list[float]) -> None:
    lag = "blueflow_source_lag_seconds"
    assert math.isnan(value(metrics, lag) or 0)
    metrics.source.newest(31_527_015_322, 990_000_000)
    assert value(metrics, lag) == 10
    clock[0] += 5
    assert value(metrics, lag) == 15
    metrics.source.newest(31_527_015_323, 0)  # a frame without a usable time
    assert value(metrics, lag) == 15
    metrics.source.newest(31_527_015_324, 2_000_000_000)  # a relay whose clock is ahead
    assert value(metrics, lag) == 0
    assert value(metrics, "blueflow_source_last_seq") == 31_527_015_324


def test_what_is_durable(metrics: Metrics, clock: list[float]) -> None:
    names = ("durable_seq", "durable_time_seconds", "durable_age_seconds")
    assert all(math.isnan(value(metrics, f"blueflow_sink_{name}") or 0) for name in names)
    metrics.sink.durable(7, 900_000_000)
    clock[0] += 2
    assert [value(metrics, f"blueflow_sink_{name}") for name in names] == [7, 900, 2]
    metrics.sink.durable(8, 0)
    assert [value(metrics, f"blueflow_sink_{name}") for name in names] == [8, 900, 0]


def test_two_flows_in_one_process_do_not_meet() -> None:
    one, two = Metrics(), Metrics()
    one.source.frames.inc(5)
    assert value(two, "blueflow_source_frames_total") == 0


def test_the_exposition_tells_what_runs_and_has_no_created_series() -> None:
    metrics = Metrics()
    metrics.describe(pipeline="p", source="sim", sink="stdout", simulated=True)
    text = metrics.exposition().decode()
    flow = 'blueflow_flow_info{pipeline="p",simulated="true",sink="stdout",source="sim"} 1.0'
    assert flow in text
    assert 'blueflow_build_info{python="' in text
    assert "process_resident_memory_bytes" in text or "python_info" in text
    assert "_created" not in text
