"""Where things are in a lake. Pure: no store, no clock.

    fresh/<dataset>/year=YYYY/month=MM/day=DD/hour=HH/<pipeline>-<i>-of-<n>-<record>.parquet
    raw/<dataset>/year=YYYY/month=MM/day=DD/hour=HH/<dataset>-YYYYMMDDTHH-<version>-<part>.parquet
    raw/<dataset>/year=YYYY/month=MM/day=DD/hour=HH/_complete-<version>.json
    _blueflow/lake.json
    _blueflow/logs/<pipeline>/<i>-of-<n>/<10^12 - record>-<record>.json
    _blueflow/hours/<dataset>/YYYY-MM-DDTHH/<version>.json

Everything in an hour is by event time, UTC. Keys are relative to the lake's URL, with `/`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from blueflow.files.layout import HOUR_US
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Iterator

FRESH: Final = "fresh"
RAW: Final = "raw"
BOOKKEEPING: Final = "_blueflow"
DESCRIPTION: Final = f"{BOOKKEEPING}/lake.json"
LOGS: Final = f"{BOOKKEEPING}/logs/"
HOURS: Final = f"{BOOKKEEPING}/hours/"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBERS_END: Final = 10**12
_HOUR: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d)")
_FOLDER: Final = re.compile(
    r"(fresh|raw)/([a-z]+)/year=(\d{4})/month=(\d\d)/day=(\d\d)/hour=(\d\d)/([^/]+)"
)
_FRESH_NAME: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)-(\d+)-of-(\d+)-(\d{12})\.parquet")
_RAW_NAME: Final = re.compile(r"([a-z]+)-(\d{8}T\d\d)-(\d{6})-(\d{2,})\.parquet")
_MARKER_NAME: Final = re.compile(r"_complete-(\d{6})\.json")
_SHARD: Final = re.compile(r"(\d+)-of-(\d+)")
_RECORD_KEY: Final = re.compile(r"_blueflow/logs/([^/]+)/(\d+)-of-(\d+)/\d{12}-(\d{12})\.json")


class Shard(NamedTuple):
    """One writer's part of a lake: a pipeline's input, divided in `total`; `ordinal` is from 0."""

    pipeline: str
    ordinal: int = 0
    total: int = 1

    def __str__(self) -> str:
        return f"{self.pipeline}/{self.ordinal}-of-{self.total}"

    @property
    def log(self) -> str:
        """What the keys of its log's records begin with."""
        return f"{LOGS}{self}/"


class FreshName(NamedTuple):
    """What the name of a file in `fresh/` says: who wrote it, and in which record."""

    shard: Shard
    number: int


def hour_folder(root: str, dataset: str, hour: int) -> str:
    """Return what the keys of an hour's files begin with.

    Args:
        root: `fresh` or `raw`.
        dataset: one of `blueflow.records.DATASETS`.
        hour: hours since 1970.
    """
    return f"{root}/{dataset}/{_folder(hour)}/"


def day_folder(root: str, dataset: str, hour: int) -> str:
    """Return what the keys of the day of an hour begin with."""
    return f"{root}/{dataset}/{_folder(hour).rpartition('/')[0]}/"


def fresh_key(shard: Shard, number: int, dataset: str, hour: int) -> str:
    """Return where the rows of a dataset and hour go that record `number` of a shard publishes."""
    name = f"{shard.pipeline}-{shard.ordinal}-of-{shard.total}-{number:012d}.parquet"
    return hour_folder(FRESH, dataset, hour) + name


def raw_key(dataset: str, hour: int, version: int, part: int) -> str:
    """Return where a part (from 1) of what version `version` of an hour adds goes."""
    name = f"{dataset}-{_time(hour):%Y%m%dT%H}-{version:06d}-{part:02d}.parquet"
    return hour_folder(RAW, dataset, hour) + name


def marker_key(dataset: str, hour: int, version: int) -> str:
    """Return the key of an hour's marker; the highest version counts."""
    return f"{hour_folder(RAW, dataset, hour)}_complete-{version:06d}.json"


def record_key(shard: Shard, number: int) -> str:
    """Return the key of a shard's record; the newest comes first in the order of keys.

    So one key is all that a start has to list, whatever the length of the log.
    """
    return f"{shard.log}{_NUMBERS_END - number:012d}-{number:012d}.json"


def hour_log(dataset: str, hour: int) -> str:
    """Return what the keys of the log of an hour begin with."""
    return f"{HOURS}{dataset}/{hour_name(hour)}/"


def hour_key(dataset: str, hour: int, version: int) -> str:
    """Return the key of a record in the log of an hour; they rise."""
    return f"{hour_log(dataset, hour)}{version:06d}.json"


def shard_of(name: str, pipeline: str) -> Shard | None:
    """Return the shard whose log is the folder `name`, as in `0-of-1`; None for other names."""
    match = _SHARD.fullmatch(name)
    return Shard(pipeline, int(match[1]), int(match[2])) if match else None


def record_number(key: str) -> int | None:
    """Return the number of the record at a key; None for other keys."""
    match = _RECORD_KEY.fullmatch(key)
    return int(match[4]) if match else None


def place_of(key: str) -> tuple[str, str, int, str] | None:
    """Return root, dataset, hour and name of a key in either root; None for foreign keys."""
    match = _FOLDER.fullmatch(key)
    if match is None or match[2] not in DATASETS:
        return None
    hour = parse_hour(f"{match[3]}-{match[4]}-{match[5]}T{match[6]}")
    return None if hour is None else (match[1], match[2], hour, match[7])


def parse_fresh(name: str) -> FreshName | None:
    """Return what the name of a file in `fresh/` says; None for foreign files."""
    match = _FRESH_NAME.fullmatch(name)
    if match is None:
        return None
    return FreshName(Shard(match[1], int(match[2]), int(match[3])), int(match[4]))


def parse_raw(name: str) -> tuple[int, int] | None:
    """Return version and part of a file in `raw/`; None for foreign files."""
    match = _RAW_NAME.fullmatch(name)
    return (int(match[3]), int(match[4])) if match else None


def parse_marker(name: str) -> int | None:
    """Return the version that a marker's name says; None for other files."""
    match = _MARKER_NAME.fullmatch(name)
    return int(match[1]) if match else None


def hour_name(hour: int) -> str:
    """Return an hour as people write it, `2026-07-04T16`."""
    return f"{_time(hour):%Y-%m-%dT%H}"


def parse_hour(name: str) -> int | None:
    """Return what `hour_name` was given; None for other text."""
    match = _HOUR.fullmatch(name)
    if match is None:
        return None
    try:
        year, month, day, hour = map(int, match.groups())
        since = datetime(year, month, day, hour, tzinfo=UTC) - _EPOCH
    except ValueError:
        return None
    return since // timedelta(hours=1)


def hours_between(start: datetime, end: datetime) -> Iterator[int]:
    """Return every hour with a moment in [start, end)."""
    first = (start - _EPOCH) // timedelta(hours=1)
    last = -((_EPOCH - end) // timedelta(hours=1))
    return iter(range(first, last))


def end_us(hour: int) -> int:
    """Return when an hour ends, microseconds since 1970."""
    return (hour + 1) * HOUR_US


def _time(hour: int) -> datetime:
    return _EPOCH + timedelta(hours=hour)


@lru_cache(maxsize=4096)
def _folder(hour: int) -> str:
    return f"{_time(hour):year=%Y/month=%m/day=%d/hour=%H}"
