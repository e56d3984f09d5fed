"""`blueflow archive`: Kafka's event topics into a lake, each event once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blueflow import cli
from blueflow.config import add_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.settings import Settings

ABOUT = """\
Read the event topics that `blueflow produce` writes, and keep them as Parquet in a lake.

  KAFKA_BOOTSTRAP_SERVERS=localhost:9092 MINIO_ENDPOINT=localhost:9000 blueflow archive
  blueflow archive --lake ./data-lake                     into a folder
  blueflow archive --shard 0/2 & blueflow archive --shard 1/2

Start the same command again to go on where it ended. Ctrl-C or SIGTERM stops it: everything taken
is published first.
"""

_GROUPS = ("lake", "kafka", "operation")
_OTHERS = ("pipeline", "for_s", "commit_interval_s", "commit_bytes_max", "drain_s",
           "connect_wait_s")  # fmt: skip
_OF_THE_PRODUCER = (
    "route", "partitions", "kafka_replication", "kafka_retention_s", "delivery",
    "kafka_compression", "transaction_timeout_s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run `blueflow archive` and return its exit code."""
    from blueflow.settings import SETTINGS

    cli.open_missing_streams()
    parser = cli.parser_for("archive", ABOUT)
    names = [
        name
        for name, spec in SETTINGS.items()
        if (spec.group in _GROUPS or name in _OTHERS) and name not in _OF_THE_PRODUCER
    ]
    add_flags(parser, names)
    return cli.run(_archive, parser.parse_args(argv))


async def _archive(settings: Settings) -> int:
    from blueflow.archivejob import archive

    return await archive(settings)


if __name__ == "__main__":
    sys.exit(main())
