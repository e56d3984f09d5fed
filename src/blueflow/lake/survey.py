"""What there is of the hours of a lake: files, markers and records."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from blueflow.errors import CommitLogError
from blueflow.lake.hours import Hour, HourFiles
from blueflow.lake.layout import (
    FRESH,
    RAW,
    hour_folder,
    hour_key,
    hour_log,
    marker_key,
    parse_fresh,
    parse_marker,
    place_of,
)
from blueflow.lake.logrecord import HourRecord, Marker, decode
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blueflow.lake.store import Store

_MARKERS_KEPT: Final = 4096  # in memory; six data sets of a month
_LEVELS: Final = (r"year=\d{4}", r"month=\d\d", r"day=\d\d", r"hour=\d\d")
_DAY, _HOUR = 3, 4


class Survey:
    """Looks at all hours with files in `fresh/`. It remembers markers: they never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._markers: dict[str, Marker] = {}

    async def look(self) -> dict[Hour, HourFiles]:
        """Return what is visible of every dataset's hour that has a file of ours in `fresh/`.

        The hours of these hours' other datasets are there too, when they have a marker.

        Raises:
            CommitLogError: a marker is damaged.
            BlueflowError: what the store raises.
        """
        fresh: dict[Hour, dict[str, float]] = defaultdict(dict)
        days: set[str] = set()
        for dataset in DATASETS:
            async for day in folders_below(self._store, f"{FRESH}/{dataset}/", _DAY):
                for found in await self._store.list(day):
                    place = place_of(found.key)
                    if place is not None and parse_fresh(place[3]):
                        fresh[Hour(dataset, place[2])][found.key] = found.modified_s
                        days.add(day.partition(dataset)[2])
        hours = {hour.hour for hour in fresh}
        markers: dict[Hour, Marker] = {}
        for dataset in DATASETS:
            for day in sorted(days):
                newest = await self._newest(f"{RAW}/{dataset}{day}", hours)
                for hour, key in newest.items():
                    marker = await self._marker(key)
                    if marker is not None:
                        markers[Hour(dataset, hour)] = marker
        return {
            hour: HourFiles(fresh.get(hour, {}), markers.get(hour)) for hour in {*fresh, *markers}
        }

    async def _newest(self, day: str, hours: set[int]) -> dict[int, str]:
        """Return the key of each hour's newest marker."""
        newest: dict[int, str] = {}
        for found in await self._store.list(day):
            place = place_of(found.key)
            if place is not None and place[2] in hours and parse_marker(place[3]):
                newest[place[2]] = found.key  # they come by version
        return newest

    async def _marker(self, key: str) -> Marker | None:
        if key not in self._markers:
            data = await self._store.get(key)
            if data is None:  # it expired just now
                return None
            while len(self._markers) >= _MARKERS_KEPT:
                del self._markers[next(iter(self._markers))]
            self._markers[key] = decode(key, Marker, data)
        return self._markers[key]


async def folders_below(store: Store, prefix: str, depth: int) -> AsyncIterator[str]:
    """Yield the keys' beginnings of the dated folders below `prefix`, by time.

    Args:
        store: holds the lake.
        prefix: ends with `/`; the folders of the years are right below.
        depth: 3 for days, 4 for hours.
    """
    level = len(re.findall(r"(?:year|month|day)=\d+/", prefix))
    for name in await store.folders(prefix):
        if re.fullmatch(_LEVELS[level], name):
            if level + 1 == depth:
                yield f"{prefix}{name}/"
            else:
                async for folder in folders_below(store, f"{prefix}{name}/", depth):
                    yield folder


async def hour_folders(store: Store, root: str, dataset: str) -> AsyncIterator[int]:
    """Yield the hours of which a root has a folder, oldest first."""
    async for folder in folders_below(store, f"{root}/{dataset}/", _HOUR):
        place = place_of(f"{folder}x")
        if place is not None:
            yield place[2]


async def fresh_files(store: Store, hour: Hour) -> dict[str, int]:
    """Return the sizes of our files of an hour in `fresh/`, by key."""
    folder = hour_folder(FRESH, *hour)
    return {
        found.key: found.size
        for found in await store.list(folder)
        if parse_fresh(found.key[len(folder) :])
    }


async def hour_records(store: Store, hour: Hour) -> list[HourRecord]:
    """Return the records of an hour's log, by version.

    Raises:
        CommitLogError: one is damaged, or missing.
        BlueflowError: what the store raises.
    """
    records: list[HourRecord] = []
    for found in await store.list(hour_log(*hour)):
        if not re.fullmatch(r"\d{6}\.json", found.key.rpartition("/")[2]):
            continue  # somebody else's file
        version = len(records) + 1
        data = await store.get(found.key)
        if data is None or found.key != hour_key(*hour, version):
            raise CommitLogError(hour_key(*hour, version), "it is missing, and others are there")
        record = decode(found.key, HourRecord, data)
        if record.version != version:
            raise CommitLogError(found.key, f"it holds version {record.version}")
        records.append(record)
    return records


async def has_marker(store: Store, hour: Hour, version: int) -> bool:
    """Tell whether a version of an hour has its marker."""
    return await store.head(marker_key(*hour, version)) is not None
