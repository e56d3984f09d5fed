"""`blueflow lake`: what a lake holds, whether it is sound, and its upkeep."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Final

from blueflow import cli
from blueflow.config import add_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.settings import Settings

ABOUT: Final = """\
Look at a lake and keep it in order.

  blueflow lake stats ./data-lake                  what it holds
  blueflow lake files s3://data-lake posts --start 2026-07-04T16 --end 2026-07-05
  blueflow lake verify ./data-lake --deep          whether records, files and markers agree
  blueflow lake compact ./data-lake                what the writer does by itself, once and now
  blueflow lake expire ./data-lake --dry-run       what is old enough to be removed
"""

_SETTINGS: Final = (
    *("s3_endpoint", "s3_access_key", "s3_secret_key", "s3_region"),
    *("log_level", "log_format"),
)
_OF_KEEPING: Final = ("lateness_s", "keep_fresh_s")
_ABOUT: Final = {
    "stats": "Show how much a lake holds, by dataset, in whole hours.",
    "files": "List the Parquet files that hold each row once, over both roots.",
    "compact": "Compact every hour that is closed, and remove what has been compacted long enough.",
    "verify": "Check that records, files and markers agree; the exit code is 1 if they do not.",
    "expire": "Remove, for good, what is older than the lake keeps.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `blueflow lake` and return its exit code."""
    cli.open_missing_streams()
    args = _parser().parse_args(argv)
    args.json = args.json or not sys.stdout.isatty()
    return cli.run(partial(_run, args), args)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser_for("lake", ABOUT)
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, about in _ABOUT.items():
        verb = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        verb.add_argument(
            "url",
            metavar="URL",
            nargs="?",
            help="a folder or s3://BUCKET[/PREFIX] [default: the setting `lake`]",
        )
        if name == "files":
            verb.add_argument("dataset", metavar="DATASET", help="such as posts")
        if name in {"stats", "files"}:
            verb.add_argument("--start", type=_moment, metavar="TIME", help="as in 2026-07-04T16")
            verb.add_argument(
                "--end", type=_moment, metavar="TIME", help="where to stop, exclusive"
            )
        if name == "verify":
            verb.add_argument(
                "--deep", action="store_true", help="read every file and compare its checksum"
            )
        if name == "expire":
            verb.add_argument("--raw-days", type=_days, default=90.0, metavar="DAYS",
                              help="how long raw/ and fresh/ are kept [default: 90]")  # fmt: skip
            verb.add_argument("--processed-days", type=_days, default=365.0, metavar="DAYS",
                              help="how long processed/ is kept [default: 365]")  # fmt: skip
            verb.add_argument("--dry-run", action="store_true", help="remove nothing, and tell")
        verb.add_argument(
            "--json",
            action="store_true",
            help="a JSON object per line; so it is without a terminal",
        )
        add_flags(verb, (*_OF_KEEPING, *_SETTINGS) if name in {"compact", "verify"} else _SETTINGS)
    return parser


async def _run(args: argparse.Namespace, settings: Settings) -> int:
    from blueflow.lakejob import run

    return await run(args, settings)


def _moment(text: str) -> str:
    from blueflow.lake.span import moment_us

    try:
        moment_us(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < 1e6:  # noqa: PLR2004 - nan as well
        raise argparse.ArgumentTypeError(f"{text} is no number of days")
    return days


if __name__ == "__main__":
    sys.exit(main())
