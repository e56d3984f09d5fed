"""Kafka's event topics into a lake of Parquet. The same as `blueflow archive`.

    KAFKA_BOOTSTRAP_SERVERS=localhost:9092 MINIO_ENDPOINT=localhost:9000 python runners/archive.py

To scale out, start it N times with `--shard 0/N` to `--shard N-1/N`.
"""

from __future__ import annotations

import sys

from blueflow.archive import main

if __name__ == "__main__":
    sys.exit(main())
