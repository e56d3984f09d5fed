"""One websocket connection to a relay: messages go into an inbox that is bounded by bytes.

The messages are taken where websockets has parsed them (`process_event`) instead of with `recv()`:
a task switch and a queue per message cost as much as decoding it. Handshake, TLS, proxies, pings
and the closing handshake stay the library's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import CloseCode, Frame, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from websockets.http11 import Request, Response  # noqa: F401 - the library's annotations

MESSAGE_OVERHEAD = 512  # what every message counts beyond its bytes: a flood of empty ones is one
WRITE_BYTES_MAX = 1024 * 1024  # we send pongs only; a peer that does not read them is no relay
MESSAGE_BYTES_MAX = 8 * 1024 * 1024  # above the spec's 5 MB, so that such a frame is judged
FRAGMENTS_MAX = 10_000  # of one message; the library bounds their bytes
_DATA = (Opcode.BINARY, Opcode.TEXT, Opcode.CONT)


class Inbox:
    """Messages received and not yet taken, in order. Reading pauses above the budget."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self.received = 0  # messages on the current connection
        self._paused_s = 0.0
        self._messages: deque[bytes | str] = deque()
        self._open = True
        self._arrived = asyncio.Event()
        self._transport: asyncio.ReadTransport | None = None
        self._paused_at: float | None = None

    @property
    def paused(self) -> bool:
        """Whether reading waits for the consumer."""
        return self._paused_at is not None

    @property
    def paused_s(self) -> float:
        """How long reading has waited in all, up to now."""
        now = 0.0 if self._paused_at is None else time.monotonic() - self._paused_at
        return self._paused_s + now

    def attach(self, transport: asyncio.ReadTransport) -> None:
        """Take messages of a new connection; what is left of the old one was given up."""
        self.clear()
        self._open = False
        self._transport = transport
        self.received = 0

    def open(self) -> None:
        """Let messages be taken: their connection is known, so it can be dropped for them."""
        self._open = True
        if self._messages:
            self._arrived.set()

    def put(self, message: bytes | str) -> None:
        """Add a message; the one that exceeds the budget is still taken."""
        self._messages.append(message)
        self.bytes += _size(message)
        self.received += 1
        if self._open:
            self._arrived.set()
        if self.bytes > self.bytes_max and self._paused_at is None and self._transport:
            self._transport.pause_reading()
            self._paused_at = time.monotonic()

    def take(self, bytes_max: int) -> list[bytes | str]:
        """Return messages of up to `bytes_max` bytes, at least one if there is any."""
        taken: list[bytes | str] = []
        if not self._open:
            return taken
        size = 0
        messages = self._messages
        while messages and size < bytes_max:
            message = messages.popleft()
            size += _size(message)
            taken.append(message)
        self.bytes -= size
        if not messages:
            self._arrived.clear()
        if self._paused_at is not None and self.bytes <= self.bytes_max // 2:
            self._resume()
        return taken

    def clear(self) -> None:
        """Give up everything: it is behind the cursor and will come again."""
        self._messages.clear()
        self.bytes = 0
        self._arrived.clear()
        self._resume()

    def wake(self) -> None:
        """Let a waiting consumer look again."""
        self._arrived.set()

    async def wait(self) -> None:
        """Return when there may be something to take."""
        await self._arrived.wait()
        if not self._messages or not self._open:
            self._arrived.clear()

    def _resume(self) -> None:
        if self._paused_at is not None:
            self._paused_s += time.monotonic() - self._paused_at
            self._paused_at = None
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()


class RelayConnection(ClientConnection):
    """A websocket whose messages land in an `Inbox`."""

    def __init__(self, *args: Any, inbox: Inbox, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inbox: Inbox | None = inbox
        self._fragments: list[Frame] = []
        self.too_big = False  # it sent more fragments of one message than anybody needs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to fill the inbox; websockets calls it when the transport is there."""
        super().connection_made(transport)
        if self._inbox is not None and isinstance(transport, asyncio.Transport):
            self._inbox.attach(transport)

    def process_event(self, event: Any) -> None:
        """Take data frames; websockets calls it for whatever it has parsed."""
        if type(event) is not Frame or event.opcode not in _DATA:
            super().process_event(event)  # the handshake's answer, pings and pongs, the close
            return
        if self._inbox is None:
            return
        if event.fin and not self._fragments:
            self._inbox.put(_message(event.opcode, bytes(event.data)))
            return
        self._fragments.append(event)
        if len(self._fragments) > FRAGMENTS_MAX:
            self.too_big = True
            self._inbox = None  # what is in it is whole and in order, and stays
            self.transport.abort()
            return
        if event.fin:
            data = b"".join(bytes(part.data) for part in self._fragments)
            opcode = self._fragments[0].opcode
            self._fragments.clear()
            self._inbox.put(_message(opcode, data))

    @property
    def refused_message(self) -> bool:
        """Whether we ended it over a message above the bounds; 1009 from them is no such thing."""
        sent = self.protocol.close_sent
        ours = sent is not None and sent.code == CloseCode.MESSAGE_TOO_BIG
        return self.too_big or (ours and not self.protocol.close_rcvd_then_sent)

    @property
    def end_code(self) -> int | None:
        """The close code that says why it ended: ours when we refused a message, else theirs."""
        return CloseCode.MESSAGE_TOO_BIG if self.refused_message else self.close_code

    def abandon(self) -> None:
        """Drop the connection at once, without a closing handshake, and forget its messages."""
        if self._inbox is not None:
            self._inbox.clear()
            self._inbox = None
        self.transport.abort()


def opener(url: str, inbox: Inbox, *, open_timeout_s: float, user_agent: str) -> connect:
    """Return what opens one connection when awaited; redirects and proxies are the library's."""

    def make(*args: Any, **kwargs: Any) -> ClientConnection:
        return RelayConnection(*args, inbox=inbox, **kwargs)

    factory: Callable[..., ClientConnection] = make
    return connect(
        url,
        create_connection=factory,  # type: ignore[arg-type]
        compression=None,  # a relay's frames do not compress, and the attempt costs both sides
        max_size=MESSAGE_BYTES_MAX,
        open_timeout=open_timeout_s,
        close_timeout=2,
        ping_interval=None,  # the watchdog pings: it knows when we do not read
        user_agent_header=user_agent,
    )


def _size(message: bytes | str) -> int:
    return MESSAGE_OVERHEAD + len(message if isinstance(message, bytes) else message.encode())


def _message(opcode: Opcode, data: bytes) -> bytes | str:
    return data if opcode is Opcode.BINARY else data.decode(errors="replace")
