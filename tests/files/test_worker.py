"""The thread of a sink: calls in order, errors handed over, cancelled waits, a bounded end."""

from __future__ import annotations

import threading

import anyio
import pytest

from blueflow.files.worker import Worker


async def test_calls_are_done_in_order_in_one_thread() -> None:
    worker, threads = Worker("test"), set()

    def call() -> int:
        threads.add(threading.get_ident())
        return len(threads)

    assert [await worker.run(call) for _ in range(3)] == [1, 1, 1]
    assert threads.isdisjoint({threading.get_ident()})
    assert await worker.close(lambda: None, wait_s=5)
    with pytest.raises(RuntimeError, match="closed"):
        await worker.run(call)


async def test_an_error_comes_out_where_the_call_was_asked_for() -> None:
    worker = Worker("test")
    for error in (KeyError("x"), SystemExit(3)):

        def call(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            await worker.run(call)
    assert await worker.run(lambda: 1) == 1
    await worker.close(lambda: None, wait_s=5)


async def test_a_cancelled_call_is_done_to_its_end_before_the_next_one() -> None:
    worker, go_on, done = Worker("test"), threading.Event(), []

    def slow() -> None:
        go_on.wait(20)
        done.append("slow")

    with anyio.move_on_after(0.01) as scope:
        await worker.run(slow)
    assert scope.cancelled_caught
    go_on.set()
    await worker.run(lambda: done.append("next"))
    assert await worker.close(lambda: done.append("last"), wait_s=5)
    assert done == ["slow", "next", "last"]


async def test_an_unused_worker_still_does_the_last_call() -> None:
    done: list[int] = []
    assert await Worker("test").close(lambda: done.append(1), wait_s=0)
    assert done == [1]


async def test_a_hung_call_is_not_waited_for_beyond_the_bound() -> None:
    worker, go_on, done = Worker("test"), threading.Event(), []
    with anyio.move_on_after(0.01):
        await worker.run(lambda: go_on.wait(20))
    assert not await worker.close(lambda: done.append(1), wait_s=0.01)
    assert done == []
    go_on.set()
