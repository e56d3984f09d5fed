"""The sink against planned errors of its requests: done in full, or ended with a typed error."""

from __future__ import annotations

import asyncio
import gc
import math
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.kafka.mocked import committed, read_cursors

from blueflow.backoff import Backoff
from blueflow.errors import (
    BlueflowError,
    KafkaRefusesError,
    KafkaRightsError,
    KafkaUnavailableError,
    SettingError,
)
from blueflow.events import Position, decode_line
from blueflow.kafka import supervisor
from blueflow.kafka.sink import AT_LEAST_ONCE, EXACTLY_ONCE, KafkaSink
from blueflow.kafka.topics import Topics
from blueflow.metrics import Metrics
from blueflow.records import DATASETS
from blueflow.testing.kafkacodes import ApiKey, ErrorCode
from blueflow.testing.mockcluster import MockCluster
from blueflow.testing.samples import contract_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from blueflow.events import Event
    from blueflow.kafka.connection import Connection
    from blueflow.kafka.topicnames import TopicNames
    from blueflow.kafka.topics import TopicWishes

PATIENCE_S = 20
SOURCE = "relay.example"
EVENTS = contract_events(SOURCE, 60)
HALF = next(n for n, event in enumerate(EVENTS) if event.seq > 30)  # between two seqs

E = ErrorCode
BUSY = (E.COORDINATOR_LOAD_IN_PROGRESS, E.COORDINATOR_NOT_AVAILABLE, E.NOT_COORDINATOR)
FENCING = (E.INVALID_PRODUCER_EPOCH, E.INVALID_TXN_STATE, E.INVALID_PRODUCER_ID_MAPPING)
ODD = (E.PRODUCER_FENCED, E.TRANSACTION_COORDINATOR_FENCED, E.UNKNOWN_PRODUCER_ID)
AT_START = {
    ApiKey.FIND_COORDINATOR: (*BUSY, E.REQUEST_TIMED_OUT, E.DISCONNECT, E.KAFKA_STORAGE_ERROR),
    ApiKey.INIT_PRODUCER_ID: (
        *(*BUSY, *FENCING, *ODD, E.CONCURRENT_TRANSACTIONS, E.REQUEST_TIMED_OUT),
        *(E.NOT_ENOUGH_REPLICAS, E.KAFKA_STORAGE_ERROR, E.DISCONNECT),
    ),
}
IN_A_TRANSACTION = {
    ApiKey.ADD_PARTITIONS_TO_TXN: (
        *(*BUSY, *FENCING, *ODD, E.CONCURRENT_TRANSACTIONS, E.UNKNOWN_TOPIC_OR_PARTITION),
        *(E.REQUEST_TIMED_OUT, E.NOT_ENOUGH_REPLICAS, E.KAFKA_STORAGE_ERROR, E.DISCONNECT),
    ),
    ApiKey.PRODUCE: (
        *(*FENCING, *ODD, E.NOT_LEADER_OR_FOLLOWER, E.UNKNOWN_TOPIC_OR_PARTITION),
        *(E.REQUEST_TIMED_OUT, E.NOT_ENOUGH_REPLICAS, E.NOT_ENOUGH_REPLICAS_AFTER_APPEND),
        *(E.OUT_OF_ORDER_SEQUENCE_NUMBER, E.INVALID_RECORD, E.INVALID_TIMESTAMP),
        *(E.MESSAGE_TOO_LARGE, E.KAFKA_STORAGE_ERROR, E.THROTTLING_QUOTA_EXCEEDED, E.DISCONNECT),
    ),
    ApiKey.END_TXN: (
        *(*BUSY, *FENCING, *ODD, E.CONCURRENT_TRANSACTIONS, E.REQUEST_TIMED_OUT),
        *(E.NOT_ENOUGH_REPLICAS, E.KAFKA_STORAGE_ERROR, E.DISCONNECT),
    ),
}
TRANSACTIONAL = (*AT_START, ApiKey.ADD_PARTITIONS_TO_TXN, ApiKey.END_TXN)
RIGHTS = [
    *((api, E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, "transactional id") for api in TRANSACTIONAL),
    (ApiKey.INIT_PRODUCER_ID, E.CLUSTER_AUTHORIZATION_FAILED, "the cluster"),
    (ApiKey.ADD_PARTITIONS_TO_TXN, E.TOPIC_AUTHORIZATION_FAILED, "topic "),
    (ApiKey.PRODUCE, E.TOPIC_AUTHORIZATION_FAILED, "topic "),
    (ApiKey.PRODUCE, E.CLUSTER_AUTHORIZATION_FAILED, "the cluster"),
    (ApiKey.PRODUCE, E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, "transactional id"),
]


def cases(plan: dict[ApiKey, tuple[ErrorCode, ...]]) -> list[tuple[ApiKey, ErrorCode]]:
    return [(api, code) for api, codes in plan.items() for code in codes]


def name(value: object) -> str:
    return str(getattr(value, "name", None) or getattr(value, "__name__", value))


@pytest.fixture(scope="module")
def running() -> Iterator[MockCluster]:
    with MockCluster() as cluster:  # it takes a second or two to end
        yield cluster


class Trial:
    """Topics of a test's own, which appear when they are asked for, and which faults fired."""

    def __init__(self, cluster: MockCluster) -> None:
        self.cluster = cluster
        self.prefix = f"{secrets.token_hex(4)}."
        self.topics = {f"{self.prefix}{name}": 2 for name in DATASETS}
        self._fired = {api: cluster.fired(api) for api in ApiKey}

    def fail(self, api: ApiKey, code: ErrorCode, times: int = 1) -> None:
        self.cluster.fail(api, [code] * times)

    def fired(self, api: ApiKey) -> int:
        return self.cluster.fired(api) - self._fired[api]

    async def stored(self) -> list[tuple[int, int]]:
        """Return seq and op_index of each event that can be read, in order."""
        values = [value for _, value in await committed(self.cluster.bootstrap, self.topics)]
        events = [decode_line(value, "", 0) for value in values]
        return sorted((event.seq, event.op_index) for event in events)

    async def dead_letters(self) -> list[tuple[bytes, bytes]]:
        return await committed(self.cluster.bootstrap, {f"{self.prefix}dlq": 1})


async def no_check(connection: Connection, names: TopicNames, wishes: TopicWishes) -> Topics:
    sizes = {**dict.fromkeys(names.events, 2), names.cursor: 1, names.dlq: 1}
    return Topics(2, math.inf, "", sizes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mock cluster cannot do is done for it, and nobody waits long."""
    monkeypatch.setattr(supervisor, "ensure_topics", no_check)
    monkeypatch.setattr(supervisor, "read_cursors", read_cursors)
    monkeypatch.setattr(supervisor, "_BACKOFF", Backoff(base_s=0.01, cap_s=0.1))
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.05)


@pytest.fixture
def trial(running: MockCluster, quick: None) -> Iterator[Trial]:
    yield Trial(running)
    for api in ApiKey:
        running.clear(api)


@asynccontextmanager
async def writing(
    trial: Trial,
    caplog: pytest.LogCaptureFixture,
    *,
    delivery: str = EXACTLY_ONCE,
    timeout_s: float = 15.0,
    connect_wait_s: float = 30.0,
) -> AsyncIterator[tuple[KafkaSink, Metrics]]:
    """Give a sink that was not resumed; afterwards it has left neither task nor complaint."""
    metrics = Metrics()
    before = asyncio.all_tasks()
    sink = KafkaSink(
        trial.cluster.bootstrap,
        origin_source=SOURCE,
        pipeline=trial.prefix,
        topic_prefix=trial.prefix,
        delivery=delivery,
        commit_interval_s=0.05,
        transaction_timeout_s=timeout_s,
        connect_wait_s=connect_wait_s,
        metrics=metrics,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield sink, metrics
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await sink.close()
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - before
    assert not left
    gc.collect()
    complaints = [r.getMessage() for r in caplog.records if r.name == "asyncio"]
    assert not complaints


async def write_all(sink: KafkaSink, events: Sequence[Event] = EVENTS) -> None:
    last = events[-1]
    through = Position(SOURCE, last.seq, last.time_us)
    await sink.write(events, through=through)
    await sink.flush()
    assert sink.durable == {SOURCE: through}


def all_of(events: Sequence[Event]) -> list[tuple[int, int]]:
    return [(event.seq, event.op_index) for event in events]


def outcomes(metrics: Metrics) -> dict[str, float | None]:
    name, outcomes = "blueflow_kafka_transactions_total", ("committed", "recovered")
    value = metrics.registry.get_sample_value
    return {outcome: value(name, {"outcome": outcome}) for outcome in outcomes}


@pytest.mark.parametrize(("api", "code"), cases(AT_START), ids=name)
async def test_what_fails_at_the_start_is_tried_again(
    trial: Trial, caplog: pytest.LogCaptureFixture, api: ApiKey, code: ErrorCode
) -> None:
    trial.fail(api, code, 3)
    async with writing(trial, caplog) as (sink, _):
        assert await sink.resume() == {}
        await write_all(sink)
    assert trial.fired(api) == 3
    assert await trial.stored() == all_of(EVENTS)


@pytest.mark.parametrize(("api", "code"), cases(AT_START), ids=name)
async def test_what_fails_while_a_producer_is_rebuilt_is_tried_again(
    trial: Trial, caplog: pytest.LogCaptureFixture, api: ApiKey, code: ErrorCode
) -> None:
    async with writing(trial, caplog) as (sink, _):
        await sink.resume()
        trial.fail(ApiKey.END_TXN, E.KAFKA_STORAGE_ERROR)
        trial.fail(api, code)
        await write_all(sink)
    assert (trial.fired(ApiKey.END_TXN), trial.fired(api)) == (1, 1)
    assert await trial.stored() == all_of(EVENTS)


@pytest.mark.parametrize(("api", "code"), cases(IN_A_TRANSACTION), ids=name)
async def test_what_fails_in_a_transaction_is_repeated_and_nothing_is_twice(
    trial: Trial, caplog: pytest.LogCaptureFixture, api: ApiKey, code: ErrorCode
) -> None:
    async with writing(trial, caplog) as (sink, metrics):
        await sink.resume()
        for events, times in ((EVENTS[:HALF], 1), (EVENTS[HALF:], 4)):
            fired = trial.fired(api)
            trial.fail(api, code, times)
            await write_all(sink, events)
            assert trial.fired(api) == fired + times
        counted = outcomes(metrics)
    assert await trial.stored() == all_of(EVENTS)
    assert (counted["committed"], counted["recovered"]) == (2, 0)
    assert await trial.dead_letters() == []


@pytest.mark.parametrize("code", IN_A_TRANSACTION[ApiKey.PRODUCE], ids=name)
async def test_without_transactions_nothing_is_lost(
    trial: Trial, caplog: pytest.LogCaptureFixture, code: ErrorCode
) -> None:
    async with writing(trial, caplog, delivery=AT_LEAST_ONCE) as (sink, _):
        await sink.resume()
        trial.fail(ApiKey.PRODUCE, code)
        await write_all(sink)
    assert trial.fired(ApiKey.PRODUCE) == 1


@pytest.mark.parametrize(("api", "code", "resource"), RIGHTS, ids=name)
async def test_a_missing_right_ends_the_sink_and_is_named(
    trial: Trial, caplog: pytest.LogCaptureFixture, api: ApiKey, code: ErrorCode, resource: str
) -> None:
    async with writing(trial, caplog) as (sink, _):
        if api not in AT_START:
            await sink.resume()
        trial.fail(api, code)
        with pytest.raises(KafkaRightsError, match=resource):
            await (sink.resume() if api in AT_START else write_all(sink))
        assert sink.durable == {}
    assert trial.fired(api) == 1
    assert await trial.stored() == []


@pytest.mark.parametrize(
    "code", [E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, E.INVALID_TRANSACTION_TIMEOUT]
)
async def test_what_an_operator_has_to_mend_also_ends_a_sink_that_is_rebuilt(
    trial: Trial, caplog: pytest.LogCaptureFixture, code: ErrorCode
) -> None:
    async with writing(trial, caplog) as (sink, _):
        await sink.resume()
        trial.fail(ApiKey.END_TXN, E.KAFKA_STORAGE_ERROR)
        trial.fail(ApiKey.INIT_PRODUCER_ID, code)
        for _ in range(2):
            with pytest.raises((KafkaRightsError, SettingError)):
                await write_all(sink)
    assert trial.fired(ApiKey.INIT_PRODUCER_ID) == 1


async def test_a_transaction_timeout_that_the_brokers_refuse_is_a_wrong_setting(
    trial: Trial, caplog: pytest.LogCaptureFixture
) -> None:
    trial.fail(ApiKey.INIT_PRODUCER_ID, E.INVALID_TRANSACTION_TIMEOUT)
    async with writing(trial, caplog) as (sink, _):
        with pytest.raises(
            SettingError, match=r"transaction.timeout.*transaction\.max\.timeout\.ms"
        ):
            await sink.resume()


async def test_a_claim_that_fails_does_not_hide_that_the_transaction_took_place(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with MockCluster() as cluster:
        trial = Trial(cluster)
        async with writing(trial, caplog, timeout_s=0.5) as (sink, metrics):
            await sink.resume()
            # The transaction is committed and the answer late, and so is the claim of the producer
            # that comes next: now its record is the newest.
            cluster.fail_after(ApiKey.END_TXN, [(E.NONE, 800)] * 2)
            await write_all(sink)
            counted = outcomes(metrics)
        assert trial.fired(ApiKey.END_TXN) == 2
        assert await trial.stored() == all_of(EVENTS)
    assert (counted["committed"], counted["recovered"]) == (0, 1)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (E.CONCURRENT_TRANSACTIONS, KafkaUnavailableError),
        (E.COORDINATOR_LOAD_IN_PROGRESS, KafkaUnavailableError),
        (E.INVALID_PRODUCER_EPOCH, KafkaRefusesError),
        (E.INVALID_RECORD, KafkaRefusesError),
    ],
    ids=name,
)
async def test_a_first_connection_that_never_succeeds_ends_with_the_reason(
    trial: Trial, caplog: pytest.LogCaptureFixture, code: ErrorCode, expected: type[BlueflowError]
) -> None:
    trial.fail(ApiKey.INIT_PRODUCER_ID, code, 1_000)
    async with writing(trial, caplog, timeout_s=0.3, connect_wait_s=0.5) as (sink, _):
        with pytest.raises(expected):
            await sink.resume()
    assert trial.fired(ApiKey.INIT_PRODUCER_ID) > 1
