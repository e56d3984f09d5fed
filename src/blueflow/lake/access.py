"""How to reach an S3 server: what the stores, DuckDB and Polars are told alike."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blueflow.lake.store import Store


class S3Access(msgspec.Struct, frozen=True):
    """Where an S3 server is, and who we are; None is what the AWS chain says."""

    endpoint: str | None = None
    access_key: str | None = None
    secret_key: str | None = None
    region: str | None = None

    def __repr__(self) -> str:
        """Without the secrets."""
        return f"S3Access(endpoint={self.endpoint!r}, region={self.region!r})"

    def or_from(self, environment: Mapping[str, str] | None = None) -> S3Access:
        """Return the same, completed by MINIO_ENDPOINT, MINIO_ACCESS_KEY and MINIO_SECRET_KEY."""
        names = os.environ if environment is None else environment
        endpoint = self.endpoint or names.get("MINIO_ENDPOINT") or None
        if endpoint and "://" not in endpoint:
            endpoint = f"http://{endpoint}"
        return S3Access(
            endpoint,
            self.access_key or names.get("MINIO_ACCESS_KEY") or None,
            self.secret_key or names.get("MINIO_SECRET_KEY") or None,
            self.region,
        )

    def storage_options(self) -> dict[str, str]:
        """Return what Polars and other users of object_store are told."""
        options = {
            "aws_endpoint_url": self.endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "aws_region": self.region or ("us-east-1" if self.endpoint else None),
            "aws_allow_http": "true" if (self.endpoint or "").startswith("http:") else None,
        }
        return {name: value for name, value in options.items() if value}


def store_at(url: str, access: S3Access) -> Store:
    """Return the store at an address, not open.

    Args:
        url: a folder, or `s3://BUCKET[/PREFIX]`.
        access: how to reach it where it is S3.
    """
    from blueflow.lake.address import store_of  # noqa: PLC0415 - a folder needs no S3

    if not url.startswith("s3://"):
        return store_of(url)
    from blueflow.lake.s3 import S3Options  # noqa: PLC0415 - as above

    region = access.region or "us-east-1"
    return store_of(url, S3Options(access.endpoint, access.access_key, access.secret_key, region))
