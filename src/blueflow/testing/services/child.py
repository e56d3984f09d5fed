"""A server as a child process that ends when we do."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Final

import anyio

from blueflow.errors import InvariantError, ServiceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LOOPBACK: Final = "127.0.0.1"
_POLL_S: Final = 0.02
_TAIL_BYTES: Final = 1500
_TAIL_LINES: Final = 6
# Below the ports that systems give to clients (32768 and up on Linux, 49152 and up elsewhere): a
# client that tries to reach a server which is down could be given the server's own port otherwise,
# connect to itself, and keep the server from coming back.
_PORTS: Final = range(20_000, 32_000)
_PORT_TRIES: Final = 100
# The shell gets the process id first, then nothing until our end of the pipe closes.
_WATCH: Final = 'read pid; read end; kill -9 "$pid"'


class Child:
    """A child process with a log file. It is killed when this process ends, however it ends.

    The kernel's own way (PR_SET_PDEATHSIG) is Linux only and means the thread that started the
    child, so a shell of a few hundred kilobytes waits for our end of a pipe to close. Nothing here
    belongs to an event loop: start it in one, stop it in another.

    Args:
        name: of the service, for errors.
        log: where its output is appended.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.log = log
        self._name = name
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id; 0 when it is not running."""
        return self._process.pid if self._process and self.running else 0

    @property
    def running(self) -> bool:
        """Whether it has not ended; a suspended one has not."""
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._end_watch()
        return False

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it.

        Args:
            command: the program and its arguments.
            environment: variables beside those of this process.

        Raises:
            ServiceError: the program cannot be run.
        """
        if self.running:
            raise InvariantError(f"a running {self._name} is not started again")
        try:
            self._watch = watch = subprocess.Popen(  # noqa: S603 - a constant
                ("/bin/sh", "-c", _WATCH),
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            with self.log.open("ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(  # noqa: S603 - the caller's program
                    command,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us, and we stop it then
                    env={**os.environ, **(environment or {})},
                )  # fmt: skip
            if watch.stdin is not None:
                watch.stdin.write(b"%d\n" % self._process.pid)
                watch.stdin.flush()
        except OSError as error:
            self._end_watch()
            raise ServiceError(self._name, f"cannot be run ({error})", "") from error

    async def ended(self) -> str:
        """Wait until it ends, without a bound, and say how."""
        while self.running:  # noqa: ASYNC110 - nothing tells it that does not belong to a loop
            await anyio.sleep(_POLL_S)
        return self._end()

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end, and kill it when it takes longer than that."""
        if self.running:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a suspended one ends only when it goes on
            with anyio.move_on_after(timeout_s):
                await self.ended()
        await self.kill()

    async def kill(self) -> None:
        """Send SIGKILL and wait for its end, which the kernel does not hold up."""
        if self.running:
            self._signal(signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await self.ended()

    def suspend(self) -> None:
        """Send SIGSTOP: it does nothing more, and its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        self._signal(signal.SIGCONT)

    def tail(self) -> str:
        """Return the last lines of its output since it was started, as one line."""
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            return ""
        return " / ".join([line.strip() for line in lines if line.strip()][-_TAIL_LINES:])

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise InvariantError(f"a signal is for a {self._name} that was started")
        self._process.send_signal(number)

    def _end(self) -> str:
        code = (self._process.returncode if self._process else 0) or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.kill()  # before its pipe closes: the process id is free by now
            watch.wait()
            if watch.stdin is not None:
                watch.stdin.close()


def free_ports(count: int) -> list[int]:
    """Return so many different ports of the loopback interface on which nobody listens."""
    ports: set[int] = set()
    for _ in range(_PORT_TRIES):
        port = secrets.choice(_PORTS)  # not the seeded generator: that is equal in all workers
        if is_free(port):
            ports.add(port)
        if len(ports) == count:
            return list(ports)
    raise ServiceError("a server", f"needs {count} free ports", f"{_PORT_TRIES} tries")


def is_free(port: int) -> bool:
    """Whether a server can listen on a port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
