"""What every command that runs for long does to its process: signals and memory."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import anyio

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_REQUEST_S = 0.5


def stop_on_signals(stop: anyio.Event) -> None:
    """Drain on the first signal, end at once on the second.

    With `signal.signal`, not the loop's handlers: the second one has to force even while a write to
    a stopped terminal or a full pipe holds the loop up. One request often comes as several signals:
    from the terminal and from a parent that passes it on, or from `timeout`, which tells its child
    and then the whole group.
    """
    loop = asyncio.get_running_loop()
    first_s: float | None = None  # not `stop`, which --for sets as well

    def handle(number: int, _: object) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s
            loop.call_soon_threadsafe(stop.set)
        elif now_s - first_s >= _ONE_REQUEST_S:
            # Nothing to clean up that a kill -9 would not leave as well: the next start repairs it.
            with suppress(OSError):
                os.set_blocking(2, False)
                os.write(2, b"blueflow: second signal, ending at once\n")
            os._exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, handle)


def tune_memory() -> None:
    """Look for garbage cycles more rarely: events are trees, and their number is the cost."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
