"""What a network does to the sink of a real broker; another client's reader judges."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from tests.kafka.readers import cursors, stored_events

from blueflow.events import Position
from blueflow.kafka import connection as connection_module
from blueflow.kafka.connection import Connection
from blueflow.kafka.sink import CLOSE_WAIT_S, KafkaSink
from blueflow.kafka.topics import TopicWishes
from blueflow.metrics import REBUILD_REASONS, Metrics
from blueflow.testing.kafkacodes import ApiKey
from blueflow.testing.kafkaproxy import KafkaProxy
from blueflow.testing.samples import contract_events
from blueflow.testing.services.kafka import USERS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from typing import Literal

    from tests.conftest import GuardedBroker

    from blueflow.events import Event

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

PATIENCE_S = 60
SHORT_S = 1.5  # a transaction timeout below the time that aiokafka waits for an answer
LONG_S = 15.0
SOURCE = "relay.example"
EVENTS = contract_events(SOURCE, 400)
_TRANSACTIONS = "blueflow_kafka_transactions_total"
_REBUILDS = "blueflow_kafka_producer_rebuilds_total"
PARTS = [  # between two seqs each
    [event for event in EVENTS if first < event.seq <= first + 100] for first in range(0, 400, 100)
]


class Trial:
    """A sink behind a proxy, with topics of its own."""

    def __init__(self, guarded: GuardedBroker, proxy: KafkaProxy, timeout_s: float) -> None:
        self.prefix, self.proxy, self.metrics = f"{secrets.token_hex(4)}.", proxy, Metrics()
        self.bootstrap = guarded.broker.bootstrap
        self.sink = KafkaSink(
            Connection(
                proxy.bootstrap,
                security_protocol="SASL_PLAINTEXT",
                username="admin",
                password=USERS["admin"],
            ),
            origin_source=SOURCE,
            simulated=True,
            pipeline=self.prefix,
            topic_prefix=self.prefix,
            route="single",
            topics=TopicWishes(partitions=3, retention_s=float("inf")),
            commit_interval_s=0.05,
            transaction_timeout_s=timeout_s,
            metrics=self.metrics,
        )

    async def write(self, events: Sequence[Event]) -> None:
        through = Position(SOURCE, events[-1].seq, events[-1].time_us)
        await self.sink.write(events, through=through)
        await self.sink.flush()
        assert self.sink.durable == {SOURCE: through}

    def outcomes(self) -> tuple[int, int, int]:
        """Return how many transactions were committed and recovered, and producers rebuilt."""
        value = self.metrics.registry.get_sample_value
        committed, recovered = (
            int(value(_TRANSACTIONS, {"outcome": outcome}) or 0)
            for outcome in ("committed", "recovered")
        )
        rebuilt = (value(_REBUILDS, {"reason": reason}) or 0 for reason in REBUILD_REASONS)
        return committed, recovered, int(sum(rebuilt))

    async def judge(self) -> None:
        """Each event is there once, those of an account in order, and the cursor behind them."""
        stored = await anyio.to_thread.run_sync(stored_events, self.bootstrap, self.prefix)
        assert by_account((e["did"], e["seq"], e["op_index"]) for e in stored) == by_account(
            (event.did, event.seq, event.op_index) for event in EVENTS
        )
        records = await anyio.to_thread.run_sync(cursors, self.bootstrap, self.prefix)
        assert records[-1][1]["seq"] == EVENTS[-1].seq


def by_account(events: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for did, seq, op_index in events:
        found.setdefault(did, []).append((seq, op_index))
    return found


@asynccontextmanager
async def in_trial(
    guarded: GuardedBroker, caplog: pytest.LogCaptureFixture, timeout_s: float
) -> AsyncIterator[Trial]:
    """Give a sink that was not resumed; it ends without leaving anything."""
    before = asyncio.all_tasks()
    async with KafkaProxy(guarded.broker.sasl_bootstrap, guarded.proxy_port) as proxy:
        trial = Trial(guarded, proxy, timeout_s)
        try:
            with anyio.fail_after(PATIENCE_S):
                yield trial
        finally:
            await trial.sink.close()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert not [record for record in caplog.records if record.name == "asyncio"]


E = ApiKey
SURVIVED_BY_AIOKAFKA: dict[str, Callable[[KafkaProxy], None]] = {
    "commit_reply_lost": lambda p: p.lose_reply(E.END_TXN),
    "commit_reply_hangs": lambda p: p.lose_reply(E.END_TXN, then="hang"),
    "commit_request_lost": lambda p: p.lose_request(E.END_TXN),
    "records_reply_lost": lambda p: p.lose_reply(E.PRODUCE, times=2),
    "records_reply_hangs": lambda p: p.lose_reply(E.PRODUCE, then="hang"),
    "records_arrive_after_their_retry": lambda p: p.delay(E.PRODUCE, 2.0, of="request"),
    "partitions_reply_lost": lambda p: p.lose_reply(E.ADD_PARTITIONS_TO_TXN),
}
REBUILT: dict[str, tuple[Callable[[KafkaProxy], None], int]] = {
    "commit_reply_hangs": (lambda p: p.lose_reply(E.END_TXN, then="hang"), 1),
    "replies_of_commit_and_claim_hang": (
        lambda p: p.lose_reply(E.END_TXN, times=2, then="hang"),
        1,
    ),
    "commit_reply_late": (lambda p: p.delay(E.END_TXN, 2 * SHORT_S), 1),
    "commit_request_late": (lambda p: p.delay(E.END_TXN, 2 * SHORT_S, of="request"), 0),
    "records_late": (lambda p: p.delay(E.PRODUCE, 2 * SHORT_S, of="request"), 0),
}


@pytest.mark.parametrize("plan", SURVIVED_BY_AIOKAFKA.values(), ids=SURVIVED_BY_AIOKAFKA)
async def test_what_the_client_repeats_by_itself_costs_no_producer(
    guarded: GuardedBroker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    plan: Callable[[KafkaProxy], None],
) -> None:
    monkeypatch.setattr(connection_module, "REQUEST_TIMEOUT_S", 1.0)
    async with in_trial(guarded, caplog, LONG_S) as trial:
        await trial.sink.resume()
        await trial.write(PARTS[0])
        plan(trial.proxy)
        for part in PARTS[1:]:
            await trial.write(part)
        assert sum(trial.proxy.fired.values()) >= 1
        assert trial.outcomes() == (len(PARTS), 0, 0)
        if trial.proxy.fired["delay"]:
            await asyncio.sleep(2.5)  # until it arrives
        await trial.judge()


@pytest.mark.parametrize(("plan", "recovered"), REBUILT.values(), ids=REBUILT)
async def test_a_producer_that_does_not_know_is_rebuilt_and_asks(
    guarded: GuardedBroker,
    caplog: pytest.LogCaptureFixture,
    plan: Callable[[KafkaProxy], None],
    recovered: int,
) -> None:
    async with in_trial(guarded, caplog, SHORT_S) as trial:
        await trial.sink.resume()
        await trial.write(PARTS[0])
        plan(trial.proxy)
        began_s = time.monotonic()
        for part in PARTS[1:]:
            await trial.write(part)
        await asyncio.sleep(began_s + 2 * SHORT_S + 0.5 - time.monotonic())  # what is late, arrives
        fired = sum(trial.proxy.fired.values())
        assert trial.outcomes() == (len(PARTS) - recovered, recovered, fired)
        assert fired >= 1
        await trial.judge()


@pytest.mark.parametrize("then", ["close", "hang"])
async def test_a_producer_id_whose_answer_is_lost_is_asked_for_again(
    guarded: GuardedBroker, caplog: pytest.LogCaptureFixture, then: Literal["close", "hang"]
) -> None:
    async with in_trial(guarded, caplog, SHORT_S) as trial:
        trial.proxy.lose_reply(ApiKey.INIT_PRODUCER_ID, times=2, then=then)
        await trial.sink.resume()
        for part in PARTS:
            await trial.write(part)
        assert trial.proxy.fired["lose_reply"] == 2
        await trial.judge()


async def test_a_network_that_is_silent_for_longer_than_every_timeout_is_waited_for(
    guarded: GuardedBroker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "REQUEST_TIMEOUT_S", 1.0)
    async with in_trial(guarded, caplog, SHORT_S) as trial:
        await trial.sink.resume()
        await trial.write(PARTS[0])
        trial.proxy.block()
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(trial.write([*PARTS[1], *PARTS[2]]))
            await asyncio.sleep(4 * SHORT_S)
            assert not writing.done()
            trial.proxy.unblock()
        await trial.write(PARTS[3])
        assert trial.proxy.fired["block"]
        assert trial.outcomes()[2] >= 2
        await trial.judge()


async def test_a_stop_while_the_network_is_silent_does_not_wait_for_it(
    guarded: GuardedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with in_trial(guarded, caplog, SHORT_S) as trial:
        await trial.sink.resume()
        await trial.write(PARTS[0])
        durable = trial.sink.durable
        trial.proxy.block()
        last = PARTS[1][-1]
        await trial.sink.write(PARTS[1], through=Position(SOURCE, last.seq, last.time_us))
        await asyncio.sleep(0.5)
        began_s = time.monotonic()
        await trial.sink.close()
        assert time.monotonic() - began_s < CLOSE_WAIT_S + 1
        assert trial.sink.durable == durable
        assert trial.proxy.fired["block"]
        trial.proxy.unblock()
        run = anyio.to_thread.run_sync
        stored = await run(stored_events, trial.bootstrap, trial.prefix)
    assert sorted(event["seq"] for event in stored) == [event.seq for event in PARTS[0]]


async def test_connections_that_are_reset_again_and_again_lose_and_double_nothing(
    guarded: GuardedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with in_trial(guarded, caplog, LONG_S) as trial:
        await trial.sink.resume()
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(write_seq_by_seq(trial))
            for pause_s in (0.05, 0.1, 0.2, 0.4) * 4:
                await asyncio.sleep(pause_s)
                trial.proxy.cut()
            assert not writing.done()
        assert trial.proxy.fired["cut"] > 10
        await trial.judge()


async def write_seq_by_seq(trial: Trial) -> None:
    for seq in range(1, EVENTS[-1].seq + 1):
        events = [event for event in EVENTS if event.seq == seq]
        await trial.sink.write(events, through=Position(SOURCE, seq, events[0].time_us))
        await asyncio.sleep(0.01)
    await trial.sink.flush()
