"""What docs/guides/kafka.md and consume.md name is there: flags, metrics, errors, defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from blueflow.kafka.sink import COMMIT_INTERVAL_S
from blueflow.kafka.supervisor import _BISECT_AFTER, _REFUSED_MAX
from blueflow.kafka.topicnames import CURSOR, DLQ, PREFIX, SINGLE
from blueflow.kafka.topics import RECORD_BYTES_MAX
from blueflow.metrics import Metrics
from blueflow.records import DATASETS
from blueflow.settings import SETTINGS

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
OPERATE = (GUIDES / "kafka.md").read_text(encoding="utf-8")
CONSUME = (GUIDES / "consume.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["kafka.md", "consume.md"])
def test_flags_exist(page: str) -> None:
    text = (GUIDES / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", prose))
    foreign = {"--alter", "--broker-id"}  # of Kafka's tools
    assert len(named) > 3
    assert named - foreign - {setting.flag for setting in SETTINGS.values()} == set()


def test_variables_exist() -> None:
    named = set(re.findall(r"\b(BLUEFLOW_\w+|KAFKA_\w+)\b", OPERATE))
    assert len(named) > 3
    assert named - {setting.environment for setting in SETTINGS.values()} == set()


def test_metrics_exist() -> None:
    registry = CollectorRegistry()
    assert Metrics(registry).kafka  # made when it is first asked for
    page = generate_latest(registry).decode()
    named = set(re.findall(r"\bblueflow_kafka_\w+", OPERATE + CONSUME))
    assert len(named) > 5
    missing = [name for name in named if not re.search(rf"^(# TYPE )?{name}\b", page, re.MULTILINE)]
    assert missing == []
    outcomes = re.findall(r'(\w+)\{(?:outcome|reason)="(\w+)"\}', OPERATE)
    assert len(outcomes) > 2
    for name, value in outcomes:
        assert re.search(rf'^{name}\{{\w+="{value}"\}}', page, re.MULTILINE), (name, value)


def test_topics_are_those_of_the_code() -> None:
    named = set(re.findall(r"^\| `bluesky\.(\w+)`", CONSUME, re.MULTILINE))
    assert named == {*DATASETS, SINGLE, CURSOR, DLQ}
    assert PREFIX == "bluesky."


def test_defaults_and_bounds_are_those_of_the_code() -> None:
    assert "| `--partitions` | 8 |" in OPERATE
    assert SETTINGS["partitions"].default == 8
    assert "| `--kafka-retention` | 7 days |" in OPERATE
    assert SETTINGS["kafka_retention_s"].default == 7 * 86_400
    assert "| `--transaction-timeout` | 15 s |" in OPERATE
    assert SETTINGS["transaction_timeout_s"].default == 15
    assert "`--commit-interval` (0.3 s)" in CONSUME
    assert COMMIT_INTERVAL_S == 0.3
    assert f"8 MiB ({RECORD_BYTES_MAX})" in OPERATE
    assert "refuse a batch three times" in OPERATE
    assert _BISECT_AFTER == 3
    assert f"More than {_REFUSED_MAX} in one transaction" in OPERATE


def test_the_service_file_stops_at_every_code_that_a_restart_does_not_help() -> None:
    codes = re.findall(r"^RestartPreventExitStatus=(.+)$", OPERATE, re.MULTILINE)
    assert codes == ["2 70 73 78"]
