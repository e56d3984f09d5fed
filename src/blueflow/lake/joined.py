"""Both roots of a lake as one: what a reader reads of each hour."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import anyio

from blueflow.errors import CommitLogError, NoLakeError, OutputNotWritableError
from blueflow.lake.layout import (
    DESCRIPTION,
    FRESH,
    RAW,
    day_folder,
    hour_folder,
    marker_key,
    parse_fresh,
    parse_marker,
    parse_raw,
    place_of,
)
from blueflow.lake.logrecord import Description, Marker, decode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from blueflow.lake.span import Span
    from blueflow.lake.store import Object, Store

REQUESTS: Final = 16  # at the same time
TRIES: Final = 5  # each finds that the keeper expired an hour in between
MARKERS_KEPT: Final = 20_000  # in memory, a kilobyte each; markers are never rewritten
_HOURS_LISTED: Final = 6  # longer spans are listed by the day
_DAYS_LISTED: Final = 31  # and longer ones in one go

_A = TypeVar("_A")
_T = TypeVar("_T")


class Hour(NamedTuple):
    """One hour of a dataset.

    Attributes:
        hour: since 1970.
        marker: the newest one; None while the hour is not marked.
        raw: its files in `raw/` that the marker names.
        fresh: its files in `fresh/` that no file in `raw/` covers.
    """

    hour: int
    marker: Marker | None
    raw: tuple[Object, ...]
    fresh: tuple[Object, ...]


class Joined:
    """Lists what there is to read; each row is in it once, whatever the keeper does meanwhile.

    Args:
        store: holds the lake.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._markers: dict[str, Marker] = {}

    async def hours(self, dataset: str, span: Span) -> list[Hour]:
        """Return the hours of a dataset that have files or a marker, in order.

        Raises:
            CommitLogError: a marker is damaged, or names a file that is not there.
            BlueflowError: what the store raises.
        """
        missing = ""
        for _ in range(TRIES):
            # In this order: a file that the keeper moves on in between is then seen in raw/ at
            # least, and what the marker covers is left out of what was seen in fresh/.
            fresh = await self._listed(FRESH, dataset, span)
            raw = await self._listed(RAW, dataset, span)
            markers = await self._newest_markers(dataset, raw)
            if None in markers.values():  # expired in between
                missing = next(key for key, marker in markers.items() if marker is None)
                continue
            hours = [
                _hour(hour, markers.get(_marker_of(dataset, hour, raw)), fresh, raw)
                for hour in sorted({*fresh, *raw})
            ]
            lacking = next(filter(None, map(_lacking, hours)), None)
            if lacking is None:
                return [one for one in hours if one.marker or one.fresh]
            missing = lacking
        raise CommitLogError(f"{self._store.url}/{missing}", "a marker names it, it is not there")

    async def _listed(self, root: str, dataset: str, span: Span) -> dict[int, list[Object]]:
        found: dict[int, list[Object]] = defaultdict(list)
        for objects in await each(self._store.list, _prefixes(root, dataset, span)):
            for one in objects:
                place = place_of(one.key)
                if place is not None and span.touches(place[2]):
                    found[place[2]].append(one)
        return found

    async def _newest_markers(
        self, dataset: str, raw: Mapping[int, Sequence[Object]]
    ) -> dict[str, Marker | None]:
        keys = [key for hour in raw if (key := _marker_of(dataset, hour, raw))]
        unknown = [key for key in keys if key not in self._markers]
        for key, data in zip(unknown, await each(self._store.get, unknown), strict=True):
            if data is not None:
                self._markers[key] = decode(f"{self._store.url}/{key}", Marker, data)
        found = {key: self._markers.get(key) for key in keys}
        while len(self._markers) > MARKERS_KEPT:
            del self._markers[next(iter(self._markers))]
        return found


async def open_to_read(store: Store) -> Description:
    """Open a store and return what the lake says of itself.

    Raises:
        NoLakeError: there is no lake.
        CommitLogError: its description is damaged.
        BlueflowError: what the store raises.
    """
    try:
        await store.open(create=False)
    except OutputNotWritableError as error:
        raise NoLakeError(store.url) from error
    data = await store.get(DESCRIPTION)
    if data is None:
        raise NoLakeError(store.url)
    return decode(f"{store.url}/{DESCRIPTION}", Description, data)


async def each(
    call: Callable[[_A], Awaitable[_T]], arguments: Sequence[_A], limit: int = REQUESTS
) -> list[_T]:
    """Return what `call` returns for each argument, in order; `limit` calls at the same time."""
    results: dict[int, _T] = {}
    waiting = iter(enumerate(arguments))

    async def work() -> None:
        for index, argument in waiting:
            results[index] = await call(argument)

    async with anyio.create_task_group() as tasks:
        for _ in range(min(limit, len(arguments))):
            tasks.start_soon(work)
    return [results[index] for index in range(len(arguments))]


def _prefixes(root: str, dataset: str, span: Span) -> list[str]:
    hours = span.hours()
    if hours is None:
        return [f"{root}/{dataset}/"]
    first = list(islice(hours, _DAYS_LISTED * 24 + 1))
    if len(first) <= _HOURS_LISTED:
        return [hour_folder(root, dataset, hour) for hour in first]
    if len(first) <= _DAYS_LISTED * 24:
        return list(dict.fromkeys(day_folder(root, dataset, hour) for hour in first))
    return [f"{root}/{dataset}/"]


def _marker_of(dataset: str, hour: int, raw: Mapping[int, Sequence[Object]]) -> str:
    """Return the key of an hour's newest marker; empty when it has none."""
    versions = [parse_marker(_name(one)) for one in raw.get(hour, ())]
    newest = max((version for version in versions if version is not None), default=None)
    return "" if newest is None else marker_key(dataset, hour, newest)


def _hour(
    hour: int,
    marker: Marker | None,
    fresh: Mapping[int, Sequence[Object]],
    raw: Mapping[int, Sequence[Object]],
) -> Hour:
    files = set(marker.files) if marker else set()
    covers = set(marker.covers) if marker else set()
    return Hour(
        hour,
        marker,
        tuple(one for one in raw.get(hour, ()) if _name(one) in files and parse_raw(_name(one))),
        tuple(
            one
            for one in fresh.get(hour, ())
            if parse_fresh(_name(one)) and _name(one) not in covers
        ),
    )


def _lacking(hour: Hour) -> str | None:
    """Return the key of a file that an hour's marker names and that is not there."""
    if hour.marker is None:
        return None
    there = set(map(_name, hour.raw))
    folder = hour_folder(RAW, hour.marker.dataset, hour.hour)
    return next((folder + name for name in hour.marker.files if name not in there), None)


def _name(one: Object) -> str:
    return one.key.rpartition("/")[2]
