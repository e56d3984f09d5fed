"""The lake: Parquet on S3 or in a folder that plain readers can trust. Needs the extra `lake`.

Names are loaded when they are first used, as in `blueflow`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blueflow.errors import MissingExtraError

if TYPE_CHECKING:
    from blueflow.lake.reading import DataFile, Lake, open  # noqa: A004 - `blueflow.lake.open`
    from blueflow.lake.s3client import S3Options
    from blueflow.lake.statistics import DatasetStats, LakeStats
    from blueflow.lake.verify import Finding
    from blueflow.lake.writer import LakeWriter

__all__ = [
    "DataFile",
    "DatasetStats",
    "Finding",
    "Lake",
    "LakeStats",
    "LakeWriter",
    "S3Options",
    "open",
]

_HOMES = {
    "DataFile": "reading",
    "DatasetStats": "statistics",
    "Finding": "verify",
    "Lake": "reading",
    "LakeStats": "statistics",
    "LakeWriter": "writer",
    "S3Options": "s3client",
    "open": "reading",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("blueflow"):
            raise
        raise MissingExtraError("lake", "lakes") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
