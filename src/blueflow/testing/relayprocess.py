"""The simulated relay as a child process: what `--source sim`, demos and kill tests use."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from blueflow.errors import InvariantError, SimulatedRelayError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal, Self


def spawn(  # noqa: PLR0913 - one per flag of the command, all optional
    *,
    port: int = 0,
    frames: Path | str | None = None,
    rate: float = 500.0,
    speed: float = 1.0,
    seed: int = 1,
    limit: int | None = None,
    resume: Literal["inclusive", "exclusive"] = "exclusive",
    retention: int | None = None,
    cycle: int = 0,
    first_seq: int | None = None,
    start_time: str | None = None,
    accounts: int | None = None,
    records: int | None = None,
    faults: str = "",
    ledger: Path | str | None = None,
    start_timeout_s: float = 30.0,
    stop_timeout_s: float = 10.0,
) -> RelayProcess:
    """Return a relay that runs in a process of its own: start it with `async with` or `start()`.

    Args:
        port: 0 takes a free one.
        frames: a recording to serve before the simulated network goes on.
        rate: events per second of simulated time.
        speed: how many times faster; `math.inf` is as fast as consumers take them.
        seed: of the simulated network.
        limit: stop issuing after so many events.
        resume: what a cursor means.
        retention: how many events are kept for cursors.
        cycle: give the first so many frames out over and over, for load.
        first_seq: of the simulated network; to go on after an earlier run, its last seq + 1.
        start_time: of the simulated network: ISO 8601 or "now"; None is a fixed time.
        accounts: how many the simulated network has.
        records: how many records most of them begin with; fewer start faster and make smaller
            frames.
        faults: a fault plan.
        ledger: a file for what is issued.
        start_timeout_s: how long it may take until it listens.
        stop_timeout_s: how long it may take to end before it is killed.
    """
    flags = {
        "--port": port, "--frames": frames, "--rate": rate, "--seed": seed, "--limit": limit,
        "--speed": "max" if speed == inf else speed, "--resume": resume, "--retention": retention,
        "--cycle": cycle, "--first-seq": first_seq, "--start-time": start_time, "--faults": faults,
        "--ledger": ledger, "--accounts": accounts, "--records": records,
    }  # fmt: skip
    given = [f"{flag}={value}" for flag, value in flags.items() if value not in (None, "")]
    return RelayProcess(given, start_timeout_s=start_timeout_s, stop_timeout_s=stop_timeout_s)


class RelayProcess:
    """`python -m blueflow.testing.relay` as a child. It ends when this process does.

    Args:
        arguments: of the command.
    """

    def __init__(
        self, arguments: list[str], *, start_timeout_s: float, stop_timeout_s: float
    ) -> None:
        self.url = ""
        self.summary: dict[str, Any] = {}  # what it said at its end: events issued, faults fired
        self._arguments = arguments
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Its process id; 0 when it is not running."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            SimulatedRelayError: it cannot be run, it ended, or did not listen in time.
        """
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "blueflow.testing.relay", "--exit-with-parent"]
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *command, *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for the parent, which stops the relay last
            )  # fmt: skip
        except OSError as error:
            problem = f"did not start ({sys.executable}: {error.strerror or error})"
            raise SimulatedRelayError(problem) from error
        line = b""
        try:
            with anyio.move_on_after(self._start_timeout_s) as waiting:
                line = await _output(process).readline()
            self.url = msgspec.json.decode(line)["url"]
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.stop()
            if isinstance(error, msgspec.DecodeError):
                # Not by its exit code: one that said nothing has one by now, from being stopped.
                late = waiting.cancelled_caught
                how = f"it said nothing for {self._start_timeout_s:g} s" if late else _end(process)
                raise SimulatedRelayError(f"did not start ({how})") from error
            raise

    async def ended(self) -> str:
        """Wait until it ends by itself or by somebody else, and say how; it is running."""
        if self._process is None:
            raise InvariantError("a relay is started before its end is waited for")
        process = self._process
        await process.wait()
        return _end(process)

    async def stop(self) -> dict[str, Any]:
        """End it, by force when it takes too long, and return its summary."""
        process, self._process = self._process, None
        if process is None:
            return self.summary
        if process.stdin is not None:
            process.stdin.close()  # it ends when its parent's side closes
        try:
            with anyio.move_on_after(self._stop_timeout_s):
                lines = (await _output(process).read()).splitlines()
                with suppress(msgspec.DecodeError):  # cut off by a kill
                    self.summary = msgspec.json.decode(lines[-1]) if lines else {}
                await process.wait()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                with anyio.CancelScope(shield=True), anyio.move_on_after(self._stop_timeout_s):
                    await process.wait()
        return self.summary

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.stop()


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:  # it was asked for
        raise SimulatedRelayError("has no output")
    return process.stdout


def _end(process: asyncio.subprocess.Process) -> str:
    code = process.returncode or 0
    with suppress(ValueError):  # a number without a name
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
