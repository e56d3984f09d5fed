"""A real broker, through a client that is not Kafka's own, and the command that runs one."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, TopicAuthorizationFailedError
from aiokafka.helpers import create_ssl_context
from tests.groups import SERVERS

from blueflow.errors import Exit, ServiceError
from blueflow.testing.services.child import free_ports, is_free
from blueflow.testing.services.install import class_archive
from blueflow.testing.services.kafka import MECHANISMS, USERS, KafkaBroker, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PATIENCE_S = 60
TOPICS = "org.apache.kafka.tools.TopicCommand"
COMMAND = (sys.executable, "-m", "blueflow.testing.services", "up", "kafka")
pytestmark = [
    pytest.mark.needs("java"),
    pytest.mark.xdist_group(SERVERS),
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kafka_jars"),
]


async def create(broker: KafkaBroker, topic: str) -> None:
    await broker.tool(TOPICS, "--create", "--topic", topic, "--partitions", "1")


async def produce(bootstrap: str, topic: str, *values: bytes, **options: Any) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", **options)
    with anyio.fail_after(PATIENCE_S):
        try:
            await producer.start()
            for value in values:
                await producer.send_and_wait(topic, value)
        finally:
            await producer.stop()  # after a start that failed, too


async def read(bootstrap: str, topic: str, **options: Any) -> list[bytes]:
    """Return what a topic of one partition holds now."""
    partition, found = TopicPartition(topic, 0), []
    with anyio.fail_after(PATIENCE_S):
        async with AIOKafkaConsumer(bootstrap_servers=bootstrap, **options) as consumer:
            consumer.assign([partition])
            await consumer.seek_to_beginning(partition)
            end = (await consumer.end_offsets([partition]))[partition]
            while await consumer.position(partition) < end:
                batches = await consumer.getmany(timeout_ms=200)
                found += [record.value for records in batches.values() for record in records]
    return found


async def test_a_transaction_is_read_when_it_is_committed_and_only_then(
    fresh_kafka: KafkaBroker,
) -> None:
    await create(fresh_kafka, "transactions")
    with anyio.fail_after(PATIENCE_S):
        async with AIOKafkaProducer(
            bootstrap_servers=fresh_kafka.bootstrap, transactional_id="services"
        ) as producer:
            async with producer.transaction():
                await producer.send_and_wait("transactions", b"committed")
            await producer.begin_transaction()
            await producer.send_and_wait("transactions", b"aborted")
            await producer.abort_transaction()
    committed: dict[str, Any] = {"isolation_level": "read_committed"}
    assert await read(fresh_kafka.bootstrap, "transactions", **committed) == [b"committed"]
    assert await read(fresh_kafka.bootstrap, "transactions") == [b"committed", b"aborted"]


async def test_a_killed_broker_comes_back_on_its_ports_with_what_it_acknowledged(
    fresh_kafka: KafkaBroker,
) -> None:
    await create(fresh_kafka, "killed")
    await produce(fresh_kafka.bootstrap, "killed", b"before")
    pid, bootstrap = fresh_kafka.pid, fresh_kafka.bootstrap
    await fresh_kafka.kill()
    assert fresh_kafka.pid == 0
    assert not psutil.pid_exists(pid)
    with pytest.raises(ServiceError, match="signal 9"):
        await fresh_kafka.ended()
    await fresh_kafka.start()
    assert fresh_kafka.bootstrap == bootstrap
    await produce(fresh_kafka.bootstrap, "killed", b"after")
    assert await read(fresh_kafka.bootstrap, "killed") == [b"before", b"after"]


async def test_a_suspended_broker_acknowledges_when_it_goes_on(fresh_kafka: KafkaBroker) -> None:
    await create(fresh_kafka, "suspended")
    await produce(fresh_kafka.bootstrap, "suspended", b"before")
    with anyio.fail_after(PATIENCE_S):
        async with AIOKafkaProducer(bootstrap_servers=fresh_kafka.bootstrap) as producer:
            await producer.partitions_for("suspended")  # a suspended broker would not tell
            fresh_kafka.suspend()
            try:
                acknowledged = await producer.send("suspended", b"during")
                await anyio.sleep(0.5)
                assert not acknowledged.done()
            finally:
                fresh_kafka.resume()
            await acknowledged
    assert await read(fresh_kafka.bootstrap, "suspended") == [b"before", b"during"]


async def test_a_tool_that_fails_is_a_typed_error(fresh_kafka: KafkaBroker) -> None:
    with pytest.raises(ServiceError, match=r"TopicCommand failed \(1\).*'missing' does not exist"):
        await fresh_kafka.tool(TOPICS, "--describe", "--topic", "missing")
    with pytest.raises(ServiceError, match=r"TopicCommand was not done in 0\.01 s"):
        await fresh_kafka.tool(TOPICS, "--list", timeout_s=0.01)


async def test_users_need_the_password_and_the_right_with_and_without_tls(tmp_path: Path) -> None:
    async with KafkaBroker(tmp_path / "data", security="scram") as broker:
        await create(broker, "guarded")
        tls = create_ssl_context(cafile=str(broker.ca_file))
        plain: dict[str, Any] = {"security_protocol": "SASL_PLAINTEXT"}
        login = {"sasl_plain_username": "producer", "sasl_plain_password": USERS["producer"]}
        wrong = login | {"sasl_plain_password": "wrong"}
        address, sha = broker.sasl_bootstrap, {"sasl_mechanism": MECHANISMS[0]}
        with pytest.raises(TopicAuthorizationFailedError):
            await produce(address, "guarded", b"no right", **plain, **sha, **login)
        await broker.tool(
            "org.apache.kafka.tools.AclCommand", "--add", "--allow-principal", "User:producer",
            "--producer", "--topic", "guarded",
        )  # fmt: skip
        for mechanism in MECHANISMS:
            sha = {"sasl_mechanism": mechanism}
            encrypted = {"security_protocol": "SASL_SSL", "ssl_context": tls}
            await produce(address, "guarded", b"plain", **plain, **sha, **login)
            await produce(broker.tls_bootstrap, "guarded", b"tls", **encrypted, **sha, **login)
            with pytest.raises(KafkaConnectionError):
                await produce(address, "guarded", b"wrong", **plain, **sha, **wrong)
        admin = {"sasl_plain_username": "admin", "sasl_plain_password": USERS["admin"]}
        values = await read(address, "guarded", **plain, **sha, **admin)
    assert values == [b"plain", b"tls"] * 2
    assert broker.ca_file.exists()  # in a folder that was named, and so is kept


async def test_a_broker_that_does_not_come_up_says_why_and_leaves_nothing_behind() -> None:
    late = KafkaBroker(start_timeout_s=0.2)
    with pytest.raises(ServiceError, match=r"did not answer within 0\.2 s"):
        await late.__aenter__()
    broken = KafkaBroker(properties={"log.dirs": "/dev/null/topics"})
    with pytest.raises(ServiceError, match=r"it said: .*/dev/null/topics"):
        await broken.__aenter__()
    for broker in (late, broken):
        assert broker.pid == 0
        assert not broker.data.exists()
        assert is_free(broker.port)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command until it says how to use the broker, and kill it at the end."""
    with subprocess.Popen(
        (*COMMAND, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not said.endswith("Ctrl-C stops.\n"):
                line = process.stdout.readline()
                assert line, process.communicate()[1]
                said += line
            yield process, said
        finally:
            process.kill()


async def test_the_command_says_how_to_use_it_stops_what_it_started_and_keeps_a_named_folder(
    tmp_path: Path,
) -> None:
    (port,) = free_ports(1)
    arguments = (f"--port={port}", f"--data={tmp_path / 'data'}")
    with running(*arguments) as (process, said):
        assert f"export KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:{port}\n" in said
        assert "blueflow produce --source sim --topic-prefix sim.\n" in said
        children = psutil.Process(process.pid).children(recursive=True)
        assert "java" in {child.name() for child in children}
        admin = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}")
        await admin.start()
        await admin.create_topics([NewTopic("kept", 1, 1)])
        await admin.close()

        second = await anyio.run_process((*COMMAND, *arguments), check=False)
        assert second.returncode == Exit.UNAVAILABLE
        assert f"BF-105: Kafka: port {port} of 127.0.0.1 is taken." in second.stderr.decode()

        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert not any(child.is_running() for child in children)

    async with KafkaBroker(tmp_path / "data") as broker:
        assert "kept" in await broker.tool(TOPICS, "--list")


def test_after_the_installation_brokers_start_with_classes_that_are_archived(
    tmp_path: Path, kafka_jars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blueflow").mkdir()
    (tmp_path / "blueflow" / kafka_jars.parent.name).symlink_to(kafka_jars.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archive = class_archive()
    assert prepare() == tmp_path / "blueflow" / kafka_jars.parent.name / "libs"
    made = archive.stat().st_mtime_ns
    assert [path for path in archive.parent.iterdir() if not path.is_symlink()] == [archive]

    async def mapped() -> str:
        async with KafkaBroker() as broker:
            return await anyio.Path(f"/proc/{broker.pid}/maps").read_text()

    if sys.platform == "linux":
        assert str(archive) in anyio.run(mapped)
    prepare()
    assert archive.stat().st_mtime_ns == made
