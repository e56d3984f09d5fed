"""Removing what is older than the lake keeps.

What a version holds goes once a record in the hour's log says so: first the markers, so that no
hour is promised whole that is not, then the files. The record also names files of `fresh/` that no
version has, so that a writer that recovers does not miss them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from blueflow.lake.hours import Hour
from blueflow.lake.layout import (
    FRESH,
    RAW,
    end_us,
    hour_folder,
    hour_key,
    parse_hour,
    parse_marker,
    parse_raw,
    raw_key,
)
from blueflow.lake.logrecord import HourRecord, encode
from blueflow.lake.survey import (
    folders_below,
    fresh_files,
    has_marker,
    hour_folders,
    hour_records,
)
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from blueflow.lake.store import Object, Store

PROCESSED: Final = "processed"
_DAY_S: Final = 86_400.0
_HOUR: Final = 4
_FOLDERS_DEEP_MAX: Final = 4  # above the years, as in processed/trends/<name>/


class Expired(msgspec.Struct):
    """What `expire` removed, or would.

    Attributes:
        hours: of data sets in `raw/` and `fresh/`.
        files: Parquet files, of all roots.
        bytes: of these files.
        processed_hours: in `processed/`.
        busy: hours that a compactor is at; it has to finish first.
    """

    hours: int = 0
    files: int = 0
    bytes: int = 0
    processed_hours: int = 0
    busy: list[str] = []


async def expire(
    store: Store,
    *,
    now_s: float,
    instance: str,
    raw_days: float = 90,
    processed_days: float = 365,
    dry_run: bool = False,
) -> Expired:
    """Remove the hours that ended longer ago than the lake keeps them.

    Killed anywhere and run again it comes to the same end. Files that others put there stay.

    Args:
        store: holds the lake.
        now_s: seconds since 1970.
        instance: who we are, for the records.
        raw_days: how long `raw/` keeps an hour, and `fresh/`.
        processed_days: how long `processed/` does.
        dry_run: remove nothing, and say what would be.

    Raises:
        ValueError: a number of days is negative.
        CommitLogError: the log of an hour is damaged.
        BlueflowError: what the store raises.
    """
    for name, days in (("raw_days", raw_days), ("processed_days", processed_days)):
        if not days >= 0:
            raise ValueError(f"{name} is {days}; it is how many days are kept")
    result = Expired()
    for dataset in DATASETS:
        hours = {hour async for hour in hour_folders(store, RAW, dataset)}
        hours |= {hour async for hour in hour_folders(store, FRESH, dataset)}
        for hour in sorted(hours):
            if end_us(hour) <= (now_s - raw_days * _DAY_S) * 1e6:
                await _expire_hour(store, Hour(dataset, hour), result, (now_s, instance, dry_run))
    before_us = (now_s - processed_days * _DAY_S) * 1e6
    await _expire_processed(store, f"{PROCESSED}/", before_us, result, dry_run=dry_run)
    return result


async def _expire_hour(
    store: Store, hour: Hour, result: Expired, how: tuple[float, str, bool]
) -> None:
    now_s, instance, dry_run = how
    records = await hour_records(store, hour)
    compacted = bool(records) and records[-1].kind == "compacted"
    if compacted and not await has_marker(store, hour, len(records)):
        result.busy.append(str(hour))
        return
    fresh = await fresh_files(store, hour)
    named = {key for record in records for key in record.inputs}
    new = tuple(sorted(fresh.keys() - named))
    if new or compacted:
        record = HourRecord(len(records) + 1, "expired", instance, now_s, inputs=new)
        if not dry_run and not await store.put_new(hour_key(*hour, record.version), encode(record)):
            result.busy.append(str(hour))
            return
        records.append(record)
    if records:
        await _remove(store, hour, records, result, dry_run=dry_run)


async def _remove(
    store: Store,
    hour: Hour,
    records: list[HourRecord],
    result: Expired,
    *,
    dry_run: bool,
) -> None:
    """Remove what the versions up to the last one hold, which made the hour expire."""
    version = records[-1].version
    folder = hour_folder(RAW, *hour)
    found = await store.list(folder)
    markers = [one for one in found if 0 < (parse_marker(_name(one)) or 0) <= version]
    files = [one for one in found if _is_of(one, hour, version)]
    named = {key for record in records for key in record.inputs}
    files += [one for one in await store.list(hour_folder(FRESH, *hour)) if one.key in named]
    if not markers and not files:
        return
    result.hours += 1
    result.files += len(files)
    result.bytes += sum(one.size for one in files)
    if not dry_run:
        # By version: the newest marker that is left promises nothing that is gone.
        for keys in ([one.key for one in markers], [one.key for one in files]):
            if keys:
                await store.delete(keys)


async def _expire_processed(
    store: Store, prefix: str, before_us: float, result: Expired, *, dry_run: bool, depth: int = 0
) -> None:
    async for folder in folders_below(store, prefix, _HOUR):
        hour = _hour_of(folder)
        if hour is None or end_us(hour) > before_us:
            continue
        found = [one for one in await store.list(folder) if _is_processed(one)]
        if not found:
            continue
        result.processed_hours += 1
        result.files += len(found)
        result.bytes += sum(one.size for one in found)
        if not dry_run:
            await store.delete([one.key for one in found])
    if depth < _FOLDERS_DEEP_MAX:
        for name in await store.folders(prefix):
            if "=" not in name:
                below = f"{prefix}{name}/"
                await _expire_processed(
                    store, below, before_us, result, dry_run=dry_run, depth=depth + 1
                )


def _hour_of(folder: str) -> int | None:
    year, month, day, hour = (part.partition("=")[2] for part in folder.split("/")[-5:-1])
    return parse_hour(f"{year}-{month}-{day}T{hour}")


def _is_of(one: Object, hour: Hour, version: int) -> bool:
    parsed = parse_raw(_name(one))
    return parsed is not None and parsed[0] <= version and one.key == raw_key(*hour, *parsed)


def _is_processed(one: Object) -> bool:
    name = _name(one)
    return name.endswith(".parquet") or parse_marker(name) is not None


def _name(one: Object) -> str:
    return one.key.rpartition("/")[2]
