"""The `blueflow` command, and what all commands share: settings, logging, errors and exit codes."""

from __future__ import annotations

import argparse
import io
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from blueflow.config import SETTINGS, Settings, add_flags, load, resolve, version
from blueflow.errors import BlueflowError, Exit, InvariantError
from blueflow.masking import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

PROGRAM = "blueflow"
INTERRUPTED = 130  # what shells show for a process that SIGINT ended: 128 + 2

_VERBS = {  # verb: (module, its function `(argv) -> exit code`, what it does)
    "produce": ("blueflow.produce", "main", "read the firehose and write every event, durably"),
    "archive": ("blueflow.archive", "main", "read Kafka's event topics into a lake of Parquet"),
    "lake": ("blueflow.lakecommand", "main", "show, check and tidy a lake of Parquet files"),
    "config": (__name__, "show_settings", "show every setting, its value and where it came from"),
}
_LINE_LENGTH_MAX = 2000
_SAY_S = 2.0  # how long an error waits for a terminal that is stopped, or a full pipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run `blueflow <verb>` and return its exit code."""
    open_missing_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    parser = _verbs_parser()
    if not args:
        parser.print_help(sys.stderr)
        return Exit.USAGE
    verb = args[0]
    if verb.startswith("-"):
        parser.parse_args(args[:1])  # --help and --version end here
    if verb not in _VERBS:
        parser.error(f"there is no verb {verb!r}{_near(verb)}")
    module, function, _ = _VERBS[verb]
    try:
        code: int = getattr(import_module(module), function)(args[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        return Exit.OK
    return code


def open_missing_streams() -> None:
    """Give a process that was started without some of its standard streams empty ones.

    Otherwise the next file that is opened takes the number, and what is written to "stderr" by a
    library lands in it; and Python has None in the place of the stream.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def parser_for(verb: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of one verb; its settings come with `add_flags`.

    Args:
        verb: as in `blueflow <verb>`.
        about: what it does; the first paragraph of a module's docstring, say.
    """
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {verb}",
        description=about,
        allow_abbrev=False,  # a flag that is new must not change what an old command means
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    return parser


def run(
    main: Callable[[Settings], Awaitable[int | None]], settings: Settings | argparse.Namespace
) -> int:
    """Run `main` in an event loop and return the exit code of the process.

    Sets up logging. A `BlueflowError`, alone or in exception groups, becomes one line on stderr and
    its `exit_code`; anything else that was not meant to happen is logged with its traceback.

    Args:
        main: the program. What it returns is the exit code; None is 0.
        settings: the settings, or what a parser with `add_flags` gave.
    """
    try:
        if isinstance(settings, argparse.Namespace):
            settings = load(settings)
        return _run(main, settings)
    except BaseException as error:  # noqa: BLE001 - the end of the process: it tells, then exits
        return _exit_code(error)
    finally:
        _give_up_stderr_if_it_fails()


def show_settings(argv: Sequence[str]) -> int:
    """Run `blueflow config`: print every setting, its value and its origin, secrets masked."""
    parser = parser_for("config", "Show every setting, its value and where it came from.")
    parser.add_argument(
        "--markdown", action="store_true", help="instead, document all settings as a table"
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.markdown:
        print(settings_table())
        return Exit.OK
    settings, problems = resolve(args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be text of this locale
        sys.stdout.reconfigure(errors="backslashreplace")
    rows = [(name, settings.shown(name), settings.origin(name)) for name in SETTINGS]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
    for problem in problems:
        _say(problem)
    return problems[0].exit_code if problems else Exit.OK


def settings_table() -> str:
    """Return all settings as a table in Markdown, for the guide."""
    rows = [
        "| setting (TOML) | flag | environment | default | what it does |",
        "|---|---|---|---|---|",
    ]
    rows += [
        f"| `{spec.name}` | `{spec.flag}` | `{spec.environment}` "
        f"| {spec.shown(spec.default)} | {spec.help} |"
        for spec in SETTINGS.values()
    ]
    return "\n".join(rows)


class _Version(argparse.Action):
    """As argparse's own, but it looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{PROGRAM} {version()}")
        parser.exit()


def _verbs_parser() -> argparse.ArgumentParser:
    width = max(map(len, _VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, (*_, about) in _VERBS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} VERB [OPTIONS]",
        description=f"The AT Protocol firehose, durably.\n\nverbs:\n{verbs}",
        epilog=f"`{PROGRAM} VERB --help` shows the options of a verb.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    return parser


def _near(verb: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(verb, _VERBS, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_VERBS)}"


def _run(main: Callable[[Settings], Awaitable[int | None]], settings: Settings) -> int:
    import anyio

    from blueflow import logs

    logs.set_up(settings.log_level, settings.log_format)
    code = anyio.run(main, settings, backend="asyncio")
    sys.stdout.flush()  # here a full disk or a closed pipe is still an error that we can tell
    return Exit.OK if code is None else code


def _exit_code(error: BaseException) -> int:
    leaves = sorted(_leaves(error), key=_rank)
    if any(isinstance(leaf, BrokenPipeError) for leaf in leaves) and _stdout_is_gone():
        leaves = [leaf for leaf in leaves if not isinstance(leaf, BrokenPipeError)]
    if not leaves:
        return Exit.OK
    first = leaves[0]
    if isinstance(first, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(first, SystemExit) and (first.code is None or isinstance(first.code, int)):
        return first.code or Exit.OK
    if any(_is_unexpected(leaf) for leaf in leaves):
        import logging

        logging.getLogger(PROGRAM).error("unexpected error: please report it", exc_info=error)
    if isinstance(first, BlueflowError):
        _say(first)
        return first.exit_code
    return Exit.UNEXPECTED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _rank(error: BaseException) -> int:
    """Order by what an operator has to know first; equal ones stay in the order they happened."""
    if isinstance(error, BlueflowError):
        return 0 if isinstance(error, InvariantError) else 4 if error.retryable else 2
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return 1
    return 3 if _is_unexpected(error) else 5


def _is_unexpected(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, BlueflowError)


def _say(error: BlueflowError) -> None:
    from blueflow import logs

    logs.tell(logs.clip(mask_credentials(str(error)), _LINE_LENGTH_MAX) + "\n", wait_s=_SAY_S)


def _give_up_stderr_if_it_fails() -> None:
    """Forget what stderr cannot take: the interpreter would exit with 120 over it."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def _stdout_is_gone() -> bool:
    """Tell whether the reader of our output has left, as `head` does, and keep the exit quiet.

    A broken pipe can also be a socket of ours; that one is no normal end.
    """
    import select

    poll = select.poll()
    poll.register(1, 0)  # errors and hang-ups are always reported
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:  # what is still in the buffer would fail again when the interpreter flushes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone
