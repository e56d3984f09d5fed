"""The command `python -m blueflow.testing.relay`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from contextlib import ExitStack
from itertools import chain, islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from blueflow.errors import BlueflowError, Exit
from blueflow.testing.faultplan import FAULTS, FaultPlan
from blueflow.testing.frames import read_recording, time_of
from blueflow.testing.ledger import Ledger
from blueflow.testing.network import FIRST_SEQ, START_US, SimulatedNetwork
from blueflow.testing.relay import RelaySettings, SimulatedRelay

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from blueflow.testing.frames import NetworkFrame


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop, and exit."""
    args = _parser().parse_args(argv)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # consumers that break off are usual
    try:
        code = asyncio.run(_serve(args))
    except BlueflowError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:  # the port is taken, a file cannot be opened
        print(f"blueflow.testing.relay: {error}", file=sys.stderr)
        code = Exit.UNAVAILABLE
    sys.exit(code)


async def _serve(args: argparse.Namespace) -> Exit:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    if args.exit_with_parent:
        await loop.connect_read_pipe(lambda: _UntilClosed(stop), sys.stdin)
    with ExitStack() as files:
        ledger = Ledger(files.enter_context(args.ledger.open("ab"))) if args.ledger else None
        settings = RelaySettings(
            host=args.host, port=args.port, rate=args.rate, speed=args.speed, limit=args.limit,
            resume=args.resume, retention=args.retention, cycle=args.cycle, future=args.future,
            outdated_info=args.outdated_info,
        )  # fmt: skip
        plan = FaultPlan(args.faults)
        frames = _frames(args)
        frames = chain(list(islice(frames, 1)), frames)  # a file that is no recording is told now
        async with SimulatedRelay(frames, settings, faults=plan, ledger=ledger) as relay:
            _say({"url": relay.url, "seed": args.seed, "faults": str(plan)})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_wait, stop.wait, tasks.cancel_scope)
                tasks.start_soon(_wait, relay.failed.wait, tasks.cancel_scope)
        _say(_summary(relay))
        if relay.failure is not None:
            raise relay.failure
    return Exit.OK


async def _wait(wait: Callable[[], Awaitable[object]], scope: anyio.CancelScope) -> None:
    await wait()
    scope.cancel()


def _frames(args: argparse.Namespace) -> Iterator[NetworkFrame]:
    """Iterate over the recorded frames, then over a network that goes on where they end."""
    next_seq, start_us = FIRST_SEQ, START_US
    if args.frames:
        newest_us = 0
        for frame in read_recording(args.frames):
            next_seq, newest_us = frame.seq + 1, max(newest_us, frame.time_us)
            yield frame
        start_us = newest_us or start_us
    if args.start_time:
        start_us = args.start_time
    first_seq = next_seq if args.first_seq is None else args.first_seq
    yield from SimulatedNetwork(
        args.seed,
        first_seq=first_seq,
        start_us=start_us,
        rate=args.rate,
        accounts=args.accounts,
        records=args.records,
        gap_share=args.gap_share,
    )


def _summary(relay: SimulatedRelay) -> dict[str, Any]:
    stats: dict[str, Any] = msgspec.to_builtins(relay.stats)
    return {"issued": relay.log.end} | stats | {"faults": dict(relay.faults.fired)}


def _say(values: dict[str, Any]) -> None:
    print(msgspec.json.encode(values).decode(), flush=True)


class _UntilClosed(asyncio.Protocol):
    """Sets an event when the parent closes its end, as it does by ending."""

    def __init__(self, closed: asyncio.Event) -> None:
        self._closed = closed

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        del exc
        self._closed.set()


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, FAULTS))
    faults = "\n".join(
        f"  {name:{width}}  {kind.effect}" + (f" (default {kind.argument})" * bool(kind.argument))
        for name, kind in FAULTS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m blueflow.testing.relay",
        description="Serve a simulated AT Protocol relay. Prints one JSON line with its url when\n"
        "it listens, and one with a summary when it ends (SIGTERM, SIGINT).",
        epilog=f"faults (kind[:argument]@event[xtimes], separated by commas):\n{faults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=0, help="0 (default) takes a free one")
    add("--frames", type=Path, help="a recording to serve before the simulated network goes on")
    add("--rate", type=_positive, default=500.0, help="events per simulated second (default 500)")
    add("--speed", type=_speed, default=1.0, help="times faster than that, or max (default 1)")
    add("--seed", type=int, default=1, help="equal seeds give equal networks (default 1)")
    add("--limit", type=int, help="stop issuing after so many events; connections stay open")
    add("--resume", choices=("inclusive", "exclusive"), default="exclusive",
        help="whether a cursor names the first event to send, or the last one had")  # fmt: skip
    add("--retention", type=int, default=20_000, help="events kept for cursors (default 20000)")
    add("--future", choices=("live", "error"), default="live",
        help="the answer to a cursor above the newest seq (default live)")  # fmt: skip
    add("--outdated-info", action="store_true", help="send #info OutdatedCursor where it applies")
    add("--cycle", type=int, default=0, help="give the first N frames out over and over, for load")
    add("--first-seq", type=int, help="of the simulated network")
    add("--start-time", type=_time, help="of the simulated network: ISO 8601, or now")
    add("--accounts", type=int, default=10_000, help="of the simulated network (default 10000)")
    add("--records", type=int, default=30_000, help="most accounts begin with (default 30000)")
    add("--gap-share", type=float, default=0.0, help="events before which seqs are skipped")
    add("--faults", default="", help="a fault plan, see below")
    add("--ledger", type=Path, help="append what is issued to this file, as JSON lines")
    add("--exit-with-parent", action="store_true", help="end when standard input is closed")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _speed(text: str) -> float:
    return inf if text == "max" else _positive(text)


def _time(text: str) -> int:
    return time.time_ns() // 1000 if text == "now" else time_of(text)
