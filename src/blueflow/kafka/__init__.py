"""Kafka: the sink that writes every event once, and the reader for programs and notebooks.

Needs the extra `kafka`. Names are loaded when they are first used, as in `blueflow`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blueflow.errors import MissingExtraError

if TYPE_CHECKING:
    from blueflow.kafka.connection import Connection
    from blueflow.kafka.reader import EventBatch, Reader, read
    from blueflow.kafka.sink import KafkaSink
    from blueflow.kafka.topics import TopicWishes

__all__ = ["Connection", "EventBatch", "KafkaSink", "Reader", "TopicWishes", "read"]

_HOMES = {
    "Connection": "connection",
    "EventBatch": "reader",
    "KafkaSink": "sink",
    "Reader": "reader",
    "TopicWishes": "topics",
    "read": "reader",
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
        raise MissingExtraError("kafka", "the Kafka sink and reader") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
