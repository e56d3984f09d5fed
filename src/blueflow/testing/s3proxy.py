"""A proxy between an S3 client and its server that refuses, loses, delays and holds what passes.

It passes bytes on as they are, the `Host` header too: clients sign it, and a server checks what it
gets. So nothing but the client's endpoint has to be told.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from types import TracebackType
    from typing import Literal, Self

_CLOSE_TIMEOUT_S = 1.0
_HEAD_BYTES_MAX = 1024 * 1024
_END = b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_INTERIM = range(100, 200)
_WITHOUT_BODY = frozenset({204, 304})


class Operation(StrEnum):
    """What a request asks for, by the names of the S3 API."""

    PUT_NEW = "PutObject with If-None-Match"
    PUT_OBJECT = "PutObject"
    CREATE_UPLOAD = "CreateMultipartUpload"
    UPLOAD_PART = "UploadPart"
    COMPLETE_UPLOAD = "CompleteMultipartUpload"
    ABORT_UPLOAD = "AbortMultipartUpload"
    LIST_UPLOADS = "ListMultipartUploads"
    GET_OBJECT = "GetObject"
    HEAD_OBJECT = "HeadObject"
    DELETE_OBJECT = "DeleteObject"
    DELETE_OBJECTS = "DeleteObjects"
    LIST_OBJECTS = "ListObjects"
    HEAD_BUCKET = "HeadBucket"
    CREATE_BUCKET = "CreateBucket"
    OTHER = "something else"


class S3Proxy:
    """Passes everything on, but for the faults it is asked for.

    A fault is planned for the next requests of a kind, whichever the connection, and fires once for
    each of `times`. A fault that did not happen proves nothing: assert on `fired`. A request, and a
    reply, is held in memory as a whole.

    Args:
        upstream: host:port where the server listens; nobody needs to listen there yet.
        port: where to listen, on 127.0.0.1; 0 takes a free one.
    """

    def __init__(self, upstream: str, port: int = 0) -> None:
        self.port = port
        self.fired: Counter[str] = Counter()  # by the name of the method that planned it
        self.upstream = upstream
        self._seen: Counter[Operation] = Counter()
        self._plans: list[_Plan] = []
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._server: asyncio.Server | None = None

    @property
    def endpoint(self) -> str:
        """The address for the client."""
        return f"http://127.0.0.1:{self.port}"

    def refuse(
        self,
        operation: Operation,
        status: int = 503,
        code: str = "SlowDown",
        *,
        times: int = 1,
        skip: int = 0,
        key: str = "",
    ) -> None:
        """Answer with an error in place of passing the request on: the server never sees it.

        Args:
            operation: the kind of request.
            status: of HTTP; completions may answer 200 and an error in the body.
            code: of S3, for the body; none without one.
            times: how many.
            skip: let so many pass first.
            key: what the address has to contain.
        """
        plan = _Plan("refuse", operation, times, skip, key, status=status, code=code)
        self._plans.append(plan)

    def lose_request(
        self,
        operation: Operation,
        *,
        times: int = 1,
        skip: int = 0,
        key: str = "",
        then: Literal["close", "hang"] = "close",
    ) -> None:
        """Do not pass the request on; `then` as for `lose_reply`.

        Args:
            operation: the kind of request.
            times: how many.
            skip: let so many pass first.
            key: what the address has to contain.
            then: what becomes of the connection.
        """
        plan = _Plan("lose_request", operation, times, skip, key, then=then)
        self._plans.append(plan)

    def lose_reply(
        self,
        operation: Operation,
        *,
        times: int = 1,
        skip: int = 0,
        key: str = "",
        then: Literal["close", "hang", "half"] = "close",
    ) -> None:
        """Drop the server's reply: the request had its effect, and the client does not learn it.

        Args:
            operation: the kind of request.
            times: how many.
            skip: let so many replies pass first.
            key: what the address has to contain.
            then: `hang` leaves the connection open and passes nothing on it any more; `half` passes
                a half of the reply and closes.
        """
        plan = _Plan("lose_reply", operation, times, skip, key, then=then)
        self._plans.append(plan)

    def delay(
        self,
        operation: Operation,
        seconds: float,
        *,
        times: int = 1,
        skip: int = 0,
        key: str = "",
        of: Literal["request", "reply"] = "reply",
    ) -> None:
        """Hold the request or its reply.

        A held request arrives even when its client has closed the connection in the meantime: so a
        writer that was given up writes after all.

        Args:
            operation: the kind of request.
            seconds: how long.
            times: how many.
            skip: let so many pass first.
            key: what the address has to contain.
            of: which of the two is late.
        """
        plan = _Plan(f"delay {of}", operation, times, skip, key, seconds=seconds)
        self._plans.append(plan)

    def block(self) -> None:
        """Be a silent peer: accept connections and bytes, pass nothing on in either direction."""
        self._unblocked.clear()

    def unblock(self) -> None:
        """Pass on what was held, also of clients that have gone."""
        self._unblocked.set()

    def forget(self) -> None:
        """Plan nothing any more."""
        self._plans.clear()

    def cut(self) -> None:
        """Reset every connection that is open now."""
        for link in self._links:
            self.fired["cut"] += 1
            link.abort()

    def count(self, operation: Operation) -> int:
        """Return how many requests of a kind clients sent."""
        return self._seen[operation]

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=_HEAD_BYTES_MAX
        )
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
        task = asyncio.get_running_loop().create_task(self._serve(_Link(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, link: _Link) -> None:
        """Serve one client until one side closes or a fault does."""
        self._links.add(link)
        try:
            with suppress(EOFError, OSError):  # the other side sees what it would without us
                while await self._exchange(link):
                    pass
            await self._unblocked.wait()  # a silent peer does not close either
        except asyncio.CancelledError:
            link.abort()
            raise
        finally:
            self._links.discard(link)
            await link.close()

    async def _exchange(self, link: _Link) -> bool:
        """Pass one request and its reply on; False: the connection is to be closed."""
        request = await _read_request(link)
        self._seen[request.operation] += 1
        await self._pause()
        if plan := self._take("refuse", request):
            await _write(link.writer, _refusal(plan, request))
            return True
        if plan := self._take("lose_request", request):
            await self._hang(link, plan)
            return False
        if plan := self._take("delay request", request):
            await asyncio.sleep(plan.seconds)
        reader, writer = await link.connect(self.upstream)
        await _write(writer, request.data)
        reply, last = await _read_reply(reader, request)
        await self._pause()
        if plan := self._take("lose_reply", request):
            if plan.then == "half":
                await _write(link.writer, reply[: len(reply) // 2])
            await self._hang(link, plan)
            return False
        if plan := self._take("delay reply", request):
            await asyncio.sleep(plan.seconds)
        await _write(link.writer, reply)
        return not last

    async def _pause(self) -> None:
        if not self._unblocked.is_set():
            self.fired["block"] += 1
            await self._unblocked.wait()

    async def _hang(self, link: _Link, plan: _Plan) -> None:
        if plan.then == "hang":
            while await link.reader.read(_HEAD_BYTES_MAX):  # until the client goes
                pass

    def _take(self, name: str, request: _Request) -> _Plan | None:
        """Return the fault that fires now, if one does, and count it."""
        for plan in self._plans:
            if not (plan.name == name and plan.times and plan.befalls(request)):
                continue
            if plan.skip:
                plan.skip -= 1
                return None
            plan.times -= 1
            self.fired[name.split(maxsplit=1)[0]] += 1
            return plan
        return None


def operation_of(method: str, target: str, *, conditional: bool) -> Operation:
    """Return what a request with path-style addresses asks for.

    Args:
        method: of HTTP.
        target: path and query.
        conditional: whether it has the header If-None-Match.
    """
    address = urlsplit(target)
    asked = {part.partition("=")[0] for part in address.query.split("&")}
    of_bucket = "/" not in address.path.strip("/")
    kinds: dict[str, Operation]
    if of_bucket:
        listed = Operation.LIST_UPLOADS if "uploads" in asked else Operation.LIST_OBJECTS
        kinds = {
            "GET": listed if address.path.strip("/") else Operation.OTHER,
            "HEAD": Operation.HEAD_BUCKET,
            "PUT": Operation.CREATE_BUCKET,
            "POST": Operation.DELETE_OBJECTS if "delete" in asked else Operation.OTHER,
        }
    elif "uploadId" in asked:
        kinds = {
            "PUT": Operation.UPLOAD_PART,
            "POST": Operation.COMPLETE_UPLOAD,
            "DELETE": Operation.ABORT_UPLOAD,
        }
    else:
        kinds = {
            "PUT": Operation.PUT_NEW if conditional else Operation.PUT_OBJECT,
            "POST": Operation.CREATE_UPLOAD if "uploads" in asked else Operation.OTHER,
            "GET": Operation.GET_OBJECT,
            "HEAD": Operation.HEAD_OBJECT,
            "DELETE": Operation.DELETE_OBJECT,
        }
    return kinds.get(method, Operation.OTHER)


class _Request(NamedTuple):
    operation: Operation
    address: str
    method: str
    data: bytes  # all of it


@dataclass
class _Plan:
    name: str
    operation: Operation
    times: int
    skip: int
    key: str
    status: int = 0
    code: str = ""
    then: str = "close"
    seconds: float = 0.0

    def befalls(self, request: _Request) -> bool:
        return request.operation is self.operation and self.key in request.address


class _Link:
    """One client's connection, and the server's for it once there is a request to pass on."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._server: tuple[StreamReader, StreamWriter] | None = None

    async def connect(self, upstream: str) -> tuple[StreamReader, StreamWriter]:
        if self._server is None:
            host, _, port = upstream.rpartition(":")
            self._server = await asyncio.open_connection(host, int(port), limit=_HEAD_BYTES_MAX)
        return self._server

    def abort(self) -> None:
        self.writer.transport.abort()
        if self._server is not None:
            self._server[1].transport.abort()

    async def close(self) -> None:
        writers = [self.writer, *([self._server[1]] if self._server else [])]
        for writer in writers:  # both, also when this is cancelled
            writer.close()
        await asyncio.gather(*map(_closed, writers))


class _Head:
    """The first line and the headers of a request or a reply."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        first, *lines = data.decode("latin-1").rstrip().split("\r\n")
        self.first = first.split(" ", 2)
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}


async def _read_request(link: _Link) -> _Request:
    """Return a request; EOFError is the end of the connection."""
    head = _Head(await link.reader.readuntil(_END))
    method, target, _ = head.first
    if "100-continue" in head.headers.get("expect", "").lower():
        await _write(link.writer, _CONTINUE)
    body = await _read_body(link.reader, head, until_end=False)
    operation = operation_of(method, target, conditional="if-none-match" in head.headers)
    return _Request(operation, unquote(urlsplit(target).path), method, head.data + body)


async def _read_reply(reader: StreamReader, request: _Request) -> tuple[bytes, bool]:
    """Return a reply, and whether the server closes after it."""
    head = _Head(await reader.readuntil(_END))
    while int(head.first[1]) in _INTERIM:  # the client was told by us already
        head = _Head(await reader.readuntil(_END))
    if request.method == "HEAD" or int(head.first[1]) in _WITHOUT_BODY:
        body = b""
    else:
        body = await _read_body(reader, head, until_end=True)
    framed = {"content-length", "transfer-encoding"} & head.headers.keys() or not body
    closes = head.headers.get("connection", "").lower() == "close" or head.first[0] == "HTTP/1.0"
    return head.data + body, closes or not framed


async def _read_body(reader: StreamReader, head: _Head, *, until_end: bool) -> bytes:
    """Return the body as it came, with what frames it."""
    if "chunked" in head.headers.get("transfer-encoding", "").lower():
        return await _read_chunks(reader)
    if (length := head.headers.get("content-length")) is not None:
        return await reader.readexactly(int(length))
    return await reader.read() if until_end else b""


async def _read_chunks(reader: StreamReader) -> bytes:
    body = bytearray()
    while True:
        line = await reader.readuntil(b"\r\n")
        body += line
        if not (size := int(line.split(b";")[0], 16)):
            break
        body += await reader.readexactly(size + len(b"\r\n"))
    while line != b"\r\n":  # trailers, and the empty line behind them
        line = await reader.readuntil(b"\r\n")
        body += line
    return bytes(body)


def _refusal(plan: _Plan, request: _Request) -> bytes:
    body = ""
    if plan.code:
        body = f"<Error><Code>{plan.code}</Code><Message>planned by the test</Message></Error>"
    head = (
        f"HTTP/1.1 {plan.status} planned\r\n"
        f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body * (request.method != "HEAD")).encode()


async def _write(writer: StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _closed(writer: StreamWriter) -> None:
    """Wait until what was written has gone; not for long where the peer does not take it."""
    with suppress(OSError):  # reset by the peer
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await writer.wait_closed()
        except TimeoutError:
            writer.transport.abort()
