"""What the Kafka campaigns share: runs of `blueflow produce`, and readers that follow them."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec
import pytest
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec
from tests.groups import SERVERS
from tests.kafka.readers import committed, topics_of

from blueflow.testing.ledger import Ledger
from blueflow.testing.relay import RelayProcess, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from confluent_kafka import Message

    from blueflow.testing.ledger import Entry

SOURCE = "sim"
PARTITIONS = 3
TOPICS = 8  # six of events, the cursors, the dead letters
# What every test of a file of campaigns is.
CAMPAIGN = [
    pytest.mark.faults,
    pytest.mark.xdist_group(SERVERS),
    pytest.mark.needs("java"),
    pytest.mark.timeout(600),
]
REPEATED = (
    '"a transaction failed and is repeated"'  # what a run says when it builds a producer anew
)
# Of a broker: how often it looks for transactions past their timeout; 10 s by default.
CLEANUP = "transaction.abort.timed.out.transaction.cleanup.interval.ms"
_CATCH_UP_S = 30.0
_COMMITTED_S = 0.3  # how long the broker may need for a commit that was sent
_BY_COLLECTION = {  # not the product's own table
    "app.bsky.feed.post": "posts",
    "app.bsky.feed.like": "likes",
    "app.bsky.feed.repost": "reposts",
    "app.bsky.graph.follow": "follows",
}


def relay_for(ledger: Path, seed: int, *, rate: float = 500) -> RelayProcess:
    """Return a relay that goes on for ever, and keeps the last minute and a half for cursors."""
    kept = int(rate * 90)
    return spawn(rate=rate, retention=kept, ledger=ledger, seed=seed, records=300, accounts=2000)


class Pipeline(NamedTuple):
    """A relay, the brokers, and the topics between them."""

    relay: str
    bootstrap: str
    prefix: str

    @classmethod
    def new(cls, relay: str, bootstrap: str) -> Pipeline:
        return cls(relay, bootstrap, f"campaign-{secrets.token_hex(4)}.")

    def command(self, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "blueflow.produce", "--source", self.relay),
            *("--source-name", SOURCE, "--sink", f"kafka://{self.bootstrap}"),
            *("--topic-prefix", self.prefix, "--partitions", str(PARTITIONS)),
            *("--kafka-retention", "forever", "--prometheus-port", "0", "--log-format", "json"),
            *more,
        ]

    @property
    def cursor(self) -> str:
        return f"{self.prefix}cursor"


class Run:
    """One process, which ends with `async with`: by kill -9, whatever state it is in."""

    def __init__(
        self, command: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command, self._log, self._environment = command, log, environment
        self._process: asyncio.subprocess.Process | None = None
        self._told = 0

    async def __aenter__(self) -> Self:
        with self._log.open("ab") as stderr:
            self._told = stderr.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stderr=stderr, env=self._environment
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.kill()

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        assert self.code is None, self.said()[-3000:]
        self.process.send_signal(number)

    async def kill(self) -> int:
        if self.code is None:
            self.process.kill()
        return await self.process.wait()

    async def stop(self) -> None:
        """End it as an operator would."""
        self.send(signal.SIGTERM)
        assert await self.ended(20) == 0, self.said()[-3000:]

    async def ended(self, within_s: float) -> int:
        with anyio.move_on_after(within_s):
            return await self.process.wait()
        raise AssertionError(f"still running after {within_s} s: {self.said()[-3000:]}")

    def said(self) -> str:
        """Return its log."""
        with self._log.open("rb") as log:
            log.seek(self._told)
            return log.read().decode(errors="replace")


class Follower:
    """A reader by librdkafka that remembers how far it came. It may begin before its topics exist.

    Args:
        pipeline: whose topics to read.
        committed: as read_committed; else as read_uncommitted.
    """

    def __init__(self, pipeline: Pipeline, *, committed: bool = True) -> None:
        self._pipeline = pipeline
        level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
        self._level = level
        self._admin = self._connect()
        self._consumer = Consumer(
            {
                "bootstrap.servers": pipeline.bootstrap,
                "group.id": "follower",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": level.name.lower(),
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 50,
                "log_level": 0,  # brokers go away here on purpose
            }
        )
        self._reached: dict[tuple[str, int], int] = {}
        self.records = 0  # of all topics
        self.newest_seq = 0  # of the events
        self.cursor: dict[str, Any] = {}  # value of the newest cursor record

    @property
    def seq(self) -> int:
        """The position that is durable; 0 is none."""
        return self.cursor.get("seq") or 0

    def catch_up(self) -> Self:
        """Read up to where readers of this isolation level can read at this moment, no further.

        A reader that waits for the end of a partition never gets there while it is written to.
        """
        if not self._reached and not self._begin():
            return self
        ends = self._ends(self._level)
        deadline_s = time.monotonic() + _CATCH_UP_S
        while left := [one for one, end in ends.items() if self._reached[one] < end]:
            assert time.monotonic() < deadline_s, f"not read in time: {left}"
            for message in self._consumer.consume(500, 0.05):
                self._take(message)
        return self

    def held_back(self) -> set[tuple[str, int]]:
        """Return the partitions in which a transaction is open: read_committed readers wait."""
        if not self._reached and not self._begin():
            return set()
        stable = self._ends(IsolationLevel.READ_COMMITTED)
        ends = self._ends(IsolationLevel.READ_UNCOMMITTED)
        return {one for one, end in ends.items() if stable[one] < end}

    def _begin(self) -> bool:
        topics = topics_of(self._pipeline.bootstrap, self._pipeline.prefix)
        if len(topics) < TOPICS:
            return False
        self._reached = {(name, number): 0 for name, n in topics.items() for number in range(n)}
        self._consumer.assign([TopicPartition(*one, 0) for one in self._reached])
        return True

    def _connect(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self._pipeline.bootstrap, "log_level": 0})

    def _ends(self, level: IsolationLevel) -> dict[tuple[str, int], int]:
        """Return where each partition ends for readers of an isolation level."""
        asked = {TopicPartition(*one): OffsetSpec.latest() for one in self._reached}
        deadline_s = time.monotonic() + _CATCH_UP_S
        while True:
            answers = self._admin.list_offsets(asked, isolation_level=level, request_timeout=5)
            try:
                return {(one.topic, one.partition): a.result().offset for one, a in answers.items()}
            except KafkaException:  # right after a topic was made, or while the broker is away
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(0.1)
            self._admin = self._connect()  # the old one keeps the epoch of a leader that restarted

    def _take(self, message: Message) -> None:
        topic, number, offset = message.topic(), message.partition(), message.offset()
        error, value = message.error(), message.value()
        assert topic is not None
        assert number is not None
        assert offset is not None
        if error is not None:
            if error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            self._reached[topic, number] = offset
            return
        assert value is not None
        self._reached[topic, number] = offset + 1
        self.records += 1
        if topic == self._pipeline.cursor:
            self.cursor = msgspec.json.decode(value)
        else:
            self.newest_seq = max(self.newest_seq, msgspec.json.decode(value)["seq"])

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def stays_open(follower: Follower, *, but: str = "") -> bool:
    """Whether a transaction is open, in another topic than `but`, that is not being committed."""
    for wait_s in (0.0, _COMMITTED_S):
        time.sleep(wait_s)
        if all(topic == but for topic, _ in follower.held_back()):
            return False
    return True


def aborted_records(pipeline: Pipeline) -> int:
    """Return how many records a read_uncommitted reader sees and a read_committed one does not."""
    counts = []
    for only_committed in (True, False):
        with Follower(pipeline, committed=only_committed) as follower:
            counts.append(follower.catch_up().records)
    return counts[1] - counts[0]


def judge(pipeline: Pipeline, ledger: Path, through: int) -> int:
    """Compare what a read_committed reader sees with what the relay issued; return how many events.

    Topic by topic: the order of an account is promised within one.

    Args:
        pipeline: whose topics to read.
        ledger: of the relay.
        through: the durable position; the relay may be ahead of it.
    """
    issued, delivered = Ledger.load(ledger), 0
    for topic, partitions in topics_of(pipeline.bootstrap, pipeline.prefix).items():
        dataset = topic.removeprefix(pipeline.prefix)
        values = (m.value() for m in committed(pipeline.bootstrap, {topic: partitions}))
        if dataset == "dlq":
            assert not list(values)
        elif dataset != "cursor":
            verdict = issued.compare(values, wanted=partial(_belongs_to, dataset, through))
            assert verdict.ok, f"{topic}: {verdict}"
            delivered += verdict.delivered
    assert delivered == sum(entry.seq <= through for entry in issued) > 0
    return delivered


def _belongs_to(dataset: str, through: int, entry: Entry) -> bool:
    if entry.seq > through:
        return False
    if entry.kind != "commit":
        return dataset == "accounts"
    return _BY_COLLECTION.get(entry.collection or "", "other") == dataset


async def until(
    what: Callable[[], bool], *, within_s: float, run: Run | None = None, every_s: float = 0.1
) -> float:
    """Wait until something is so, asked in a thread; return how long it took."""
    began_s = time.monotonic()
    while not await anyio.to_thread.run_sync(what):
        said = run.said()[-3000:] if run else ""
        assert run is None or run.code is None, f"exit code {run.code}: {said}"
        took_s = time.monotonic() - began_s
        assert took_s < within_s, f"not within {within_s} s; {said}"
        await anyio.sleep(every_s)
    return time.monotonic() - began_s


async def until_further(follower: Follower, run: Run, *, within_s: float = 40) -> float:
    """Wait until more is durable than now."""
    before = (await anyio.to_thread.run_sync(follower.catch_up)).seq
    return await until(lambda: follower.catch_up().seq > before, within_s=within_s, run=run)


async def stop_inside_a_transaction(
    run: Run, follower: Follower, *, but: str = "", within_s: float = 30
) -> None:
    """Send SIGSTOP to a process that has a transaction open, in another topic than `but`."""
    with anyio.fail_after(within_s):
        while True:
            await until(lambda: bool(follower.held_back()), within_s=within_s, run=run, every_s=0)
            run.send(signal.SIGSTOP)
            if await anyio.to_thread.run_sync(lambda: stays_open(follower, but=but)):
                return
            run.send(signal.SIGCONT)  # it had just been committed
            await anyio.sleep(0.05)


async def end(run: Run, follower: Follower, *, within_s: float = 30) -> int:
    """Stop a run as an operator would, and return the position that it leaves.

    Kafka says that a transaction is committed before it shows in every partition.
    """
    await run.stop()
    await until(lambda: not follower.held_back(), within_s=within_s)
    return (await anyio.to_thread.run_sync(follower.catch_up)).seq
