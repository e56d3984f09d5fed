"""blueflow turns the AT Protocol firehose (Bluesky) into data people can use.

Every public name is loaded when it is first used, so that importing one room does not load the
libraries of the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blueflow import kafka as kafka
    from blueflow import lake as lake
    from blueflow.client import Firehose, firehose
    from blueflow.errors import BlueflowError
    from blueflow.events import Account, Event, Identity, Info, Position, RepoOp, Sync
    from blueflow.interfaces import Batch, Sink, Source
    from blueflow.kafka.sink import KafkaSink as KafkaSink
    from blueflow.lake.writer import LakeWriter as LakeWriter
    from blueflow.pipeline import pump
    from blueflow.source.firehose import FirehoseSource

__all__ = [
    "Account",
    "Batch",
    "BlueflowError",
    "Event",
    "Firehose",
    "FirehoseSource",
    "Identity",
    "Info",
    "Position",
    "RepoOp",
    "Sink",
    "Source",
    "Sync",
    "firehose",
    "pump",
]

_HOMES = {
    **dict.fromkeys(("Firehose", "firehose"), "blueflow.client"),
    **dict.fromkeys(("BlueflowError",), "blueflow.errors"),
    **dict.fromkeys(
        ("Account", "Event", "Identity", "Info", "Position", "RepoOp", "Sync"), "blueflow.events"
    ),
    **dict.fromkeys(("Batch", "Sink", "Source"), "blueflow.interfaces"),
    **dict.fromkeys(("pump",), "blueflow.pipeline"),
    **dict.fromkeys(("FirehoseSource",), "blueflow.source.firehose"),
}


# Not in __all__, since they need an extra: `from blueflow import *` works without any.
_ROOMS = ("kafka", "lake")
_EXTRAS = {"KafkaSink": "blueflow.kafka", "LakeWriter": "blueflow.lake"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"blueflow.{name}")
    home = _HOMES.get(name) or _EXTRAS.get(name)
    if home is None:
        if name == "__version__":
            return import_module("blueflow.config").version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, *_EXTRAS, "__version__"})
