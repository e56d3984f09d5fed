"""The simulated relay: a real websocket server that behaves, and misbehaves, like a public one.

As a command (`python -m blueflow.testing.relay`), in a test (`async with SimulatedRelay(…)`), or as
a child process (`async with spawn(…)`). docs/guides/simulated-relay.md tells how to use it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qs, urlsplit

import anyio
import msgspec
from websockets.asyncio.server import serve

from blueflow.errors import BlueflowError
from blueflow.testing.consumer import Consumer
from blueflow.testing.cycledlog import CycledLog
from blueflow.testing.eventlog import EventLog, RetainedLog
from blueflow.testing.faultplan import FaultPlan
from blueflow.testing.frames import encode_error, encode_info, websocket_message
from blueflow.testing.ledger import Fired, Ledger
from blueflow.testing.relayprocess import RelayProcess, spawn

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

    from websockets.asyncio.server import Server, ServerConnection
    from websockets.http11 import Request, Response

    from blueflow.testing.frames import NetworkFrame

__all__ = ["RelayProcess", "RelaySettings", "RelayStats", "SimulatedRelay", "spawn"]

PATH = "/xrpc/com.atproto.sync.subscribeRepos"
LAG_EVENTS_MAX = 16_384  # where the public relay gives a consumer up
_TICK_S = 0.005
_BURST_EVENTS = 256
_WRITE_BUFFER_BYTES = 1024 * 1024
_STATUS_TEXTS = {400: "bad cursor", 404: "no such method", 429: "too many", 501: "not here"}


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a simulated relay serves.

    Attributes:
        rate: events per second of simulated time.
        speed: how many times faster than that it goes; `inf` is flat out: as fast as the consumers
            take them, and not at all without one.
        limit: stop issuing after so many events; connections stay open. None: never.
        resume: whether a cursor names the last event already had ("exclusive") or the first one to
            send ("inclusive"). Relays of both kinds exist.
        retention: how many events are kept for cursors; more than `lag_max`.
        lag_max: a consumer so many events behind is told ConsumerTooSlow and closed.
        future: a cursor above the newest seq is answered with live events, as the public relay
            does, or with the error FutureCursor.
        outdated_info: whether a cursor below the oldest event kept is told #info OutdatedCursor.
        cycle: give the first so many frames out over and over with new seqs and times, instead of
            making each one; 0 is off. For load: revs repeat.
        wait_for_consumer: issue nothing before the first consumer is there.
        close_timeout_s: how long a closing handshake may take.
    """

    host: str = "127.0.0.1"
    port: int = 0
    rate: float = 500.0
    speed: float = inf
    limit: int | None = None
    resume: Literal["inclusive", "exclusive"] = "exclusive"
    retention: int = 20_000
    lag_max: int = LAG_EVENTS_MAX
    future: Literal["live", "error"] = "live"
    outdated_info: bool = False
    cycle: int = 0
    wait_for_consumer: bool = True
    close_timeout_s: float = 5.0


class RelayStats(msgspec.Struct):
    """What a relay has done so far."""

    connections: int = 0
    refused: int = 0  # handshakes answered with an HTTP error
    kicked: int = 0  # consumers that were too slow
    sent_events: int = 0  # over all consumers
    sent_bytes: int = 0


class SimulatedRelay:
    """An async context manager; inside, `url` can be connected to.

    Args:
        frames: the network: a `SimulatedNetwork`, recorded frames, or any frames in order.
        settings: how to serve; the default is flat out.
        faults: what goes wrong and when, as a plan or its text form.
        ledger: where to note what is issued; None notes nothing, for load.
    """

    def __init__(
        self,
        frames: Iterable[NetworkFrame],
        settings: RelaySettings | None = None,
        *,
        faults: FaultPlan | str = "",
        ledger: Ledger | None = None,
    ) -> None:
        self.settings = settings or RelaySettings()
        self.faults = FaultPlan(faults) if isinstance(faults, str) else faults
        self.ledger = ledger
        self.stats = RelayStats()
        self.log = self._new_log(frames)
        self.failure: BlueflowError | OSError | None = None  # why nothing more is issued
        self.failed = anyio.Event()
        self._consumers: set[Consumer] = set()
        self._news = anyio.Event()
        self._first_consumer = anyio.Event()
        self._server: Server | None = None
        self._issuer: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens: `ws://HOST:PORT`, the form that `--source` takes."""
        if self._server is None:
            raise RuntimeError("the relay has not been started: use `async with`")
        host, port = next(iter(self._server.sockets)).getsockname()[:2]
        return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"

    @property
    def stream_url(self) -> str:
        """The full address of subscribeRepos; `?cursor=` goes behind it."""
        return self.url + PATH

    @property
    def consumers(self) -> int:
        """How many consumers are connected."""
        return len(self._consumers)

    async def __aenter__(self) -> Self:
        self._server = await serve(
            self._serve,
            self.settings.host,
            self.settings.port,
            process_request=self._answer,
            compression=None,  # messages are written as they are
            ping_interval=None,
            close_timeout=self.settings.close_timeout_s,
            write_limit=_WRITE_BUFFER_BYTES,
            server_header=None,
        )
        if self.settings.speed != inf:
            self._issuer = asyncio.create_task(self._issue_at_rate())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._issuer is not None:
            self._issuer.cancel()
            with suppress(asyncio.CancelledError, BlueflowError, OSError):  # `failure` has it
                await self._issuer
        if self._server is not None:
            with anyio.CancelScope(shield=True):
                await self._close(self._server)

    @property
    def ended(self) -> bool:
        """Whether nothing more will be issued; connections stay open all the same."""
        limit = self.settings.limit
        return self.log.exhausted or (limit is not None and self.log.end >= limit)

    async def wait_for(self, event: int) -> None:
        """Wait for news of an event: that it is issued, or that no more events are."""
        had_ended = self.ended
        if self.settings.speed == inf and self._issue_ahead():
            return
        if event >= self.log.end and self.ended is had_ended:
            await self._news.wait()

    async def sent(self) -> None:
        """Let consumers go on that ran ahead of the slowest one."""
        if self.settings.speed == inf and self._news.statistics().tasks_waiting:
            self._announce()
            await anyio.lowlevel.checkpoint()

    def _new_log(self, frames: Iterable[NetworkFrame]) -> EventLog:
        settings = self.settings
        if settings.cycle:
            pool = list(islice(frames, settings.cycle))
            retention, rate = settings.retention, settings.rate
            return CycledLog(pool, self.faults, self.ledger, retention, rate)
        return RetainedLog(frames, self.faults, self.ledger, settings.retention)

    def _issue_ahead(self) -> bool:
        """Flat out: issue some events, unless a consumer is too far behind to take more."""
        lag_max = max(min(self.settings.lag_max, self.settings.retention) // 2, 2)
        ahead = min(2_048 if self.settings.cycle else 64, lag_max - 1)  # a swap needs one to spare
        slowest = max((c.lag for c in self._consumers if not c.stuck), default=0)
        if slowest + ahead > lag_max:
            return False
        return self._issue(ahead) > 0

    async def _issue_at_rate(self) -> None:
        settings = self.settings
        if settings.wait_for_consumer:
            await self._first_consumer.wait()
        start = asyncio.get_running_loop().time()
        per_second = settings.rate * settings.speed
        issued = 0
        while True:
            due = int((asyncio.get_running_loop().time() - start) * per_second) - issued
            fresh = self._issue(min(due, _BURST_EVENTS))
            issued += fresh
            for consumer in list(self._consumers):
                if consumer.lag > settings.lag_max:
                    consumer.kick()
            await anyio.sleep(0 if fresh == _BURST_EVENTS else _TICK_S)  # behind: no rest

    def _issue(self, count: int) -> int:
        limit, had_ended = self.settings.limit, self.ended
        if limit is not None:
            count = min(count, limit - self.log.end)
        try:
            issued = self.log.issue(count) if count > 0 else 0
        except (BlueflowError, OSError) as error:  # a broken recording, a full disk
            self.failure = error
            self.failed.set()
            raise
        if issued or self.ended is not had_ended:
            self._announce()
        return issued

    def _announce(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        address = urlsplit(request.path)
        fault = self.faults.take_handshake(self.log.end)
        status = 0
        if fault is not None:
            status = int(fault.number)
            self.faults.note(fault)
            if self.ledger is not None:
                self.ledger.add_fired(Fired(str(fault), self.log.end))
        elif address.path != PATH:
            status = 404
        elif _cursor(address.query) == _BAD_CURSOR:
            status = 400
        if not status:
            return None
        self.stats.refused += 1
        response = connection.respond(status, _STATUS_TEXTS.get(status, "no"))
        if status == 429:  # noqa: PLR2004 - too many requests
            wait_s = fault.argument.partition("/")[2] if fault else ""
            response.headers["Retry-After"] = wait_s or "1"
        return response

    async def _serve(self, connection: ServerConnection) -> None:
        self.stats.connections += 1
        if connection.request is None:  # the library has answered it, so there was one
            return
        cursor = _cursor(urlsplit(connection.request.path).query)
        log, settings = self.log, self.settings
        if cursor is None:
            event = log.end
        elif cursor > log.last_seq:
            if settings.future == "error":
                refusal = encode_error("FutureCursor", "that seq has not been issued")
                connection.transport.write(websocket_message(refusal))
                await connection.close(1008, "FutureCursor")
                return
            event = log.end
        else:
            event = log.locate(cursor, inclusive=settings.resume == "inclusive")
            if settings.outdated_info and 0 < cursor < log.seq(log.start) - 1:
                info = encode_info("OutdatedCursor", "the oldest event kept is newer")
                connection.transport.write(websocket_message(info))
        consumer = Consumer(self, connection, event)
        self._consumers.add(consumer)
        self._first_consumer.set()
        try:
            await consumer.run()
        finally:
            self._consumers.discard(consumer)
            self._announce()  # somebody may have waited for it

    async def _close(self, server: Server) -> None:
        for consumer in list(self._consumers):
            if not consumer.connection.transport.is_reading():
                consumer.connection.transport.abort()  # half-open on purpose: it never answers
        server.close()  # with 1001
        with anyio.move_on_after(self.settings.close_timeout_s + 1):
            await server.wait_closed()
            return
        for consumer in list(self._consumers):
            consumer.connection.transport.abort()
        with anyio.move_on_after(1):
            await server.wait_closed()


_BAD_CURSOR = -1


def _cursor(query: str) -> int | None:
    """Return the cursor of a request; None: none was given; -1: it is no cursor."""
    values = parse_qs(query, keep_blank_values=True).get("cursor")
    if not values:
        return None
    return int(values[0]) if values[0].isascii() and values[0].isdigit() else _BAD_CURSOR


if __name__ == "__main__":
    from blueflow.testing.relaycommand import main

    main()
