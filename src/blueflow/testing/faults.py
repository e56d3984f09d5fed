"""Planned faults: an error on the n-th call, a cancellation at the n-th suspension."""

from __future__ import annotations

import asyncio
from types import coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator


class Faults:
    """Raises `error` on call number `call` of `step`, once, and counts.

    A fault that never fires proves nothing: assert on `fired`.

    Args:
        call: from 1; 0 never fires.
        error: what is raised.
    """

    def __init__(self, call: int = 0, error: Exception | None = None) -> None:
        if call and error is None:
            raise ValueError("a planned fault needs an error")
        self._call, self._error = call, error
        self.calls = 0
        self.fired = 0

    def step(self) -> None:
        """Count a call; raise the planned error if it is the planned one."""
        self.calls += 1
        if self.calls == self._call and self._error is not None:
            self.fired += 1
            raise self._error


async def cancel_at(suspension: int, function: Callable[[], Awaitable[object]]) -> bool:
    """Run `function()` and cancel it when it waits for the n-th time.

    Args:
        suspension: from 1.
        function: called without arguments, in a task of its own.

    Returns:
        Whether there was an n-th suspension. False: it ended before, so a sweep is over.

    Raises:
        Exception: what the function raised.
    """
    reached = False

    async def counted() -> None:
        nonlocal reached
        reached = await _count_suspensions(function(), suspension)

    task = asyncio.ensure_future(counted())
    try:
        await asyncio.wait([task])
    finally:
        if not task.done():
            task.cancel()
    if task.cancelled():
        return True
    task.result()
    return reached


@coroutine
def _count_suspensions(awaitable: Awaitable[object], suspension: int) -> Generator[Any, Any, bool]:
    """Pass everything through; cancel the task just as it waits for the n-th time."""
    steps, count = awaitable.__await__(), 0
    task = asyncio.current_task()
    outcome: BaseException | None = None
    answer = None
    while True:
        try:
            waits_for = steps.send(answer) if outcome is None else steps.throw(outcome)
        except StopIteration:
            return count >= suspension
        count += 1
        if count == suspension and task is not None:
            task.cancel()
        outcome = answer = None
        try:
            answer = yield waits_for
        except BaseException as error:  # noqa: BLE001 - it is the function's: passed on whole
            outcome = error
