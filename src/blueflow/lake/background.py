"""Async code for callers that have no event loop, or one that is taken, as in a notebook."""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
from anyio.from_thread import start_blocking_portal

from blueflow.errors import sole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CLOSE_S: Final = 5.0  # what the end may take

_T = TypeVar("_T")


class Background:
    """A thread with an event loop of its own.

    It ends with `close`, with the last reference to this, or with the interpreter, whichever is
    first. The thread is a daemon: it never holds the interpreter up.

    Args:
        at_end: called in the loop before it ends, and given `CLOSE_S`.
    """

    def __init__(self, at_end: Callable[[], Awaitable[None]]) -> None:
        stack = ExitStack()
        self._portal = stack.enter_context(start_blocking_portal(name="blueflow-lake"))
        thread_id = self._portal.call(threading.get_ident)
        stack.callback(self._portal.call, _bounded, at_end)
        self._end = weakref.finalize(self, _end, stack, thread_id)

    def run(self, function: Callable[..., Awaitable[_T]], *args: Any) -> _T:
        """Run an async function in the loop and return what it returns.

        An interrupt (Ctrl-C, the stop button of a notebook) cancels it.

        Raises:
            RuntimeError: it is closed.
        """
        if not self._end.alive:
            raise RuntimeError("this lake is closed: open it again")
        future = self._portal.start_task_soon(function, *args)
        try:
            return future.result()
        except BaseExceptionGroup as group:
            error = sole(group)
            if error is group:
                raise
            raise error from None
        finally:
            future.cancel()  # of one that is done it changes nothing

    def close(self) -> None:
        """End the loop and the thread; done again it changes nothing."""
        self._end()


async def _bounded(at_end: Callable[[], Awaitable[None]]) -> None:
    with anyio.move_on_after(CLOSE_S):
        await at_end()


def _end(stack: ExitStack, thread_id: int) -> None:
    if threading.get_ident() == thread_id:  # the garbage collector ran there; it cannot join itself
        threading.Thread(target=stack.close, name="blueflow-lake-end", daemon=True).start()
    else:
        stack.close()
