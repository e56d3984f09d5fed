"""How to reach S3: what a reader says and what the environment does, told to each library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blueflow.lake.s3client import S3Options


def storage_options(options: S3Options) -> dict[str, str]:
    """Return what Polars, and whatever else builds on object_store, is told."""
    endpoint = options.endpoint_url
    told = {
        "aws_endpoint_url": endpoint,
        "aws_allow_http": "true" if endpoint and endpoint.startswith("http:") else None,
        "aws_access_key_id": options.access_key,
        "aws_secret_access_key": options.secret_key,
        "aws_region": options.region,
    }
    return {name: value for name, value in told.items() if value}


def duckdb_secret(options: S3Options) -> dict[str, str]:
    """Return what DuckDB's `CREATE SECRET` is told; empty when the AWS chain has to be asked."""
    if not options.access_key or not options.secret_key:
        return {}
    told = {"KEY_ID": options.access_key, "SECRET": options.secret_key, "REGION": options.region}
    if endpoint := options.endpoint_url:
        scheme, _, address = endpoint.partition("://")
        told |= {
            "ENDPOINT": address.rstrip("/"),
            "URL_STYLE": "path",
            "USE_SSL": "true" if scheme == "https" else "false",
        }
    return told
