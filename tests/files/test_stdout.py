"""The stdout sink: pipes that are closed, full, or no pipes at all."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from blueflow.errors import Exit, OutputClosedError, OutputIOError
from blueflow.events import Position, encode_lines
from blueflow.files.stdout import StdoutSink
from blueflow.testing.contracts import contract_events

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENTS = contract_events("relay.example", 20)
MANY = contract_events("relay.example", 2_000)  # more than a pipe holds
THROUGH = Position("relay.example", 20)
PROGRAM = """
import asyncio, sys
from blueflow.errors import OutputClosedError
from blueflow.events import Position
from blueflow.files.stdout import StdoutSink
from blueflow.testing.contracts import contract_events

events = contract_events("relay.example", 2_000)

async def main():
    sink = StdoutSink()
    await sink.resume()
    try:
        for _ in range(50):
            await asyncio.wait_for(sink.write(events, through=Position("relay.example", 1)), WAIT_S)
    except (OutputClosedError, TimeoutError) as error:
        print(type(error).__name__, file=sys.stderr)
    await sink.close()

asyncio.run(main())
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, Any]]:
    """A descriptor to read from and a stream to write to."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as stream:  # noqa: PTH123 - it has no path
        yield reading, stream


async def test_lines_go_out_with_the_write(pipe: tuple[int, Any]) -> None:
    reading, stream = pipe
    sink = StdoutSink(stream)
    await sink.resume()
    stream.write("printed before\n")
    await sink.write(EVENTS, through=THROUGH)
    assert os.read(reading, 1_000_000) == b"printed before\n" + encode_lines(EVENTS)
    await sink.close()
    os.close(reading)
    assert not stream.closed, "the stream belongs to the caller"


async def test_text_streams_and_files_take_lines_too(tmp_path: Path) -> None:
    text = io.StringIO()
    path = tmp_path / "lines"
    with path.open("wb") as file, tempfile.TemporaryFile("w+b", buffering=0) as raw:
        for stream in (text, file, raw):
            sink = StdoutSink(stream)
            await sink.write(EVENTS, through=THROUGH)
            await sink.close()
        assert os.pread(raw.fileno(), 1_000_000, 0) == encode_lines(EVENTS)
    assert text.getvalue().encode() == encode_lines(EVENTS)
    assert path.read_bytes() == encode_lines(EVENTS)


async def test_a_reader_that_has_gone_is_a_normal_end(pipe: tuple[int, Any]) -> None:
    reading, stream = pipe
    os.close(reading)
    sink = StdoutSink(stream)
    with pytest.raises(OutputClosedError) as caught:
        await sink.write(EVENTS, through=THROUGH)
    assert caught.value.exit_code is Exit.OK
    await sink.close()


async def test_a_full_disk_behind_the_shell_is_an_error(
    pipe: tuple[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, stream = pipe

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("blueflow.files.stdout.os.write", full)
        sink = StdoutSink(stream)
        with pytest.raises(OutputIOError, match="No space left"):
            await sink.write(EVENTS, through=THROUGH)
        await sink.close()
    os.close(reading)


async def test_a_full_pipe_stops_the_writer_and_not_the_loop(
    pipe: tuple[int, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("blueflow.files.stdout.CLOSE_WAIT_S", 0.01)
    reading, stream = pipe
    sink = StdoutSink(stream)
    turns = 0
    async with anyio.create_task_group() as tasks:

        async def turn() -> None:
            nonlocal turns
            while turns < 100:
                await anyio.lowlevel.checkpoint()
                turns += 1
            tasks.cancel_scope.cancel()

        tasks.start_soon(turn)
        await sink.write(MANY, through=THROUGH)
    assert turns == 100
    await sink.close()
    assert "takes nothing" in caplog.text
    os.close(reading)  # lets the thread end


async def test_a_pipe_that_another_program_made_nonblocking(pipe: tuple[int, Any]) -> None:
    reading, stream = pipe
    os.set_blocking(stream.fileno(), False)
    sink = StdoutSink(stream)
    received, expected = bytearray(), encode_lines(MANY)

    def read() -> None:
        while len(received) < len(expected):
            received.extend(os.read(reading, 50_000))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, read)
        await sink.write(MANY, through=THROUGH)
    assert bytes(received) == expected
    await sink.close()
    os.close(reading)


async def test_a_cancelled_write_never_reaches_another_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread goes on when the caller has closed its stream and reused the number."""
    monkeypatch.setattr("blueflow.files.stdout.CLOSE_WAIT_S", 0.01)
    reading, writing = os.pipe()
    stream = open(writing, "w", encoding="utf-8")  # noqa: ASYNC230, PTH123, SIM115
    sink = StdoutSink(stream)
    with anyio.move_on_after(0.05) as scope:
        await sink.write(MANY, through=THROUGH)
    assert scope.cancelled_caught
    await sink.close()
    stream.close()
    other = os.open(os.devnull, os.O_RDONLY)
    os.dup2(other, writing)  # the number is in use again
    expected = encode_lines(MANY)
    received = bytearray()
    while piece := await anyio.to_thread.run_sync(os.read, reading, 50_000):
        received += piece
    assert bytes(received) == expected
    for descriptor in {other, writing, reading}:
        os.close(descriptor)


@pytest.mark.parametrize(("reader_stays", "expected"), [(False, "OutputClosed"), (True, "Timeout")])
def test_a_process_ends_quietly_whatever_its_reader_does(
    *, reader_stays: bool, expected: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("WAIT_S", "0.2" if reader_stays else "20")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b'{"did":')
        if not reader_stays:
            process.stdout.close()
        assert process.wait(20) == 0
        said = process.stderr.read().decode().splitlines()
        assert said[0] == f"{expected}Error"
        assert said[1:] == (
            ["the reader of the output takes nothing; the rest of the batch is given up"]
            if reader_stays
            else []
        )
