"""The command `python -m blueflow.testing.services`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import anyio

from blueflow.errors import BlueflowError, Exit, sole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Service(Protocol):
    """A server, as this command sees it."""

    async def start(self) -> None:
        """Start it, and wait until it answers."""

    async def ended(self) -> None:
        """Wait until it ends by itself, and raise `ServiceError`."""

    async def close(self) -> None:
        """Stop it, and remove what was temporary."""

    def usage(self) -> str:
        """Say where it is, and how to use it."""


class Choice(NamedTuple):
    """A server that can be named on the command line."""

    port: int  # where people expect it
    install: Callable[[], Path]
    create: Callable[[int, Path | None], Service]


def _kafka() -> Choice:
    from blueflow.testing.services.kafka import KafkaBroker, prepare

    return Choice(9092, prepare, lambda port, data: KafkaBroker(data, port=port))


def _s3() -> Choice:
    from blueflow.testing.services.install import find_weed
    from blueflow.testing.services.s3 import SeaweedServer

    return Choice(9000, find_weed, lambda port, data: SeaweedServer(data, port=port))


SERVICES: Final[Mapping[str, Callable[[], Choice]]] = {"kafka": _kafka, "s3": _s3}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says, and exit."""
    parser = _parser()
    args = parser.parse_args(argv)
    if len(args.name) > 1 and (args.port is not None or args.data is not None):
        parser.error("--port and --data are for one server: start each with a command of its own")
    choices = {name: SERVICES[name]() for name in args.name}
    code = Exit.OK
    try:
        for name, choice in choices.items():
            print(f"{name}: {choice.install()}", file=sys.stderr)
        if args.verb == "up":
            asyncio.run(_up(list(choices.values()), args.port, args.data))
    except (BlueflowError, BaseExceptionGroup) as raised:
        error = sole(raised)
        if not isinstance(error, BlueflowError):
            raise
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:  # a folder cannot be made
        print(f"blueflow.testing.services: {error}", file=sys.stderr)
        code = Exit.CANNOT_WRITE
    except KeyboardInterrupt:  # while files are fetched
        sys.exit(128 + signal.SIGINT)
    sys.exit(code)


async def _up(choices: Sequence[Choice], port: int | None, data: Path | None) -> None:
    """Run servers until a signal comes, or one of them ends by itself."""
    servers = [choice.create(choice.port if port is None else port, data) for choice in choices]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_on_signal, tasks.cancel_scope)
        await _serve(servers)


async def _cancel_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


async def _serve(servers: Sequence[Service]) -> None:
    async with AsyncExitStack() as running:
        for server in servers:
            running.push_async_callback(server.close)
            await server.start()
        for server in servers:
            print(server.usage(), flush=True)
        print("Ctrl-C stops.", flush=True)
        async with anyio.create_task_group() as ends:
            for server in servers:
                ends.start_soon(server.ended)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blueflow.testing.services",
        description="Run real servers as local processes, for development and tests.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    install = verbs.add_parser("install", help="only get the files of servers into the cache")
    up = verbs.add_parser("up", help="run servers until Ctrl-C or SIGTERM", allow_abbrev=False)
    for verb in (install, up):
        verb.add_argument("name", nargs="+", choices=sorted(SERVICES), metavar="NAME",
            help=f"which: {', '.join(sorted(SERVICES))}")  # fmt: skip
        verb.set_defaults(port=None, data=None)
    up.add_argument("--port", type=int, help="to listen on (default: the usual one; 0: a free one)")
    up.add_argument("--data", type=Path, metavar="DIR",
        help="a folder to keep and to start with again (default: a temporary one)")  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
