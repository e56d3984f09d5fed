"""`python -m blueflow.produce`: read the firehose and write every event, durably and resumably."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blueflow import cli
from blueflow.config import add_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.settings import Settings

ABOUT = """\
Read the AT Protocol firehose and write every event, durably and resumably.

  blueflow produce --sink jsonl:data                      the live network into a folder
  KAFKA_BOOTSTRAP_SERVERS=localhost:9092 blueflow produce the live network into Kafka, exactly once
  blueflow produce --sink stdout --collection app.bsky.feed.post --limit 10 | jq .
  blueflow produce --source sim --sink jsonl:data         the simulated network, offline

Start the same command again to go on where it ended. Ctrl-C or SIGTERM stops it: everything taken
is made durable first.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `blueflow produce` and return its exit code."""
    cli.open_missing_streams()
    parser = cli.parser_for("produce", ABOUT)
    add_flags(parser)
    return cli.run(_produce, parser.parse_args(argv))


async def _produce(settings: Settings) -> int:
    from blueflow.job import produce

    return await produce(settings)


if __name__ == "__main__":
    sys.exit(main())
