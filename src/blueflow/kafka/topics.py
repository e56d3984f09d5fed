"""Topics are made when they are missing, and checked when they are there; none is ever altered."""

from __future__ import annotations

import logging
import math
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from blueflow.errors import KafkaRightsError, TopicError
from blueflow.kafka.connection import REQUEST_TIMEOUT_S, bounded, connecting, told
from blueflow.kafka.offsets import STOP_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from blueflow.kafka.connection import Connection
    from blueflow.kafka.topicnames import TopicNames

RECORD_BYTES_MAX: Final = 8 * 1024 * 1024
DEAD_LETTER_BYTES_MAX: Final = 512 * 1024  # twice the event that one may hold
PARTITIONS: Final = 8
RETENTION_S: Final = 7 * 86_400.0

# The start reads this topic from its beginning, so it is kept short: small segments, cleaned soon.
_CURSOR_CONFIG: Final = {
    "cleanup.policy": "compact",
    "segment.bytes": str(16 * 1024 * 1024),
    "segment.ms": "3600000",
    "min.cleanable.dirty.ratio": "0.1",
}
_CONFIG_KEYS = ("cleanup.policy", "max.message.bytes", "retention.ms", "message.timestamp.type")
_POLL_S = 0.05
_ALTER = "kafka-configs.sh --alter --entity-type topics --entity-name"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TopicWishes:
    """What missing topics are made with.

    Attributes:
        partitions: of each event topic that is made; existing ones decide for missing ones.
        replication: replicas of each partition; None leaves it to the broker.
        retention_s: how long events are kept; infinity is for ever.
    """

    partitions: int = PARTITIONS
    replication: int | None = None
    retention_s: float = RETENTION_S


@dataclass(frozen=True)
class Topics:
    """What the topics are like that a producer will write to.

    Attributes:
        partitions: of each event topic.
        retention_s: the shortest of the event topics; infinity is for ever.
        shortest: the topic with that retention.
        sizes: the number of partitions of each topic of the prefix, those of the other route too.
    """

    partitions: int
    retention_s: float
    shortest: str
    sizes: Mapping[str, int]


async def ensure_topics(connection: Connection, names: TopicNames, wishes: TopicWishes) -> Topics:
    """Make the missing topics and check all of them.

    Raises:
        TopicError: one is unsuitable, or cannot be made.
        KafkaRightsError: the user may not make it.
        KafkaError, OSError, TimeoutError: no broker answers.
    """
    async with _administration(connection) as admin:
        wanted = [*names.events, names.cursor, names.dlq]
        there = await _partitions(admin, [*wanted, *names.other_route], optional=names.other_route)
        found = {name: there[name] for name in wanted if name in there}
        partitions = _common(found, names.events) or wishes.partitions
        missing = [name for name in wanted if name not in found]
        if missing:
            if found:
                _logger.warning(
                    "topics are missing beside others and are made anew; if they were deleted, "
                    "their events and positions are gone",
                    extra={"missing": ", ".join(missing), "there": ", ".join(sorted(found))},
                )
            await _create(admin, missing, partitions, names, wishes)
            found = await _all_partitions(admin, wanted)  # another process may have been first
            partitions = _common(found, names.events) or partitions
        elif partitions != wishes.partitions != PARTITIONS:
            extra = {"there": partitions, "wanted": wishes.partitions}
            _logger.warning("the topics keep the number of partitions they have", extra=extra)
        configs = await _configs(admin, wanted)
    return _checked(configs, partitions, names, {**there, **found})


async def partitions_of(connection: Connection, names: Sequence[str]) -> dict[str, int]:
    """Return the number of partitions of each of the topics that exists.

    Raises:
        KafkaRightsError: the user may not describe one.
        KafkaError, OSError, TimeoutError: no broker answers.
    """
    async with _administration(connection) as admin:
        return await _partitions(admin, names)


@asynccontextmanager
async def _administration(connection: Connection) -> AsyncIterator[AIOKafkaAdminClient]:
    """Connect for requests about topics; disconnect also when whoever asks is cancelled."""
    admin = AIOKafkaAdminClient(**connection.options("blueflow-topics"))
    try:
        await bounded(connecting(admin.start()), REQUEST_TIMEOUT_S)
        yield admin
    finally:
        with anyio.move_on_after(STOP_S, shield=True):
            await admin.close()


async def _partitions(
    admin: AIOKafkaAdminClient, names: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, int]:
    """Return the number of partitions of each topic that exists, of optional ones if we may."""
    described = await bounded(admin.describe_topics(list(names)), REQUEST_TIMEOUT_S)
    found = {}
    for topic in described:
        error = kafka.for_code(topic["error_code"])
        if error is kafka.NoError:
            found[topic["topic"]] = len(topic["partitions"])
        elif error is kafka.TopicAuthorizationFailedError:
            if topic["topic"] not in optional:
                raise KafkaRightsError("describe", f"topic {topic['topic']}")
        elif error is kafka.InvalidTopicError:
            raise TopicError(topic["topic"], "has a name that Kafka does not take", "name another")
        elif error not in {kafka.UnknownTopicOrPartitionError, kafka.LeaderNotAvailableError}:
            raise error
    return found


async def _all_partitions(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, int]:
    """Return the number of partitions of each topic, once the brokers know them all.

    Topics that were just made are known to the controller first.
    """
    with anyio.fail_after(REQUEST_TIMEOUT_S):
        while len(found := await _partitions(admin, names)) < len(names):  # noqa: ASYNC110 - only asking tells
            await anyio.sleep(_POLL_S)
    return found


def _common(found: Mapping[str, int], events: Iterable[str]) -> int | None:
    counts = {name: found[name] for name in events if name in found}
    if len(set(counts.values())) > 1:
        told_counts = ", ".join(f"{name} {count}" for name, count in counts.items())
        name = min(counts, key=counts.__getitem__)
        problem = (
            f"has {counts[name]} partitions, and the event topics need equal numbers, so that the "
            f"events of one account are in the same one of each ({told_counts})"
        )
        how = "kafka-topics.sh --alter --partitions N before the first event, or delete it"
        raise TopicError(name, problem, how)
    return next(iter(counts.values()), None)


async def _create(
    admin: AIOKafkaAdminClient,
    missing: Sequence[str],
    partitions: int,
    names: TopicNames,
    wishes: TopicWishes,
) -> None:
    retention_s = wishes.retention_s
    keep = {"retention.ms": str(-1 if math.isinf(retention_s) else int(retention_s * 1000))}
    size = {"max.message.bytes": str(RECORD_BYTES_MAX)}
    new = []
    for name in missing:
        count = partitions if name in names.events else 1
        config = dict(_CURSOR_CONFIG) if name == names.cursor else {**keep, **size}
        if wishes.replication is None:  # aiokafka takes -1, the broker's default, this way only
            new.append(NewTopic(name, count, -1, {}, config))
        else:
            new.append(NewTopic(name, count, wishes.replication, None, config))
    answer = await bounded(admin.create_topics(new), REQUEST_TIMEOUT_S)
    for name, code, *rest in answer.topic_errors:
        error = kafka.for_code(code)
        if error in {kafka.NoError, kafka.TopicAlreadyExistsError}:
            continue
        if error in {kafka.TopicAuthorizationFailedError, kafka.ClusterAuthorizationFailedError}:
            raise KafkaRightsError("create", f"topic {name}")
        if error is kafka.RequestTimedOutError:
            raise error
        problem = f"cannot be created: {rest[0] if rest and rest[0] else told(error())}"
        raise TopicError(name, problem.rstrip("."), "see --partitions and --kafka-replication")
    _logger.info("topics created", extra={"topics": ", ".join(missing), "partitions": partitions})


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the settings of the topics; of none where we may not read them."""
    asked = [
        ConfigResource(ConfigResourceType.TOPIC, name, dict.fromkeys(_CONFIG_KEYS))
        for name in names
    ]
    configs: dict[str, dict[str, str]] = {}
    try:
        answers = await bounded(admin.describe_configs(asked), REQUEST_TIMEOUT_S)
    except kafka.IncompatibleBrokerVersion:  # not every server that speaks Kafka's protocol has it
        _logger.warning("the brokers tell no settings of topics, so they are not checked")
        return configs
    for answer in answers:
        for code, _, _, name, entries in answer.resources:
            error = kafka.for_code(code)
            if error is kafka.TopicAuthorizationFailedError:
                _logger.warning(
                    "the settings of a topic may not be read, so they are not checked",
                    extra={"topic": name},
                )
            elif error is not kafka.NoError:
                raise error
            else:
                configs[name] = {entry[0]: entry[1] for entry in entries}
    return configs


def _checked(
    configs: Mapping[str, Mapping[str, str]],
    partitions: int,
    names: TopicNames,
    sizes: Mapping[str, int],
) -> Topics:
    cursor = names.cursor
    if sizes[cursor] != 1:
        problem = f"has {sizes[cursor]} partitions instead of one"
        raise TopicError(cursor, problem, "delete it; blueflow makes a new one")
    if configs.get(cursor, {}).get("cleanup.policy", "compact") != "compact":
        problem = "is not only compacted, so positions would be deleted with time"
        raise TopicError(cursor, problem, f"{_ALTER} {cursor} --add-config cleanup.policy=compact")
    for name in (*names.events, names.dlq):
        wanted = DEAD_LETTER_BYTES_MAX if name == names.dlq else RECORD_BYTES_MAX
        _check_keeps_all(name, configs.get(name, {}), bytes_wanted=wanted)
    shortest, retention_s = names.events[0], math.inf
    for name in names.events:
        config = configs.get(name, {})
        if config.get("message.timestamp.type") == "LogAppendTime":
            continue  # its records are as old as their arrival
        kept_ms = int(config.get("retention.ms", -1))
        if 0 <= kept_ms < retention_s * 1000:
            shortest, retention_s = name, kept_ms / 1000
    return Topics(partitions, retention_s, shortest, sizes)


def _check_keeps_all(name: str, config: Mapping[str, str], *, bytes_wanted: int) -> None:
    bytes_max = int(config.get("max.message.bytes", bytes_wanted))
    if bytes_max < bytes_wanted:
        problem = f"takes records up to {bytes_max:,} bytes, and there may be larger ones"
        how = f"{_ALTER} {name} --add-config max.message.bytes={RECORD_BYTES_MAX}"
        raise TopicError(name, problem, how)
    if "compact" in config.get("cleanup.policy", ""):
        problem = "is compacted, so it would keep one record of each account"
        raise TopicError(name, problem, f"{_ALTER} {name} --add-config cleanup.policy=delete")
