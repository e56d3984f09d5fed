"""Apache Kafka: one broker that is its own controller, on the loopback interface."""

from __future__ import annotations

import base64
import os
import shutil
import struct
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
from anyio import to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from blueflow.errors import ServiceError
from blueflow.testing.services.certificates import make_certificates
from blueflow.testing.services.child import LOOPBACK, Child, free_ports, is_free
from blueflow.testing.services.install import (
    class_archive,
    find_java,
    install_kafka,
    versions,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Literal, Self

USERS: Final = {"admin": "admin-secret", "producer": "producer-secret"}
MECHANISMS: Final = ("SCRAM-SHA-512", "SCRAM-SHA-256")
TOOL_TIMEOUT_S: Final = 60.0
QUICK_START: Final = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""For a broker that lives for seconds: the optimising compiler would cost more than it saves."""
_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 20.0
_ANSWER_TIMEOUT_S: Final = 2.0
_ANSWER_BYTES_MAX: Final = 100_000
_POLL_S: Final = 0.05
_LEVEL: Final = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
_OUTPUT_LINES: Final = 8
# A request for the cluster without topics: API 3 in version 4, correlation id 1, no client id.
_METADATA: Final = struct.pack(">ihhihiB", 15, 3, 4, 1, -1, 0, 0)
_ONE_BROKER: Final = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",  # else the first reader fixes the partition count
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    "log.index.size.max.bytes": "262144",  # 10 MiB by default, twice a partition, before any record
    "broker.session.timeout.ms": "3000",  # so long a start after a SIGKILL waits for the old one
    "broker.heartbeat.interval.ms": "500",
}


class KafkaBroker:
    """A real broker as a child process: use it in `async with`, or `start()` and `close()`.

    Its state is a process and a folder, nothing of it belongs to an event loop.

    Args:
        data: where it keeps its topics, its log and its certificates; made when missing, and kept.
            None is a temporary folder, removed at the end.
        security: "scram" adds listeners with SCRAM-SHA-512 and SCRAM-SHA-256 for `USERS`, one
            in plain text and one with TLS, and an authorizer: `admin` and the clients of
            `bootstrap` may do everything, `producer` nothing until it is granted. Users are made
            with the data folder, so a folder stays with the security it was made with.
        port: of `bootstrap`; 0 takes a free one. Each port stays the same over restarts.
        properties: of the broker; they win over ours.
        cluster_id: of the cluster it belongs to, when it is one of several.
        java_options: of its Java; by default its bounds of memory, and a quick start.
        start_timeout_s: how long it may take until it answers.
        stop_timeout_s: how long it may take to end before it is killed.
    """

    def __init__(
        self,
        data: Path | None = None,
        *,
        security: Literal["scram"] | None = None,
        port: int = 0,
        properties: Mapping[str, str] | None = None,
        cluster_id: str | None = None,
        java_options: Sequence[str] = ("-Xms256m", "-Xmx512m", *QUICK_START),
        start_timeout_s: float = _START_TIMEOUT_S,
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        self.temporary = data is None
        self.data = data or Path(tempfile.mkdtemp(prefix="blueflow-kafka-"))
        self._security, self._properties = security, dict(properties or {})
        self._cluster_id = cluster_id or new_cluster_id()
        self._java_options = tuple(java_options)
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        others = free_ports(3)
        self.port, self.controller_port = port or free_ports(1)[0], others.pop()
        self._sasl_port, self._tls_port = others
        self._child = Child("Kafka", self.data / "broker.log")
        self._java, self._libs, self._shared = "java", Path(), Path()

    @property
    def bootstrap(self) -> str:
        """The address without encryption or a user."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def sasl_bootstrap(self) -> str:
        """The address for SASL_PLAINTEXT; needs `security="scram"`."""
        return f"{LOOPBACK}:{self._sasl_port}"

    @property
    def tls_bootstrap(self) -> str:
        """The address for SASL_SSL; needs `security="scram"`."""
        return f"{LOOPBACK}:{self._tls_port}"

    @property
    def ca_file(self) -> Path:
        """The certificate authority that clients of `tls_bootstrap` have to trust."""
        return self.data / "tls" / "ca.pem"

    @property
    def log(self) -> Path:
        """The file with the broker's warnings and errors."""
        return self._child.log

    def configure(self, properties: Mapping[str, str]) -> None:
        """Set properties of its next start; they win over those before."""
        self._properties |= properties

    @property
    def pid(self) -> int:
        """Its process id; 0 when it is not running."""
        return self._child.pid

    async def start(self) -> None:
        """Start it, on the data it had before, and wait until it answers.

        Raises:
            MissingProgramError: there is no Java, or no Maven to get Kafka with.
            ServiceError: a port is taken, it ended, or did not answer in time.
        """
        self._java = await to_thread.run_sync(find_java)
        self._libs = await to_thread.run_sync(install_kafka)
        self._shared = await to_thread.run_sync(class_archive)
        ports = [self.port, self.controller_port]
        ports += [self._sasl_port, self._tls_port] if self._security else []
        for port in ports:
            if not is_free(port):
                raise ServiceError("Kafka", f"port {port} of {LOOPBACK} is taken", "")
        properties = self.data / "server.properties"
        self.data.mkdir(parents=True, exist_ok=True)
        if self._security:
            make_certificates(self.ca_file.parent)
        lines = [f"{name}={value}" for name, value in self._configuration().items()]
        properties.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if not (self.data / "topics" / "meta.properties").exists():
            await self._format(properties)
        command = self._command("kafka.Kafka", self._java_options)
        self._child.start([*command, str(properties)])
        try:
            await self._wait_until_it_answers()
        except BaseException:
            await self._child.kill()
            raise

    async def stop(self) -> None:
        """End it, by force when it takes too long; the data stay."""
        with anyio.CancelScope(shield=True):
            await self._child.stop(self._stop_timeout_s)

    async def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        await self._child.kill()

    def suspend(self) -> None:
        """Send SIGSTOP: connections stay open, and nothing answers."""
        self._child.suspend()

    def resume(self) -> None:
        """Send SIGCONT."""
        self._child.resume()

    async def ended(self) -> None:
        """Wait until it ends by itself or by somebody else.

        Raises:
            ServiceError: it did.
        """
        how = await self._child.ended()
        raise ServiceError("Kafka", f"ended ({how})", self._child.tail())

    async def close(self) -> None:
        """Stop it, and remove its data when they are temporary."""
        await self.stop()
        if self.temporary:
            shutil.rmtree(self.data, ignore_errors=True)

    def usage(self) -> str:
        """Say where it is, and how to use it."""
        kept = "removed at the end" if self.temporary else "kept"
        return (
            f"Kafka {versions('kafka')['kafka']} answers on {self.bootstrap}; "
            f"its data are in {self.data} ({kept})\n\n"
            f"    export KAFKA_BOOTSTRAP_SERVERS={self.bootstrap}\n"
            "    blueflow produce --source sim --topic-prefix sim.\n"
        )

    async def tool(self, name: str, *arguments: str, timeout_s: float = TOOL_TIMEOUT_S) -> str:
        """Run one of Kafka's command line tools against this broker and return its output.

        Args:
            name: of the class, e.g. `org.apache.kafka.tools.TopicCommand`.
            arguments: of the tool; `--bootstrap-server` is added when it is not among them.
            timeout_s: how long it may take.

        Raises:
            ServiceError: it failed, or took too long.
        """
        to = () if "--bootstrap-server" in arguments else ("--bootstrap-server", self.bootstrap)
        return await self._run(name, *to, *arguments, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _configuration(self) -> dict[str, str]:
        listeners = {"PLAINTEXT": self.port, "CONTROLLER": self.controller_port}
        protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}
        security: dict[str, str] = {}
        if self._security:
            listeners |= {"SASL_PLAINTEXT": self._sasl_port, "SASL_SSL": self._tls_port}
            protocols |= {name: name for name in ("SASL_PLAINTEXT", "SASL_SSL")}
            login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            security = {
                f"listener.name.{listener}.{mechanism.lower()}.sasl.jaas.config": login
                for listener in ("sasl_plaintext", "sasl_ssl")
                for mechanism in MECHANISMS
            } | {
                "sasl.enabled.mechanisms": ",".join(MECHANISMS),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:admin;User:ANONYMOUS",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(self.ca_file.with_name("server.pem")),
            }
        return {
            **_ONE_BROKER,
            "controller.quorum.voters": f"1@{LOOPBACK}:{self.controller_port}",
            "listeners": ",".join(f"{one}://{LOOPBACK}:{port}" for one, port in listeners.items()),
            "listener.security.protocol.map": ",".join(map(":".join, protocols.items())),
            "log.dirs": str(self.data / "topics"),
            **security,
            **self._properties,
        }

    async def _format(self, properties: Path) -> None:
        users = [
            f"--add-scram={mechanism}=[name={user},password={password}]"
            for user, password in USERS.items()
            for mechanism in MECHANISMS
            if self._security
        ]
        await self._run(
            "kafka.tools.StorageTool", "format", f"--cluster-id={self._cluster_id}",
            f"--config={properties}", *users,
        )  # fmt: skip

    async def _run(self, name: str, *arguments: str, timeout_s: float = TOOL_TIMEOUT_S) -> str:
        command = self._command(name, QUICK_START)
        short = name.rpartition(".")[2]
        try:
            with anyio.fail_after(timeout_s):
                done = await anyio.run_process([*command, *arguments], check=False)
        except TimeoutError as error:
            raise ServiceError("Kafka", f"{short} was not done in {timeout_s:g} s", "") from error
        output = done.stdout.decode(errors="replace")
        if done.returncode:
            lines = (done.stderr.decode(errors="replace") + output).splitlines()
            said = " / ".join([line.strip() for line in lines if line.strip()][:_OUTPUT_LINES])
            raise ServiceError("Kafka", f"{short} failed ({done.returncode})", said)
        return output

    def _command(self, name: str, options: Sequence[str]) -> list[str]:
        shared = self._shared.exists()  # else Java would go without its own archive, too
        archive = (f"-XX:SharedArchiveFile={self._shared}",) if shared else ()
        return [self._java, *archive, *options, _LEVEL, "-cp", f"{self._libs}/*", name]

    async def _wait_until_it_answers(self) -> None:
        meta = (self.data / "topics" / "meta.properties").read_text(encoding="utf-8")
        cluster = dict(line.split("=", 1) for line in meta.splitlines() if "=" in line)
        with anyio.move_on_after(self._start_timeout_s):
            while self._child.running:
                if await _answers(self.port, cluster["cluster.id"].encode()):
                    return
                await anyio.sleep(_POLL_S)
            problem = f"ended before it answered ({await self._child.ended()})"
            raise ServiceError("Kafka", problem, self._child.tail())
        problem = f"did not answer within {self._start_timeout_s:g} s"
        raise ServiceError("Kafka", problem, self._child.tail())


def new_cluster_id() -> str:
    """Return an id such as every cluster has: a UUID in 22 characters."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def prepare() -> Path:
    """Get Kafka's files, and start it once; return the folder with its jars.

    That start leaves an archive of the loaded classes (JEP 350), with which later ones take a
    third of the processor time.

    Raises:
        MissingProgramError: there is no Java, or no Maven to get Kafka with.
        ServiceError: Maven failed, or Kafka did not start.
    """
    libs, archive = install_kafka(), class_archive()
    if not archive.exists():
        part = archive.with_name(f"{archive.name}.{os.getpid()}")
        try:
            anyio.run(_start_once, f"-XX:ArchiveClassesAtExit={part}")
            if part.exists():  # it is written at the end of the process, or not: it is only faster
                part.replace(archive)
        finally:
            part.unlink(missing_ok=True)
    return libs


async def _start_once(java_option: str) -> None:
    async with KafkaBroker(java_options=[*QUICK_START, java_option]):
        pass


async def _answers(port: int, cluster: bytes) -> bool:
    """Whether a broker of this cluster, and no other, is in service on a port."""
    answer = b""
    with suppress(OSError, anyio.IncompleteRead, anyio.BrokenResourceError):
        with anyio.move_on_after(_ANSWER_TIMEOUT_S):
            async with await anyio.connect_tcp(LOOPBACK, port) as stream:
                await stream.send(_METADATA)
                reader = BufferedByteReceiveStream(stream)
                size = int.from_bytes(await reader.receive_exactly(4), "big")
                answer = await reader.receive_exactly(min(size, _ANSWER_BYTES_MAX))
    brokers = int.from_bytes(answer[8:12], "big")  # after correlation id and throttle time
    return brokers > 0 and cluster in answer
