"""A consumer that is not blueflow's: it says what came over the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from libipld import decode_dag_cbor_multi
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blueflow.testing.relay import SimulatedRelay

PATIENCE_S = 15


class Heard:
    """The messages of one connection, and how it ended."""

    def __init__(self) -> None:
        self.messages: list[Any] = []  # bytes, or str for a text message
        self.closed: tuple[int, str] | None = None

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the messages that are frames of op 1 with a seq."""
        return [body for header, body in self.frames if header["op"] == 1 and "seq" in body]

    @property
    def frames(self) -> list[list[dict[str, Any]]]:
        """Header and body of the messages that can be decoded."""
        found = []
        for message in self.messages:
            try:
                parts = decode_dag_cbor_multi(message)
            except (ValueError, TypeError):
                continue
            if len(parts) == 2:
                found.append(parts)
        return found

    @property
    def seqs(self) -> list[int]:
        """The seqs in the order they came."""
        return [body["seq"] for body in self.bodies]


async def _listen(
    relay: SimulatedRelay, *, cursor: int | None = None, messages: int | None = None
) -> Heard:
    """Listen until so many messages came, or the connection ended."""
    heard = Heard()
    query = "" if cursor is None else f"?cursor={cursor}"
    with anyio.fail_after(PATIENCE_S):
        # No bound on the queue: else closing has to wait until what it holds is read.
        async with connect(relay.stream_url + query, max_size=None, max_queue=None) as connection:
            try:
                while messages is None or len(heard.messages) < messages:
                    heard.messages.append(await connection.recv())
            except ConnectionClosed as closed:
                received = closed.rcvd
                heard.closed = (received.code, received.reason) if received else (1006, "")
    return heard


@pytest.fixture
def listen() -> Callable[..., Awaitable[Heard]]:
    """A consumer, to be awaited with a relay, and perhaps a cursor and a number of messages."""
    return _listen
