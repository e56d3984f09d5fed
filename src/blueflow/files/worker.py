"""A thread for the calls of one sink that may block: fsync, or a write into a full pipe."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Worker:
    """Does calls one after the other, in one thread that starts with the first call.

    Whoever waits for a call may be cancelled: the call is then done to its end, and the next one
    waits for it. The thread is a daemon, unlike those of `anyio.to_thread`: a pipe that nobody
    reads would otherwise keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def run(self, call: Callable[[], T]) -> T:
        """Return what `call` returns in the thread, or raise what it raises."""
        if self._closed:
            raise RuntimeError(f"{self._name} is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self._calls.put((result, call))
        return await asyncio.wrap_future(result)

    async def close(self, last: Callable[[], object], *, wait_s: float) -> bool:
        """Do the `last` call after the others and end the thread.

        False: the thread still hangs in an earlier call after `wait_s`; `last` was not done.
        """
        self._closed = True
        if self._thread is None:
            last()
            return True
        result: Future[object] = Future()
        result.set_running_or_notify_cancel()
        self._calls.put((result, last))
        self._calls.put(None)
        done, _ = await asyncio.wait([asyncio.wrap_future(result)], timeout=wait_s)
        return bool(done)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            result, call = item
            try:
                value = call()
            except BaseException as error:  # noqa: BLE001 - it is the caller's: handed over whole
                result.set_exception(error)
            else:
                result.set_result(value)
            del item, result, call  # a waiting thread should not keep a batch alive
