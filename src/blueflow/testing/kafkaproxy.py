"""A proxy between a Kafka client and one broker that loses, delays and holds what passes.

It knows no more of Kafka than the frame: a length, then in a request the kind, its version and the
correlation id, in a reply the correlation id.

Source: https://kafka.apache.org/protocol.html#protocol_messages
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from types import TracebackType
    from typing import Literal, Self

_LENGTH_BYTES = 4
_CLOSE_TIMEOUT_S = 1.0


class KafkaProxy:
    """Passes everything on, but for the faults it is asked for.

    A client follows the addresses that brokers advertise, so the broker has to advertise the
    proxy's: enter the proxy first, start the broker with `advertised.listeners` naming `port`.

    A fault is planned for the next requests of a kind, whichever the connection, and fires once for
    each of `times`. A fault that did not happen proves nothing: assert on `fired`.

    Args:
        upstream: host:port where the broker listens; nobody needs to listen there yet.
        port: where to listen, on 127.0.0.1; 0 takes a free one.
    """

    def __init__(self, upstream: str, port: int = 0) -> None:
        self.port = port
        self.fired: Counter[str] = Counter()  # by the name of the method that planned it
        self.upstream = upstream
        self._seen: Counter[int] = Counter()
        self._plans: defaultdict[int, list[_Plan]] = defaultdict(list)
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._server: asyncio.Server | None = None

    @property
    def bootstrap(self) -> str:
        """The address for the client."""
        return f"127.0.0.1:{self.port}"

    def lose_request(self, api: int, *, times: int = 1, skip: int = 0) -> None:
        """Close the connection in place of passing the request on: the broker never sees it.

        Args:
            api: the kind of request.
            times: how many.
            skip: let so many pass first.
        """
        self._plans[api].append(_Plan("lose_request", times, skip))

    def lose_reply(
        self,
        api: int,
        *,
        times: int = 1,
        skip: int = 0,
        then: Literal["close", "hang"] = "close",
    ) -> None:
        """Drop the broker's reply: the request had its effect, and the client does not learn it.

        Args:
            api: the kind of request.
            times: how many.
            skip: let so many replies pass first.
            then: `hang` leaves the connection open and passes nothing on it any more.
        """
        self._plans[api].append(_Plan("lose_reply", times, skip, hang=then == "hang"))

    def delay(
        self,
        api: int,
        seconds: float,
        *,
        times: int = 1,
        skip: int = 0,
        of: Literal["request", "reply"] = "reply",
    ) -> None:
        """Hold the request or its reply, and with it what follows on the connection.

        A held request arrives even when its client has closed the connection in the meantime: so a
        writer that was given up writes after all.

        Args:
            api: the kind of request.
            seconds: how long.
            times: how many.
            skip: let so many pass first.
            of: which of the two is late.
        """
        self._plans[api].append(_Plan(f"delay {of}", times, skip, seconds=seconds))

    def block(self) -> None:
        """Be a silent peer: accept connections and bytes, pass nothing on in either direction."""
        self._unblocked.clear()

    def unblock(self) -> None:
        """Pass on what was held, also of clients that have gone."""
        self._unblocked.set()

    def cut(self) -> None:
        """Reset every connection that is open now."""
        for link in self._links:
            self.fired["cut"] += 1
            link.abort()

    def count(self, api: int) -> int:
        """Return how many requests of a kind clients sent."""
        return self._seen[api]

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()

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

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Serve one client until one side closes or a fault does."""
        host, _, port = self.upstream.rpartition(":")
        try:
            broker_reader, broker_writer = await asyncio.open_connection(host, int(port))
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, OSError):  # no broker: the client sees what it would without us
                return
            raise
        link = _Link(writer, broker_writer)
        self._links.add(link)
        pumps = {
            asyncio.ensure_future(self._requests(link, reader)),
            asyncio.ensure_future(self._replies(link, broker_reader)),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            await self._unblocked.wait()  # a silent peer does not close either
        except asyncio.CancelledError:
            link.abort()
            raise
        finally:
            self._links.discard(link)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await asyncio.gather(_close(writer), _close(broker_writer))

    async def _requests(self, link: _Link, reader: StreamReader) -> None:
        while True:
            frame = await _read_frame(reader)
            api, correlation = _signed(frame[0:2]), frame[4:8]
            self._seen[api] += 1
            if link.hangs:
                continue
            await self._pause()
            if self._take("lose_request", api):
                return
            if plan := self._take("delay request", api):
                await asyncio.sleep(plan.seconds)
            link.kinds[correlation] = api
            await _write_frame(link.broker, frame)

    async def _replies(self, link: _Link, reader: StreamReader) -> None:
        while True:
            frame = await _read_frame(reader)
            api = link.kinds.pop(frame[:4], None)  # None: of no request that passed here
            await self._pause()
            if api is not None:
                if plan := self._take("lose_reply", api):
                    if not plan.hang:
                        return
                    link.hangs = True
                    await asyncio.get_running_loop().create_future()  # until the client goes
                if plan := self._take("delay reply", api):
                    await asyncio.sleep(plan.seconds)
            await _write_frame(link.client, frame)

    async def _pause(self) -> None:
        if not self._unblocked.is_set():
            self.fired["block"] += 1
            await self._unblocked.wait()

    def _take(self, name: str, api: int) -> _Plan | None:
        """Return the fault that fires now, if one does, and count it."""
        for plan in self._plans[api]:
            if plan.name != name or not plan.times:
                continue
            if plan.skip:
                plan.skip -= 1
                return None
            plan.times -= 1
            self.fired[name.split(maxsplit=1)[0]] += 1
            return plan
        return None


@dataclass
class _Plan:
    name: str
    times: int
    skip: int
    seconds: float = 0.0
    hang: bool = False


class _Link:
    """One client's connection and the broker's connection for it."""

    def __init__(self, client: StreamWriter, broker: StreamWriter) -> None:
        self.client, self.broker = client, broker
        self.kinds: dict[bytes, int] = {}  # of requests without a reply yet, by correlation id
        self.hangs = False

    def abort(self) -> None:
        self.client.transport.abort()
        self.broker.transport.abort()


async def _read_frame(reader: StreamReader) -> bytes:
    """Return a frame without its length; EOFError is the end of the connection."""
    length = _signed(await reader.readexactly(_LENGTH_BYTES))
    return await reader.readexactly(length)


async def _write_frame(writer: StreamWriter, frame: bytes) -> None:
    writer.write(len(frame).to_bytes(_LENGTH_BYTES, "big"))
    writer.write(frame)
    await writer.drain()


async def _close(writer: StreamWriter) -> None:
    """Close after what was written has gone; at once where the peer does not take it."""
    writer.close()
    with suppress(OSError):  # reset by the peer
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await writer.wait_closed()
        except TimeoutError:
            writer.transport.abort()


def _signed(number: bytes) -> int:
    return int.from_bytes(number, "big", signed=True)
