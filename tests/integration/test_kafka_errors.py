"""What a real broker refuses: events, users, topics. Told in one line, or kept as dead letters."""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import sys
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from tests.kafka.readers import cursors, dead_letters, stored_events, topics_of

from blueflow.errors import KafkaRefusesError
from blueflow.events import Position, RepoOp
from blueflow.kafka.connection import Connection
from blueflow.kafka.sink import KafkaSink
from blueflow.kafka.topics import RECORD_BYTES_MAX, TopicWishes
from blueflow.metrics import Metrics
from blueflow.testing.samples import T0_US, contract_events
from blueflow.testing.services.certificates import make_certificates
from blueflow.testing.services.child import free_ports
from blueflow.testing.services.kafka import USERS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from tests.conftest import GuardedBroker

    from blueflow.events import Event
    from blueflow.testing.services.kafka import KafkaBroker

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 30  # less than three transactions take that wait for their timeout
SOURCE = "relay.example"
FRAMES = Path(__file__).parents[1] / "data" / "firehose" / "frames.bin"
TEN_YEARS_MS = 10 * 365 * 86_400_000
COLLECTION = "app.bsky.feed.post"


def create(bootstrap: str, topics: dict[str, tuple[int, dict[str, str]]]) -> None:
    """Create topics: name to partitions and settings."""
    new = [NewTopic(name, count, config=config) for name, (count, config) in topics.items()]
    admin = AdminClient({"bootstrap.servers": bootstrap})  # alive until it is done
    for future in admin.create_topics(new).values():
        future.result(PATIENCE_S)


def events_topic(**config: str) -> dict[str, str]:
    """Return the settings of a topic for events that keeps them for ever."""
    fixed = {"retention.ms": "-1", "max.message.bytes": str(RECORD_BYTES_MAX)}
    return fixed | {name.replace("_", "."): value for name, value in config.items()}


def posts(count: int, *, accounts: int = 40) -> list[Event]:
    return [
        RepoOp(
            *(SOURCE, seq, 0, f"did:plc:account{seq % accounts}", T0_US + seq, "3lrev", "create"),
            *(COLLECTION, f"r{seq}", "bafyrei", {"$type": COLLECTION, "text": f"number {seq}"}),
        )
        for seq in range(1, count + 1)
    ]


def poisoned(events: Sequence[Event], seqs: Iterable[int]) -> list[Event]:
    """Return the events with those of some seqs so old that the topics refuse them."""
    return [
        msgspec.structs.replace(event, time_us=1) if event.seq in set(seqs) else event
        for event in events
    ]


class Trial:
    """A sink over topics that refuse records older than ten years."""

    def __init__(self, bootstrap: str, *, partitions: int = 3) -> None:
        self.bootstrap, self.prefix, self.metrics = bootstrap, f"{secrets.token_hex(4)}.", Metrics()
        picky = events_topic(message_timestamp_before_max_ms=str(TEN_YEARS_MS))
        create(bootstrap, {f"{self.prefix}events": (partitions, picky)})
        self.sink = KafkaSink(
            bootstrap,
            origin_source=SOURCE,
            topic_prefix=self.prefix,
            pipeline=self.prefix,
            route="single",
            topics=TopicWishes(retention_s=math.inf),
            metrics=self.metrics,
        )

    async def write(self, events: Sequence[Event]) -> Position:
        through = Position(SOURCE, events[-1].seq, T0_US + events[-1].seq)
        await self.sink.write(events, through=through)
        await self.sink.flush()
        return through

    async def judge(self, events: Sequence[Event], dead: Iterable[int]) -> list[dict[str, Any]]:
        """Check that all but the dead are there once and in order; return the dead letters."""
        run = anyio.to_thread.run_sync
        expected, found = defaultdict(list), defaultdict(list)
        for event in events:
            if event.seq not in set(dead):
                expected[event.did].append(event.seq)
        for stored in await run(stored_events, self.bootstrap, self.prefix):
            found[stored["did"]].append(stored["seq"])
        assert found == expected
        letters: list[dict[str, Any]] = await run(dead_letters, self.bootstrap, self.prefix)
        assert sorted(letter["seq"] for letter in letters) == sorted(dead)
        newest = (await run(cursors, self.bootstrap, self.prefix))[-1][1]
        assert newest["seq"] == events[-1].seq
        return letters

    def dead(self, reason: str) -> float | None:
        name = "blueflow_kafka_dead_letters_total"
        return self.metrics.registry.get_sample_value(name, {"reason": reason})


@asynccontextmanager
async def in_trial(guarded: GuardedBroker, *, partitions: int = 3) -> AsyncIterator[Trial]:
    trial = Trial(guarded.broker.bootstrap, partitions=partitions)
    before = asyncio.all_tasks()
    try:
        with anyio.fail_after(PATIENCE_S):
            await trial.sink.resume()
            yield trial
    finally:
        await trial.sink.close()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("dead", [[1_717], [1, 2, 500, 501, 999, 2_000]], ids=["one", "several"])
async def test_an_event_that_is_refused_becomes_a_dead_letter_and_all_others_arrive(
    guarded: GuardedBroker, dead: list[int]
) -> None:
    async with in_trial(guarded) as trial:
        events = poisoned(posts(2_000), dead)
        through = await trial.write(events)
        assert trial.sink.durable == {SOURCE: through}
        assert trial.dead("refused") == len(dead)
        after = [msgspec.structs.replace(e, seq=e.seq + 2_000) for e in posts(10)]
        await trial.write(after)
        letters = await trial.judge([*events, *after], dead)
    letter = letters[0]
    did = f"did:plc:account{letter['seq'] % 40}"
    assert letter["uri"] == f"at://{did}/{COLLECTION}/r{letter['seq']}"
    assert (letter["reason"], letter["source"], letter["op_index"]) == ("refused", SOURCE, 0)
    assert "timestamp" in letter["detail"]
    assert letter["topic"] == f"{trial.prefix}events"
    assert letter["event"]["commit"]["record"]["text"] == f"number {letter['seq']}"


async def test_when_more_than_a_hundred_are_refused_it_is_not_the_events(
    guarded: GuardedBroker,
) -> None:
    async with in_trial(guarded, partitions=12) as trial:
        through = await trial.write(posts(500))
        later = [msgspec.structs.replace(e, seq=e.seq + 500) for e in posts(200)]
        with pytest.raises(KafkaRefusesError, match=rf"BF-227.*{trial.prefix}events.*timestamp"):
            await trial.write(poisoned(later, range(501, 651)))
        assert trial.sink.durable == {SOURCE: through}
        await trial.judge(posts(500), [])


async def test_an_event_that_no_topic_takes_becomes_a_pointer(guarded: GuardedBroker) -> None:
    async with in_trial(guarded) as trial:
        events = posts(30)
        too_large = {"$type": COLLECTION, "text": "x" * (RECORD_BYTES_MAX + 1)}
        just_fits = {"$type": COLLECTION, "text": "\u1234" * (RECORD_BYTES_MAX // 3 - 300)}
        events[9] = msgspec.structs.replace(events[9], record=too_large)
        events[19] = msgspec.structs.replace(events[19], record=just_fits)
        await trial.write(events)
        assert (trial.dead("too_large"), trial.dead("refused")) == (1, 0)
        failed = {"outcome": "failed"}
        name = "blueflow_kafka_transactions_total"
        assert trial.metrics.registry.get_sample_value(name, failed) == 0
        (letter,) = await trial.judge(events, [10])
    assert (letter["reason"], letter["event"]) == ("too_large", None)
    assert letter["uri"] == f"at://did:plc:account10/{COLLECTION}/r10"
    assert letter["bytes"] > RECORD_BYTES_MAX


class Setting:
    """Topics of a test's own on the broker with users, and the command that is to write to them."""

    def __init__(self, broker: KafkaBroker) -> None:
        self.broker, self.bootstrap = broker, broker.bootstrap
        self.prefix = f"{secrets.token_hex(4)}."

    def create(self, **topics: tuple[int, dict[str, str]]) -> None:
        """Create topics as they have to be, but for what is given: partitions and settings."""
        usual = {
            "events": (2, events_topic()),
            "cursor": (1, {"cleanup.policy": "compact"}),
            "dlq": (1, events_topic()),
        }
        create(
            self.bootstrap, {self.prefix + name: made for name, made in (usual | topics).items()}
        )

    async def seed(self, *, simulated: bool = True) -> None:
        """Let a pipeline have written."""
        sink = KafkaSink(
            self.bootstrap,
            origin_source="sim",
            simulated=simulated,
            topic_prefix=self.prefix,
            route="single",
        )
        await sink.resume()
        await sink.write([], through=Position("sim", 7, 0))
        await sink.flush()
        await sink.close()

    def grant(self, *rights: tuple[ResourceType, str, AclOperation]) -> None:
        """Grant rights to the user `producer`, on names behind the prefix."""
        bindings = [
            acl(kind, name.replace("~", self.prefix), right) for kind, name, right in rights
        ]
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        for future in admin.create_acls(bindings).values():
            future.result(PATIENCE_S)

    async def positions(self) -> dict[str, int | None]:
        """Return the seq of each pipeline and source."""
        if f"{self.prefix}cursor" not in topics_of(self.bootstrap, self.prefix):
            return {}
        records = await anyio.to_thread.run_sync(cursors, self.bootstrap, self.prefix)
        return {key: cursor["seq"] for key, cursor in records if cursor["seq"]}

    async def refused(
        self, code: str, exit_code: int, *said: str, flags: Sequence[str] = ()
    ) -> None:
        """Run the command, which says why it cannot, in one line, and does nothing."""
        before = await self.positions()
        defaults = {
            "--sink": f"kafka://{self.bootstrap}",
            "--source": "sim",
            "--topic-prefix": self.prefix,
            "--route": "single",
            "--connect-wait": "2s",
            "--prometheus-port": "0",
            "--log-format": "json",
        }
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        command = [sys.executable, "-m", "blueflow.produce"]
        command += [part for pair in (defaults | given).items() for part in pair]
        env = {**os.environ, "BLUEFLOW_KAFKA_PASSWORD": self.password}
        with anyio.fail_after(PATIENCE_S):
            done = await anyio.run_process(command, check=False, env=env)
        stderr = done.stderr.decode()
        (line,) = (one for one in stderr.splitlines() if not one.startswith("{"))
        logged = [json.loads(one) for one in stderr.splitlines() if one.startswith("{")]
        assert done.returncode == exit_code, stderr
        assert line.startswith(f"{code}: ")
        for part in said:
            assert part.replace("~", self.prefix) in line
        assert not [one for one in logged if one["level"].lower() == "error"]
        for never in ("Traceback", "aiokafka", self.password):
            assert never not in stderr
        assert await self.positions() == before

    password = "not-a-secret-of-anybody"  # noqa: S105 - made up


def acl(kind: ResourceType, name: str, right: AclOperation) -> AclBinding:
    literal, allow = ResourcePatternType.LITERAL, AclPermissionType.ALLOW
    return AclBinding(kind, name, literal, "User:producer", "*", right, allow)


TOPIC, ID = ResourceType.TOPIC, ResourceType.TRANSACTIONAL_ID
WRITE, READ, DESCRIBE = AclOperation.WRITE, AclOperation.READ, AclOperation.DESCRIBE
# All that writing to existing topics takes; each of them implies the right to describe.
NEEDED = {
    "transactional id": (ID, "blueflow.~|default", WRITE),
    "events": (TOPIC, "~events", WRITE),
    "dlq": (TOPIC, "~dlq", WRITE),
    "cursor": (TOPIC, "~cursor", WRITE),
    "position": (TOPIC, "~cursor", READ),
}
ALTER = "kafka-configs.sh --alter --entity-type topics --entity-name"


@pytest.fixture
def setting(guarded: GuardedBroker) -> Iterator[Setting]:
    yield Setting(guarded.broker)
    whatever: Any = None
    everything = AclBindingFilter(
        *(ResourceType.ANY, whatever, ResourcePatternType.ANY, "User:producer", whatever),
        *(AclOperation.ANY, AclPermissionType.ANY),
    )
    admin = AdminClient({"bootstrap.servers": guarded.broker.bootstrap})
    for future in admin.delete_acls([everything]).values():
        future.result(PATIENCE_S)


def as_user(broker: KafkaBroker, name: str, ca_file: Path | None = None) -> tuple[str, ...]:
    """Return the flags for a user over TLS."""
    return (
        *("--sink", f"kafka://{broker.tls_bootstrap}", "--kafka-username", name),
        *("--kafka-security-protocol", "sasl_ssl"),
        *("--kafka-ca-file", str(ca_file or broker.ca_file)),
    )


async def test_no_broker(setting: Setting) -> None:
    (port,) = free_ports(1)
    nowhere = ("--sink", f"kafka://127.0.0.1:{port}")
    await setting.refused("BF-220", 69, f"127.0.0.1:{port}", "Check the address", flags=nowhere)


async def test_a_wrong_password(setting: Setting) -> None:
    flags = as_user(setting.broker, "producer")
    await setting.refused("BF-221", 78, "BLUEFLOW_KAFKA_PASSWORD", flags=flags)


async def test_a_certificate_that_is_not_trusted(setting: Setting, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    setting.password = USERS["producer"]
    flags = as_user(setting.broker, "producer", tmp_path / "ca.pem")
    await setting.refused("BF-221", 78, "certificate verify failed", "--kafka-ca-file", flags=flags)


async def test_no_right_to_create_topics(setting: Setting) -> None:
    setting.password = USERS["producer"]
    setting.grant(*NEEDED.values())
    flags = as_user(setting.broker, "producer")
    await setting.refused("BF-222", 78, "create topic ~", "kafka-acls", flags=flags)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("transactional id", "write with transactional id blueflow.~|default."),
        ("events", "read or write topic ~events."),
        ("cursor", "read or write topic ~cursor."),
        ("position", "read or write topic ~cursor."),
    ],
)
async def test_no_right_to_use_what_is_there(setting: Setting, missing: str, said: str) -> None:
    setting.password = USERS["producer"]
    setting.create()
    await setting.seed()
    rights = {name: right for name, right in NEEDED.items() if name != missing}
    if missing in {"events", "cursor"}:
        rights[missing] = (*NEEDED[missing][:2], DESCRIBE)
    setting.grant(*rights.values())
    flags = as_user(setting.broker, "producer")
    await setting.refused("BF-222", 78, said, "kafka-acls", flags=flags)


async def test_the_least_rights_are_enough_over_tls(setting: Setting) -> None:
    setting.create()
    setting.grant(*NEEDED.values())
    connection = Connection(
        setting.broker.tls_bootstrap,
        security_protocol="SASL_SSL",
        username="producer",
        password=USERS["producer"],
        ca_file=str(setting.broker.ca_file),
    )
    events = contract_events(SOURCE, 50)
    too_large = {"$type": COLLECTION, "text": "x" * (RECORD_BYTES_MAX + 1)}
    for part in (
        events[:20],
        [*events[20:], msgspec.structs.replace(posts(99)[98], record=too_large)],
    ):
        sink = KafkaSink(
            connection, origin_source=SOURCE, topic_prefix=setting.prefix, route="single"
        )
        with anyio.fail_after(PATIENCE_S):
            await sink.resume()
            now = time.time_ns() // 1000  # the broker does not tell this user its retention
            await sink.write(part, through=Position(SOURCE, part[-1].seq, now))
            await sink.flush()
            await sink.close()
    run = anyio.to_thread.run_sync
    stored = await run(stored_events, setting.bootstrap, setting.prefix)
    assert sorted(event["seq"] for event in stored) == sorted(event.seq for event in events)
    assert [letter["seq"] for letter in await run(dead_letters, setting.bootstrap, setting.prefix)]


@pytest.mark.parametrize(
    ("topics", "said"),
    [
        ({"posts": (2, {}), "likes": (3, {})}, "need equal numbers"),
        ({"cursor": (2, {"cleanup.policy": "compact"})}, "has 2 partitions instead of one"),
        ({"cursor": (1, {})}, f"{ALTER} ~cursor --add-config cleanup.policy=compact."),
        (
            {"events": (1, {"max.message.bytes": "1048576"})},
            f"{ALTER} ~events --add-config max.message.bytes=8388608.",
        ),
        ({"events": (1, events_topic(cleanup_policy="compact"))}, "cleanup.policy=delete"),
    ],
    ids=["unequal", "cursors", "deleted", "small", "compacted"],
)
async def test_topics_that_do_not_do(
    setting: Setting, topics: dict[str, tuple[int, dict[str, str]]], said: str
) -> None:
    create(setting.bootstrap, {setting.prefix + name: made for name, made in topics.items()})
    flags = ("--route", "by-kind") if "posts" in topics else ()
    await setting.refused("BF-223", 78, said, "To mend it: ", flags=flags)


async def test_more_replicas_than_brokers(setting: Setting) -> None:
    flags = ("--kafka-replication", "3")
    await setting.refused("BF-223", 78, "cannot be created", "--kafka-replication", flags=flags)


async def test_a_replay_older_than_the_topics_keep(setting: Setting) -> None:
    flags = ("--source", f"replay:{FRAMES}", "--kafka-retention", "1h")
    await setting.refused("BF-224", 78, "~events keeps 1 h", "--kafka-retention", flags=flags)


async def test_live_data_over_simulated(setting: Setting) -> None:
    await setting.seed()
    flags = ("--source", "ws://127.0.0.1:9")
    await setting.refused("BF-205", 78, "simulated data", "--topic-prefix", flags=flags)


async def test_what_somebody_else_wrote_among_the_cursors(setting: Setting) -> None:
    await setting.seed()
    producer = Producer({"bootstrap.servers": setting.bootstrap})
    producer.produce(f"{setting.prefix}cursor", key=b"default|sim", value=b'{"seq": 9}')
    assert producer.flush(PATIENCE_S) == 0
    await setting.refused("BF-226", 78, "of topic ~cursor is no cursor", "console consumer")
