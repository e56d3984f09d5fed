"""Planned faults fire when planned, once, and say that they did."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from blueflow.testing.faults import Faults, cancel_at


def test_a_fault_fires_on_its_call_alone() -> None:
    faults = Faults(2, KeyError("planned"))
    faults.step()
    with pytest.raises(KeyError):
        faults.step()
    faults.step()
    assert (faults.calls, faults.fired) == (3, 1)


def test_without_a_plan_nothing_fires() -> None:
    faults = Faults()
    faults.step()
    assert (faults.calls, faults.fired) == (1, 0)
    with pytest.raises(ValueError, match="needs an error"):
        Faults(1)


async def test_cancelled_means_that_what_follows_is_not_done() -> None:
    done: list[int] = []

    async def work() -> None:
        for number in range(3):
            await asyncio.sleep(0)
            done.append(number)

    for suspension, expected in ((1, []), (2, [0]), (3, [0, 1])):
        done.clear()
        assert await cancel_at(suspension, work)
        assert done == expected
    done.clear()
    assert not await cancel_at(4, work)
    assert done == [0, 1, 2]


async def test_a_future_that_is_waited_for_is_cancelled() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        await future

    assert await cancel_at(1, work)
    assert future.cancelled()


async def test_clean_up_runs_and_errors_come_out() -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            done.append("clean")

    assert await cancel_at(1, work)
    assert done == ["clean"]

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        await cancel_at(5, fail)


async def test_a_cancelled_caller_takes_the_function_along() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with anyio.move_on_after(0.01) as scope:
        await cancel_at(99, work)
    assert scope.cancelled_caught
    await ended.wait()
