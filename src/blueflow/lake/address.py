"""From the address of a lake to its store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blueflow.errors import LakeUrlError, MissingExtraError
from blueflow.lake.local import LocalStore
from blueflow.masking import mask_credentials

if TYPE_CHECKING:
    from blueflow.lake.s3client import S3Options
    from blueflow.lake.store import Store
    from blueflow.metrics import LakeMetrics


def store_of(url: str, s3: S3Options | None = None, metrics: LakeMetrics | None = None) -> Store:
    """Return the store that an address means, not open.

    Args:
        url: `s3://BUCKET[/PREFIX]`, or a folder.
        s3: how to reach the S3 server; by default what the environment says.
        metrics: counts what is tried again.

    Raises:
        LakeUrlError: there is no store in it.
        MissingExtraError: the extra `lake` is not installed.
    """
    if url.startswith("s3://"):
        try:
            from blueflow.lake.s3 import S3Store  # noqa: PLC0415 - a folder needs no S3 client
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("blueflow"):
                raise
            raise MissingExtraError("lake", "lakes on S3") from error
        return S3Store(url, s3, metrics)
    path = url.removeprefix("file://")
    if not path or "://" in path or "\0" in path:
        problem = "it names neither a folder nor a bucket"
        raise LakeUrlError(mask_credentials(url), problem)
    return LocalStore(Path(path).expanduser())
