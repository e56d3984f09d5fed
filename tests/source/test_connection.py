"""The inbox against a model, and our use of websockets against a real server on loopback."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from blueflow.source.connection import (
    FRAGMENTS_MAX,
    MESSAGE_BYTES_MAX,
    MESSAGE_OVERHEAD,
    Inbox,
    RelayConnection,
    opener,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BUDGET = 4 * MESSAGE_OVERHEAD
MIB = 1024 * 1024


class TransportDouble:
    """As strict as asyncio's: it is not paused or resumed twice in a row, nor when it is closed."""

    def __init__(self) -> None:
        self.reading = True
        self.closing = False

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.closing
        assert not self.reading
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing


class InboxMachine(RuleBasedStateMachine):
    """Nothing is lost or reordered, and reading stops above the budget and goes on at the half."""

    @initialize()
    def begin(self) -> None:
        self.inbox = Inbox(BUDGET)
        self.waiting: deque[bytes | str] = deque()
        self.number = 0
        self.connect()

    def connect(self) -> None:
        self.transport = TransportDouble()
        self.inbox.attach(self.transport)  # type: ignore[arg-type]
        self.inbox.open()
        self.waiting.clear()
        self.received = 0

    @precondition(lambda self: self.transport.reading)
    @rule(size=st.integers(0, BUDGET * 2), text=st.booleans())
    def arrive(self, size: int, *, text: bool) -> None:
        self.number += 1
        self.received += 1
        message = str(self.number).ljust(size, "\N{SNOWMAN}" if text else "x")
        self.waiting.append(message if text else message.encode())
        self.inbox.put(self.waiting[-1])

    @rule(bytes_max=st.integers(1, BUDGET))
    def take(self, bytes_max: int) -> None:
        taken = self.inbox.take(bytes_max)
        due = [self.waiting.popleft() for _ in taken]
        assert taken == due
        assert not self.waiting or sum(map(size_of, taken)) >= bytes_max
        assert sum(map(size_of, taken[:-1])) < bytes_max

    @rule()
    def wake(self) -> None:
        self.inbox.wake()

    @rule()
    def give_up(self) -> None:
        self.inbox.clear()
        self.waiting.clear()

    @rule()
    def reconnect(self) -> None:
        self.transport.closing = True
        self.connect()

    @invariant()
    def it_knows_what_it_holds(self) -> None:
        assert self.inbox.bytes == sum(map(size_of, self.waiting))
        assert self.inbox.received == self.received

    @invariant()
    def it_reads_within_the_budget(self) -> None:
        assert self.inbox.paused is not self.transport.reading
        if self.inbox.bytes > BUDGET:
            assert self.inbox.paused
        if self.inbox.bytes <= BUDGET // 2:
            assert not self.inbox.paused
        if len(self.waiting) > 1 and not self.inbox.paused:
            assert self.inbox.bytes <= BUDGET

    @invariant()
    def a_consumer_never_sleeps_beside_a_message(self) -> None:
        assert not self.waiting or self.inbox._arrived.is_set()


def size_of(message: bytes | str) -> int:
    data = message if isinstance(message, bytes) else message.encode()
    return MESSAGE_OVERHEAD + len(data)


TestInbox = InboxMachine.TestCase
TestInbox.settings = settings(stateful_step_count=30)


def test_the_time_not_reading_adds_up() -> None:
    inbox, transport = Inbox(MESSAGE_OVERHEAD + 10), TransportDouble()
    inbox.attach(transport)  # type: ignore[arg-type]
    inbox.open()
    assert inbox.paused_s == 0
    for _ in range(2):
        before_s = inbox.paused_s
        inbox.put(bytes(11))
        assert inbox.paused
        inbox.take(1)
        assert inbox.paused_s > before_s


async def test_a_waiting_consumer_is_woken_by_a_message_and_by_hand() -> None:
    inbox = Inbox(10)
    for wake in (inbox.wake, lambda: inbox.put(b"x")):
        waiting = asyncio.ensure_future(inbox.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        wake()
        await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(inbox.wait(), 5)  # the message is still there
    inbox.take(1)
    waiting = asyncio.ensure_future(inbox.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


# From here on: what we take from websockets. `process_event` is no public name of the library's
# asyncio client, so an update that renames it, or feeds it otherwise, has to fail here.


def test_websockets_still_has_what_we_override() -> None:
    assert callable(ClientConnection.process_event)
    assert callable(ClientConnection.connection_made)
    assert {Opcode.TEXT, Opcode.BINARY, Opcode.CONT} <= set(Opcode)
    assert {"opcode", "data", "fin"} <= set(Frame.__dataclass_fields__)


@asynccontextmanager
async def served(
    send: Callable[[ServerConnection], Awaitable[None]], bytes_max: int = 32 * MIB
) -> AsyncIterator[tuple[RelayConnection, Inbox]]:
    """Give the client's side of a connection to a server that runs `send`."""

    async def handler(connection: ServerConnection) -> None:
        with anyio.move_on_after(20):
            with suppress(ConnectionClosed):
                await send(connection)

    async with serve(handler, "127.0.0.1", 0, compression=None) as server:
        port = server.sockets[0].getsockname()[1]
        inbox = Inbox(bytes_max)
        how = opener(f"ws://127.0.0.1:{port}/", inbox, open_timeout_s=10, user_agent="blueflow/t")
        connection = await how
        assert isinstance(connection, RelayConnection)
        assert inbox.take(1) == []  # nothing is handed out before somebody can drop its connection
        inbox.open()
        try:
            yield connection, inbox
        finally:
            connection.abandon()
            await connection.wait_closed()


async def paused(inbox: Inbox) -> None:
    with anyio.fail_after(20):
        while not inbox.paused:
            await asyncio.sleep(0.01)


async def test_messages_land_in_the_inbox_in_order_and_whole() -> None:
    sent = [bytes([n % 256]) * (n * n) for n in range(200)]

    async def send(server: ServerConnection) -> None:
        for message in sent:
            await server.send(message)

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert inbox.received == len(sent)
        assert inbox.take(MIB * 100) == sent
        assert connection.end_code == 1000


async def test_fragments_are_joined_and_text_is_text() -> None:
    async def send(server: ServerConnection) -> None:
        await server.send(b"whole")
        await server.send([b"frag", b"", b"men", b"ted"])
        await server.send("te\N{SNOWMAN}xt")
        await server.send(["frag", "ments \N{SNOWMAN}", " of text"])
        await server.send(b"")
        await server.send(b"last")

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert inbox.take(MIB) == [
            b"whole", b"fragmented", "te\N{SNOWMAN}xt", "fragments \N{SNOWMAN} of text",
            b"", b"last",
        ]  # fmt: skip


async def test_text_that_is_no_text_does_not_end_the_connection() -> None:
    async def send(server: ServerConnection) -> None:
        server.protocol.send_text(b"\xff\xfe")
        server.send_data()
        await server.send(b"after")

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert inbox.take(MIB) == ["\N{REPLACEMENT CHARACTER}" * 2, b"after"]


async def test_a_ping_between_fragments_is_answered() -> None:
    async def send(server: ServerConnection) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one "
            await (await server.ping())  # the client answers in the middle of the message
            yield b"message"

        await server.send(parts())

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert inbox.take(MIB) == [b"one message"]


async def test_our_pings_get_their_pongs() -> None:
    async with served(lambda server: server.wait_closed()) as (connection, _):
        await asyncio.wait_for(await connection.ping(), 10)


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012, 1013, 4000])
async def test_the_servers_close_code_is_the_end_code(code: int) -> None:
    async with served(lambda server: server.close(code, "because")) as (connection, _):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert connection.end_code == code
        assert connection.close_reason == "because"


async def test_a_lost_connection_has_the_code_for_it() -> None:
    async def lose(server: ServerConnection) -> None:
        server.transport.abort()

    async with served(lose) as (connection, _):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert connection.end_code in {None, 1006}


@pytest.mark.parametrize("fragmented", [False, True])
async def test_a_message_above_the_limit_is_refused_by_us(*, fragmented: bool) -> None:
    async def send(server: ServerConnection) -> None:
        await server.send(bytes(MESSAGE_BYTES_MAX))
        half = bytes(MESSAGE_BYTES_MAX // 2 + 1)
        await server.send([half, half] if fragmented else half * 2)

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert connection.end_code == 1009
        assert [len(message) for message in inbox.take(100 * MIB)] == [MESSAGE_BYTES_MAX]


async def test_a_full_inbox_makes_the_server_wait_and_loses_nothing() -> None:
    message, number = bytes(100_000), 300
    sent = 0

    async def send(server: ServerConnection) -> None:
        nonlocal sent
        for index in range(number):
            await server.send(index.to_bytes(4, "big") + message)
            sent += 1

    async with served(send, bytes_max=MIB) as (connection, inbox):
        await paused(inbox)
        assert inbox.bytes < MIB + 512 * 1024  # what one read of the socket may bring on top
        assert sent < number
        taken: list[Any] = []
        with anyio.fail_after(20):
            while len(taken) < number:
                await inbox.wait()
                taken += inbox.take(256 * 1024)
        assert [int.from_bytes(one[:4], "big") for one in taken] == list(range(number))
        await asyncio.wait_for(connection.wait_closed(), 10)
    assert inbox.paused_s > 0


async def test_an_abandoned_connection_gives_nothing_more() -> None:
    async def send(server: ServerConnection) -> None:
        while True:
            await server.send(b"x" * 1000)

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(inbox.wait(), 10)
        connection.abandon()
        assert inbox.bytes == 0
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert inbox.take(MIB) == []


async def test_abandoning_while_reading_is_paused_is_clean() -> None:
    async def send(server: ServerConnection) -> None:
        while True:
            await server.send(bytes(100_000))

    async with served(send, bytes_max=MIB) as (connection, inbox):
        await paused(inbox)
        connection.abandon()
        assert not inbox.paused
        await asyncio.wait_for(connection.wait_closed(), 10)


async def test_empty_fragments_without_end_end_the_connection() -> None:
    async def send(server: ServerConnection) -> None:
        start = Frame(Opcode.BINARY, b"", fin=False).serialize(mask=False)
        more = Frame(Opcode.CONT, b"", fin=False).serialize(mask=False)
        server.transport.write(start + more * 2 * FRAGMENTS_MAX)
        await server.wait_closed()

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert connection.end_code == 1009
        assert not inbox.take(1)


async def test_what_came_before_too_many_fragments_is_kept() -> None:
    async def send(server: ServerConnection) -> None:
        good = b"".join(Frame(Opcode.BINARY, bytes([n])).serialize(mask=False) for n in range(30))
        start = Frame(Opcode.BINARY, b"", fin=False).serialize(mask=False)
        more = Frame(Opcode.CONT, b"", fin=False).serialize(mask=False)
        server.transport.write(good + start + more * 2 * FRAGMENTS_MAX)
        await server.wait_closed()

    async with served(send) as (connection, inbox):
        await asyncio.wait_for(connection.wait_closed(), 10)
        assert connection.end_code == 1009
        assert inbox.take(MIB) == [bytes([n]) for n in range(30)]


async def test_a_flood_of_empty_messages_makes_the_server_wait() -> None:
    async def send(server: ServerConnection) -> None:
        empty = Frame(Opcode.BINARY, b"").serialize(mask=False)
        while not server.transport.is_closing():
            server.transport.write(empty * 10_000)
            await server.drain()
            await asyncio.sleep(0)

    async with served(send, bytes_max=MIB) as (connection, inbox):
        await paused(inbox)
        assert len(inbox.take(100 * MIB)) < 150_000  # one read of the socket on top of the budget
        connection.abandon()
