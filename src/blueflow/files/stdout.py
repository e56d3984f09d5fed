"""`--sink stdout`: wire JSON lines for a pipe. Keeps no position."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final, cast

import anyio
from anyio.lowlevel import checkpoint

from blueflow.errors import OutputClosedError, SettingError
from blueflow.events import encode_lines
from blueflow.files.disk import output_error
from blueflow.files.worker import Worker
from blueflow.interfaces import Sink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blueflow.events import Event, Position

CLOSE_WAIT_S: Final = 1.0
_FULL_PIPE_WAIT_MS: Final = 1_000
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})

_logger = logging.getLogger(__name__)


class StdoutSink(Sink):
    """Writes one line of wire JSON per event, all of a batch before `write` returns.

    A full pipe makes `write` wait, not the event loop; cancelled, it leaves the rest of the batch
    to a thread that does not keep the process from ending.

    Args:
        stream: where lines go, text or bytes; standard output when None.

    Raises:
        SettingError: the process was started without a standard output.
    """

    keeps_position: Final = False

    def __init__(self, stream: IO[Any] | None = None) -> None:
        if stream is None and sys.__stdout__ is None:  # what stands for it now leads nowhere
            raise SettingError("sink", "standard output", "it is closed")
        self._stream = sys.stdout if stream is None else stream
        self._name = str(getattr(self._stream, "name", "the output stream")).strip("<>")
        self._worker = Worker("stdout")

    async def resume(self) -> Mapping[str, Position]:
        """Return no position: a pipe remembers nothing."""
        return {}

    async def write(self, events: Sequence[Event], *, through: Position) -> None:  # noqa: ARG002
        """Write the events.

        Raises:
            OutputClosedError: the reader has gone; a normal end (`| head`).
            OutputIOError: the stream failed, for example a full disk behind `>`.
        """
        if events:
            await self._worker.run(partial(self._write, events))

    async def flush(self) -> None:
        """Do nothing: every write is flushed."""
        await checkpoint()

    @property
    def durable(self) -> Mapping[str, Position]:
        """Always empty."""
        return {}

    async def close(self) -> None:
        """End the thread; the stream belongs to the caller. Waits 1 s for a full pipe."""
        with anyio.CancelScope(shield=True):
            if not await self._worker.close(_nothing, wait_s=CLOSE_WAIT_S):
                _logger.warning(
                    "the reader of the output takes nothing; the rest of the batch is given up",
                    extra={"output": self._name, "waited_s": CLOSE_WAIT_S},
                )

    def _write(self, events: Sequence[Event]) -> None:
        lines = encode_lines(events)
        try:
            binary = _binary_of(self._stream)
            if binary is None:  # text without bytes below it: a notebook's output, a StringIO
                self._stream.write(lines.decode())
                self._stream.flush()
                return
            self._stream.flush()  # what others printed before us comes first
            descriptor = _descriptor_of(binary)
            if descriptor is None:
                binary.write(lines)
                binary.flush()
            else:
                _write_all(descriptor, lines)
        except OSError as error:
            if error.errno in _GONE:
                raise OutputClosedError(self._name) from error
            raise output_error(self._name, error) from error


def _binary_of(stream: IO[Any]) -> IO[bytes] | None:
    binary = getattr(stream, "buffer", stream)
    if isinstance(binary, io.BufferedIOBase | io.RawIOBase):
        return cast("IO[bytes]", binary)
    return None


def _descriptor_of(binary: IO[bytes]) -> int | None:
    try:
        return binary.fileno()
    except OSError:  # io.UnsupportedOperation: bytes in memory
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    """Write past Python's buffer: at its end the process would wait for a thread that holds it."""
    ours = os.dup(descriptor)  # after a cancellation the caller may close, and reuse, its own
    try:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(ours, rest) :]
            except BlockingIOError:  # a terminal that another program made non-blocking
                full = select.poll()  # unlike select(), it takes any descriptor
                full.register(ours, select.POLLOUT)
                full.poll(_FULL_PIPE_WAIT_MS)
    finally:
        os.close(ours)


def _nothing() -> None:
    pass
