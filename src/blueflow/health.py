"""What an operator's tools ask a process: /metrics, /livez and /readyz, over a small HTTP server.

It runs in the event loop on purpose: a loop that is blocked answers no probe. Whatever a client
does, the flow beside it goes on: see docs/decisions/003-health-server.md.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple, Self

import anyio

from blueflow.errors import SettingError
from blueflow.logs import clip
from blueflow.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from blueflow.config import Settings
    from blueflow.metrics import Metrics

REQUEST_BYTES_MAX = 8192
REQUEST_S = 5.0  # from the connection to the end of the answer
CONNECTIONS_MAX = 32
STOP_S = 1.0

_logger = logging.getLogger(__name__)


class Check(NamedTuple):
    """What one part of the process says about itself; `reason` is for people."""

    ok: bool
    reason: str


class HealthServer:
    """Serves the metrics and the checks of one process.

    `/readyz` answers 200 when every check is ok, else 503; `/livez` likewise with `live_checks`, so
    without any it tells that the event loop turns. Both give all reasons as JSON.

    Args:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        metrics: what `/metrics` shows.
        checks: name -> check, asked at each `/readyz`; they answer at once and do not raise.
        live_checks: as `checks`, for `/livez`: false means that only a restart can help.
        fall_back: take a free port, with a warning, when `port` is busy.
        origin_of: tells where a setting came from, for the error.
    """

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Metrics,
        checks: Mapping[str, Callable[[], Check]],
        *,
        live_checks: Mapping[str, Callable[[], Check]] | None = None,
        fall_back: bool = False,
        origin_of: Callable[[str], str] = lambda _: "the program",
    ) -> None:
        self._host, self._wanted_port = host, port
        self._metrics = metrics
        self._checks = {"/readyz": checks, "/livez": live_checks or {}}
        self._fall_back, self._origin_of = fall_back, origin_of
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @classmethod
    def of(
        cls,
        settings: Settings,
        default_port: int,
        metrics: Metrics,
        checks: Mapping[str, Callable[[], Check]],
        *,
        live_checks: Mapping[str, Callable[[], Check]] | None = None,
    ) -> HealthServer | None:
        """Make the server that the settings ask for; None when they turn it off (port 0).

        Nobody chose the default port, so a second process may take a free one instead; a port that
        somebody chose is where their tools look, so there a busy one is an error.
        """
        port = settings.prometheus_port
        if port == 0:
            return None
        return cls(
            settings.metrics_host,
            default_port if port is None else port,
            metrics,
            checks,
            live_checks=live_checks,
            fall_back=port is None,
            origin_of=settings.origin,
        )

    @property
    def port(self) -> int:
        """The port it listens on, between `start` and `stop`."""
        if self._server is None:
            return self._wanted_port
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            SettingError: the port is busy or not allowed, or the address is not of this machine.
        """
        try:
            self._server = await self._listen(self._wanted_port)
        except OSError as error:
            if not self._fall_back or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise self._refused(error) from error
            self._server = await self._listen(0)
            extra = {"busy_port": self._wanted_port, "port": self.port}
            _logger.warning("the port of /metrics is busy: took a free one", extra=extra)
        _logger.info("serving metrics and health", extra={"host": self._host, "port": self.port})

    async def stop(self) -> None:
        """Close the port and every connection, within a second."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for writer in self._clients.values():
            writer.transport.abort()  # its task then ends by itself
        with anyio.move_on_after(STOP_S, shield=True):
            await asyncio.gather(*self._clients, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _listen(self, port: int) -> asyncio.Server:
        try:
            return await asyncio.start_server(
                self._serve, self._host, port, limit=REQUEST_BYTES_MAX, backlog=CONNECTIONS_MAX
            )
        except UnicodeError as error:  # its text is about a codec
            raise OSError("it can be no host name") from error

    def _refused(self, error: OSError) -> SettingError:
        where = f"{self._host}:{self._wanted_port}"
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        name = "prometheus_port" if taken else "metrics_host"
        # The text of asyncio has the address again; a name that is not found has no error number.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error)
        return SettingError(
            name, self._origin_of(name), f"cannot listen on {where}: {reason.lower()}"
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._clients) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._clients[task] = writer
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(await self._answer(reader))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is gone or too slow: its loss alone
        finally:
            del self._clients[task]
            writer.transport.abort()  # what a client does not take must not stay in memory

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _plain("too large"))
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):  # noqa: PLR2004 - RFC 9112, 3
            return _response(HTTPStatus.BAD_REQUEST, _plain("not an HTTP/1.1 request"))
        method, path = words[0], words[1].partition(b"?")[0].decode("latin-1")
        if path != "/metrics" and path not in self._checks:
            return _response(HTTPStatus.NOT_FOUND, _plain("try /metrics, /livez or /readyz"))
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, _plain("GET only"), "Allow: GET, HEAD")
        status, body = self._look(path)
        return _response(status, body, bodiless=method == b"HEAD")

    def _look(self, path: str) -> tuple[HTTPStatus, tuple[str, bytes]]:
        if path == "/metrics":
            return HTTPStatus.OK, (CONTENT_TYPE, self._metrics.exposition())
        found = {name: check() for name, check in self._checks[path].items()}
        ok = all(check.ok for check in found.values())
        told = {name: {"ok": c.ok, "reason": clip(c.reason, 256)} for name, c in found.items()}
        body = json.dumps({"ok": ok, "checks": told}).encode() + b"\n"
        status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
        return status, ("application/json", body)


def _plain(text: str) -> tuple[str, bytes]:
    return "text/plain; charset=utf-8", text.encode() + b"\n"


def _response(
    status: HTTPStatus, content: tuple[str, bytes], *headers: str, bodiless: bool = False
) -> bytes:
    kind, body = content
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if bodiless else body)
