"""The proxy passes requests on unchanged, and refuses, loses and holds those it is told to."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

import pytest

from blueflow.testing.s3proxy import Operation, S3Proxy, operation_of

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import AsyncIterator

PATIENCE_S = 10
MOMENT_S = 0.05  # within which nothing comes where nothing should
END = b"\r\n\r\n"
REQUESTS = [
    ("PUT", "/lake/a/b.json?x-id=PutObject", True, Operation.PUT_NEW),
    ("PUT", "/lake/a", False, Operation.PUT_OBJECT),
    ("POST", "/lake/a?uploads", False, Operation.CREATE_UPLOAD),
    ("POST", "/lake/a?uploads=", False, Operation.CREATE_UPLOAD),
    ("PUT", "/lake/a?partNumber=2&uploadId=x%3D&x-id=UploadPart", False, Operation.UPLOAD_PART),
    ("POST", "/lake/a?uploadId=x", False, Operation.COMPLETE_UPLOAD),
    ("DELETE", "/lake/a?uploadId=x", False, Operation.ABORT_UPLOAD),
    ("GET", "/lake?uploads&prefix=a", False, Operation.LIST_UPLOADS),
    ("GET", "/lake/a%20b", False, Operation.GET_OBJECT),
    ("HEAD", "/lake/a", False, Operation.HEAD_OBJECT),
    ("DELETE", "/lake/a", False, Operation.DELETE_OBJECT),
    ("POST", "/lake?delete", False, Operation.DELETE_OBJECTS),
    ("GET", "/lake?list-type=2&prefix=a%2Fb", False, Operation.LIST_OBJECTS),
    ("GET", "/lake/?list-type=2", False, Operation.LIST_OBJECTS),
    ("HEAD", "/lake", False, Operation.HEAD_BUCKET),
    ("PUT", "/lake", False, Operation.CREATE_BUCKET),
    ("GET", "/", False, Operation.OTHER),
    ("PATCH", "/lake/a", False, Operation.OTHER),
]


@pytest.mark.parametrize(("method", "target", "conditional", "operation"), REQUESTS)
def test_requests_are_told_apart(
    method: str, target: str, *, conditional: bool, operation: Operation
) -> None:
    assert operation_of(method, target, conditional=conditional) is operation


class EchoServer:
    """Answers each request with what it got, in `framing`; a HEAD without the body."""

    def __init__(self, framing: str = "length") -> None:
        self.requests: list[bytes] = []
        self.arrived = asyncio.Event()
        self.framing = framing
        self._writers: list[StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._writers.append(writer)
        with suppress(EOFError, OSError):
            while True:
                head = await reader.readuntil(END)
                if b"Expect" in head:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
                request = head + await reader.readexactly(int(length or 0))
                self.requests.append(request)
                self.arrived.set()
                writer.write(b"HTTP/1.1 200 OK\r\n" + self._framed(request))
                await writer.drain()
                if self.framing == "end":
                    writer.close()
                    break

    def _framed(self, request: bytes) -> bytes:
        if request.startswith(b"HEAD"):
            return b"Content-Length: 99" + END
        if self.framing == "chunks":
            half = len(request) // 2
            pieces = (request[:half], request[half:], b"")
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            return b"Transfer-Encoding: chunked" + END + chunks
        if self.framing == "end":
            return b"Connection: close" + END + request
        return b"Content-Length: %d" % len(request) + END + request


class Client:
    """One connection of a client of S3."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, method: str, target: str, body: bytes = b"", *more: str) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", "Host: signed:1", *more]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
        request = head.encode() + END + body
        self._writer.write(request)
        return request

    async def receive(self, end: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(end)

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readexactly(size)

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.read()

    async def ask(self, method: str, target: str, body: bytes = b"") -> None:
        request = self.send(method, target, body)
        assert (await self.receive(request)).startswith(b"HTTP/1.1 200 OK\r\n")

    async def hears_nothing(self) -> bool:
        try:
            async with asyncio.timeout(MOMENT_S):
                return not await self._reader.read(1) and False
        except TimeoutError:
            return True

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


@asynccontextmanager
async def connected(proxy: S3Proxy) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def proxied(framing: str = "length") -> AsyncIterator[tuple[S3Proxy, EchoServer, Client]]:
    async with (
        EchoServer(framing) as server,
        S3Proxy(server.address) as proxy,
        connected(proxy) as client,
    ):
        yield proxy, server, client


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_what_passes_is_unchanged_and_the_connection_stays(framing: str) -> None:
    async with proxied(framing) as (proxy, server, client):
        for body in (b"", b"x", b"\r\n" * 100_000):
            request = client.send("PUT", "/lake/a%20b?x-id=PutObject", body)
            expected = b"HTTP/1.1 200 OK\r\n" + server._framed(request)
            assert await client.read(len(expected)) == expected
            assert server.requests.pop() == request
        assert proxy.count(Operation.PUT_OBJECT) == 3
        assert not proxy.fired


async def test_a_reply_that_ends_with_its_connection_is_passed_on() -> None:
    async with proxied("end") as (_, _, client):
        request = client.send("GET", "/lake/a")
        assert (await client.rest()).endswith(END + request)


async def test_a_reply_to_head_has_no_body() -> None:
    async with proxied() as (_, _, client):
        for _ in range(2):
            client.send("HEAD", "/lake/a")
            assert await client.receive(END) == b"HTTP/1.1 200 OK\r\nContent-Length: 99" + END


async def test_a_client_that_asks_before_it_sends_a_body_may_send_it() -> None:
    async with proxied() as (_, _, client):
        request = client.send("PUT", "/lake/a", b"body", "Expect: 100-continue")
        reply = await client.receive(request)
        assert reply.count(b"100 Continue") == 1
        assert reply.count(b"HTTP/1.1 200 OK") == 1


async def test_chunks_of_a_client_are_passed_on() -> None:
    async with proxied() as (_, server, client):
        chunks = b"3\r\nabc\r\n0\r\nTrailer: 1\r\n\r\n"
        client._writer.write(b"PUT /lake/a HTTP/1.1\r\nTransfer-Encoding: chunked" + END + chunks)
        await client.receive(b"chunked" + END)
        assert server.requests[0].endswith(b"chunked" + END)  # it reads no chunks itself


async def test_refused_requests_do_not_arrive_and_the_next_ones_do() -> None:
    async with proxied() as (proxy, server, client):
        proxy.refuse(Operation.PUT_NEW, times=2, skip=1, key="/logs/")
        for target in ("/lake/hours/1", "/lake/logs/1"):  # another key, and the one to skip
            request = client.send("PUT", target, b"", "If-None-Match: *")
            await client.receive(request)
        for _ in range(2):
            client.send("PUT", "/lake/logs/2", b"body", "If-None-Match: *")
            reply = await client.receive(b"</Error>")
            assert reply.startswith(b"HTTP/1.1 503 ")
            assert b"<Code>SlowDown</Code>" in reply
        await client.ask("PUT", "/lake/logs/2")
        assert len(server.requests) == 3
        assert proxy.fired == {"refuse": 2}


async def test_a_refused_head_has_no_body_and_any_status_may_be_chosen() -> None:
    async with proxied() as (proxy, _, client):
        proxy.refuse(Operation.HEAD_OBJECT, 500, "InternalError")
        client.send("HEAD", "/lake/a")
        assert (await client.receive(END)).startswith(b"HTTP/1.1 500 ")
        await client.ask("GET", "/lake/a")


async def test_a_lost_request_does_not_arrive_and_a_lost_reply_had_its_effect() -> None:
    async with proxied() as (proxy, server, client):
        proxy.lose_request(Operation.COMPLETE_UPLOAD)
        proxy.lose_reply(Operation.COMPLETE_UPLOAD)
        client.send("POST", "/lake/a?uploadId=1")
        assert await client.rest() == b""
        assert not server.requests
        async with connected(proxy) as second:
            second.send("POST", "/lake/a?uploadId=1")
            assert await second.rest() == b""
            assert len(server.requests) == 1
        async with connected(proxy) as third:
            await third.ask("POST", "/lake/a?uploadId=1")
        assert proxy.fired == {"lose_request": 1, "lose_reply": 1}


async def test_a_lost_reply_may_leave_the_connection_open() -> None:
    async with proxied() as (proxy, server, client):
        proxy.lose_reply(Operation.GET_OBJECT, then="hang")
        client.send("GET", "/lake/a")
        await server.arrived.wait()
        assert await client.hears_nothing()
        assert proxy.fired == {"lose_reply": 1}


async def test_half_of_a_reply_may_be_lost() -> None:
    async with proxied() as (proxy, server, client):
        proxy.lose_reply(Operation.GET_OBJECT, then="half")
        request = client.send("GET", "/lake/a")
        whole = b"HTTP/1.1 200 OK\r\n" + server._framed(request)
        assert await client.rest() == whole[: len(whole) // 2]
        assert proxy.fired == {"lose_reply": 1}


async def test_a_delayed_request_arrives_after_its_client_has_gone() -> None:
    async with proxied() as (proxy, server, client):
        proxy.delay(Operation.PUT_NEW, 2 * MOMENT_S, of="request")
        request = client.send("PUT", "/lake/a", b"late", "If-None-Match: *")
        assert await client.hears_nothing()
        assert not server.requests
        await client.close()
        async with asyncio.timeout(PATIENCE_S):
            await server.arrived.wait()
        assert server.requests == [request]
        assert proxy.fired == {"delay": 1}


async def test_a_delayed_reply_comes_late() -> None:
    async with proxied() as (proxy, server, client):
        proxy.delay(Operation.GET_OBJECT, 2 * MOMENT_S)
        request = client.send("GET", "/lake/a")
        await server.arrived.wait()
        assert await client.hears_nothing()
        await client.receive(request)
        assert proxy.fired == {"delay": 1}


async def test_a_silent_peer_takes_connections_and_passes_on_when_it_speaks_again() -> None:
    async with proxied() as (proxy, server, client):
        proxy.block()
        request = client.send("GET", "/lake/a")
        assert await client.hears_nothing()
        assert not server.requests
        proxy.unblock()
        await client.receive(request)
        assert proxy.fired == {"block": 1}


async def test_connections_are_cut_and_new_ones_work() -> None:
    async with proxied() as (proxy, _, client):
        await client.ask("GET", "/lake/a")
        proxy.cut()
        with suppress(ConnectionResetError):
            assert await client.rest() == b""
        assert proxy.fired == {"cut": 1}
        async with connected(proxy) as second:
            await second.ask("GET", "/lake/a")


async def test_without_a_server_the_connection_closes() -> None:
    async with EchoServer() as server:
        address = server.address
    async with S3Proxy(address) as proxy, connected(proxy) as client:
        client.send("GET", "/lake/a")
        assert await client.rest() == b""
    await proxy.stop()  # once more is fine
