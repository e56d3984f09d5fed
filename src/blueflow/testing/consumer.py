"""One consumer of a simulated relay: what it is sent, and the faults that befall its connection."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from websockets.exceptions import ConnectionClosed
from websockets.protocol import OPEN

from blueflow.testing.frames import encode_error, encode_info, websocket_message
from blueflow.testing.ledger import Fired
from blueflow.testing.spoil import spoil_message, unknown_op

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection

    from blueflow.testing.faultplan import Fault
    from blueflow.testing.relay import SimulatedRelay

CHUNK_BYTES = 256 * 1024  # some 45 frames per write: a write costs as much as stamping ten
_POLICY_VIOLATION = 1008
_INSTEAD = ("garbage", "truncated", "oversize", "text")


class Consumer:
    """Sends the log from an event on, until either side ends the connection.

    Args:
        event: the next one to send.
    """

    def __init__(self, relay: SimulatedRelay, connection: ServerConnection, event: int) -> None:
        self.event = event
        self.connection = connection
        self.stuck = False  # it stalls on purpose: nobody waits for it
        self._relay = relay
        self._log, self._plan = relay.log, relay.faults
        self._wire_events = self._plan.wire_events()
        self._sending = anyio.CancelScope()
        self._too_slow = False

    @property
    def lag(self) -> int:
        """How many issued events were not handed to its connection."""
        return self._log.end - self.event

    def kick(self) -> None:
        """Stop sending, tell it that it is too slow, and close."""
        self._too_slow = True
        self._sending.cancel()

    async def run(self) -> None:
        """Serve the consumer."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen, tasks.cancel_scope)
            with self._sending, suppress(ConnectionError):  # the latter: it has gone
                await self._send_all()
            if self._too_slow:
                self._relay.stats.kicked += 1
                await self._refuse("ConsumerTooSlow", "you are too far behind")
            tasks.cancel_scope.cancel()

    async def _listen(self, scope: anyio.CancelScope) -> None:
        try:
            async for _ in self.connection:  # consumers say nothing; this answers pings and close
                pass
        except ConnectionClosed:
            pass
        scope.cancel()

    async def _send_all(self) -> None:
        log = self._log
        while self.connection.state is OPEN and not self._too_slow:
            if self.event >= log.end:
                await self._relay.wait_for(self.event)
                continue
            if self.event < log.start:  # it fell out of the retention
                self.kick()
                return
            fault = self._plan.next_wire(self.event)
            if fault is not None and fault.kind == "reorder" and self.event + 1 == log.end:
                if not self._relay.ended:  # its successor is on its way
                    await self._relay.wait_for(self.event + 1)
                    continue
                fault = None  # the last event of all has none: the fault stays unfired
            if fault is None:
                await self._send_plain()
                continue
            self._plan.take_wire(self.event)
            await self._suffer(fault)

    async def _send_plain(self) -> None:
        event, log = self.event, self._log
        end = log.next_special(event)
        faults = log.special.get(event)
        if faults:
            end = event + 1
            for fault in faults:
                self._note(fault)
        for wire_event in self._wire_events:
            if event < wire_event < end:
                end = wire_event
                break
        data, self.event = log.read(event, end, CHUNK_BYTES)
        await self._write(data, self.event - event)

    async def _write(self, data: bytes, events: int = 0) -> None:
        # Straight to the transport: the library's send() costs 20 us a message, and needs nothing
        # here, as messages are whole, unmasked and not compressed.
        connection = self.connection
        if connection.state is not OPEN:
            return
        connection.transport.write(data)
        stats = self._relay.stats
        stats.sent_events += events
        stats.sent_bytes += len(data)
        await connection.drain()
        await self._relay.sent()

    async def _suffer(self, fault: Fault) -> None:
        self._note(fault)
        kind, log, event = fault.kind, self._log, self.event
        if kind in _INSTEAD:
            number = fault.number if kind == "oversize" else 0
            await self._write(spoil_message(kind, log.frame(event), event, number))
            self.event += 1
        elif kind == "duplicate":
            data, _ = log.read(event, event + 1, 1)
            await self._write(data, 1)
        elif kind == "reorder":
            await self._reorder(event)
        elif kind == "info":
            await self._write(websocket_message(encode_info(fault.argument, "a remark")))
        elif kind == "unknown-op":
            await self._write(websocket_message(unknown_op(int(fault.number))))
        elif kind == "slow":
            self.kick()
        elif kind == "error":
            await self._refuse(fault.argument, "as the plan wants")
        elif kind == "close":
            await self._close(int(fault.number))
        else:
            await self._hang(fault)

    async def _reorder(self, event: int) -> None:
        behind, _ = self._log.read(event, event + 1, 1)
        first, self.event = self._log.read(event + 1, event + 2, 1)
        await self._write(first + behind, 2)

    async def _hang(self, fault: Fault) -> None:
        self.stuck = True  # else a relay that runs flat out would wait for it
        await self._relay.sent()
        half_open = fault.kind == "half-open"
        transport = self.connection.transport
        if half_open:
            transport.pause_reading()  # pings and close frames stay unread
        await anyio.sleep(fault.number)
        if half_open:
            transport.abort()
        self.stuck = False

    async def _close(self, code: int) -> None:
        if code == 1006:  # noqa: PLR2004 - it stands for a connection that just ends
            self.connection.transport.abort()
        else:
            await self.connection.close(code, "as the plan wants")

    async def _refuse(self, name: str, message: str) -> None:
        # No drain: a consumer that is too slow does not read, and closing has its own bound.
        if self.connection.state is OPEN:
            self.connection.transport.write(websocket_message(encode_error(name, message)))
            await self.connection.close(_POLICY_VIOLATION, name)

    def _note(self, fault: Fault) -> None:
        self._plan.note(fault)
        if self._relay.ledger is not None:
            self._relay.ledger.add_fired(Fired(str(fault), self.event))
