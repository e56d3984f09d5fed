"""`--sink stalling_sink:StallingSink:SECONDS/FILE`: stalls once for so long, then writes lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from blueflow.events import encode_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.events import Event, Position

BEFORE = 500


class StallingSink:
    keeps_position = False

    def __init__(self, argument: str) -> None:
        seconds, _, path = argument.partition("/")
        self._stall_s = float(seconds)
        self._file = Path("/" + path).open("ab", buffering=0)  # noqa: SIM115 - closed by `close`
        self._count = 0
        self._stalled = False
        self._positions: dict[str, Position] = {}

    async def resume(self) -> Mapping[str, Position]:
        return {}

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        if self._count >= BEFORE and not self._stalled:
            self._stalled = True
            began_s = time.monotonic()
            await anyio.sleep(self._stall_s)
            self._file.write(f'{{"stalled_s": {time.monotonic() - began_s}}}\n'.encode())
        self._file.write(encode_lines(events))
        self._count += len(events)
        self._positions[through.source] = through

    async def flush(self) -> None:
        """Every write has gone to the file."""

    @property
    def durable(self) -> Mapping[str, Position]:
        return self._positions

    async def close(self) -> None:
        self._file.close()
