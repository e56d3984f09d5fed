"""What a lake's own records, markers and files say, side by side, for `verify`."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio.to_thread
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from blueflow.errors import CommitLogError
from blueflow.lake.joined import each
from blueflow.lake.layout import (
    FRESH,
    HOURS,
    LOGS,
    RAW,
    Shard,
    hour_key,
    parse_fresh,
    parse_hour,
    parse_marker,
    parse_raw,
    place_of,
    raw_key,
    record_key,
    record_number,
)
from blueflow.lake.logrecord import HourRecord, Marker, ShardRecord, decode
from blueflow.lake.store import Object, PendingUpload
from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blueflow.lake.store import Store

HourOf = tuple[str, int]  # dataset, and hours since 1970

_FILES_AT_ONCE: Final = 8
_RECORD: Final = re.compile(r"_blueflow/logs/([^/]+)/(\d+)-of-(\d+)/")
_VERSION: Final = re.compile(r"_blueflow/hours/([a-z]+)/([^/]+)/(\d{6})\.json")

_T = TypeVar("_T", ShardRecord, HourRecord, Marker)


class Evidence(msgspec.Struct):
    """What there is.

    Attributes:
        logs: the records of each shard's log, by number.
        hours: the records of each hour's log, by version.
        markers: those of each hour, by version.
        fresh: our files in `fresh/`, by key.
        raw: our files in `raw/`, by key.
        foreign: keys in our folders that are no names of ours.
        damaged: what is wrong with a record or a marker, by key.
        uploads: that nobody completed.
        contents: the rows of files, by key, or what is wrong with one.
        checksums: of files that were read whole.
    """

    logs: dict[Shard, dict[int, ShardRecord]] = {}
    hours: dict[HourOf, dict[int, HourRecord]] = {}
    markers: dict[HourOf, dict[int, Marker]] = {}
    fresh: dict[str, Object] = {}
    raw: dict[str, Object] = {}
    foreign: list[str] = []
    damaged: dict[str, str] = {}
    uploads: list[PendingUpload] = []
    contents: dict[str, int | str] = {}
    checksums: dict[str, str] = {}


async def gather(store: Store, *, deep: bool) -> Evidence:
    """Look at everything; nothing is changed.

    The logs of the shards come first, then the files, then the logs of the hours: what moves on
    while this looks is then explained by what is looked at later.

    Args:
        store: holds the lake.
        deep: read all files whole.

    Raises:
        BlueflowError: what the store raises.
    """
    evidence = Evidence()
    await _gather_logs(store, evidence)
    for root in (FRESH, RAW):
        for found in await store.list(f"{root}/"):
            _sort_in(evidence, found)
    await _gather_markers(store, evidence)
    await _gather_hours(store, evidence)
    evidence.uploads = list(await store.uploads(""))
    await _look_again(store, evidence)
    await _gather_contents(store, evidence, deep=deep)
    return evidence


async def _gather_logs(store: Store, evidence: Evidence) -> None:
    keys = [found.key for found in await store.list(LOGS)]
    places: list[tuple[str, Shard, int]] = []
    for key in keys:
        match, number = _RECORD.match(key), record_number(key)
        if match is None or number is None:
            evidence.foreign.append(key)
            continue
        shard = Shard(match[1], int(match[2]), int(match[3]))
        places.append((key, shard, number))
    found = await _read_all(store, ShardRecord, [key for key, *_ in places], evidence)
    for key, shard, number in places:
        log, record = evidence.logs.setdefault(shard, {}), found.get(key)
        if record is None:
            continue
        if record.number != number or key != record_key(shard, number):
            evidence.damaged[key] = f"it holds record {record.number}"
        else:
            log[number] = record


async def _gather_hours(store: Store, evidence: Evidence) -> None:
    places: list[tuple[str, HourOf, int]] = []
    for one in await store.list(HOURS):
        match = _VERSION.fullmatch(one.key)
        hour = parse_hour(match[2]) if match else None
        if match is None or hour is None or match[1] not in DATASETS:
            evidence.foreign.append(one.key)
        else:
            places.append((one.key, (match[1], hour), int(match[3])))
    found = await _read_all(store, HourRecord, [key for key, *_ in places], evidence)
    for key, hour_of, version in places:
        log, record = evidence.hours.setdefault(hour_of, {}), found.get(key)
        if record is None:
            continue
        if record.version != version or key != hour_key(*hour_of, version):
            evidence.damaged[key] = f"it holds version {record.version}"
        else:
            log[version] = record


def _sort_in(evidence: Evidence, found: Object) -> None:
    """Note a file of ours, an empty marker to be read, or a foreign file."""
    place = place_of(found.key)
    if place is not None:
        root, dataset, hour, name = place
        part = parse_raw(name)
        if root == FRESH and parse_fresh(name):
            evidence.fresh[found.key] = found
            return
        if root == RAW and part and found.key == raw_key(dataset, hour, *part):
            evidence.raw[found.key] = found
            return
        if root == RAW and parse_marker(name):
            evidence.markers.setdefault((dataset, hour), {})
            evidence.raw[found.key] = found  # moved to the markers when it is read
            return
    evidence.foreign.append(found.key)


async def _gather_markers(store: Store, evidence: Evidence) -> None:
    keys = [key for key in evidence.raw if parse_marker(_name(key))]
    for key in keys:
        del evidence.raw[key]
    found = await _read_all(store, Marker, keys, evidence)
    for key, marker in found.items():
        place = place_of(key)
        if place is not None:
            version = parse_marker(place[3]) or 0
            if (marker.dataset, parse_hour(marker.hour), marker.version) != (*place[1:3], version):
                evidence.damaged[key] = f"it is of {marker.dataset}, {marker.hour}"
            else:
                evidence.markers[place[1], place[2]][version] = marker


async def _read_all(
    store: Store, kind: type[_T], keys: Sequence[str], evidence: Evidence
) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for key, data in zip(keys, await each(store.get, keys), strict=True):
        if data is None:
            continue  # trimmed or expired since it was listed
        try:
            found[key] = decode(key, kind, data)
        except CommitLogError as error:
            evidence.damaged[key] = error.problem
    return found


async def _look_again(store: Store, evidence: Evidence) -> None:
    """See what appeared since the files were listed, and the records that name new files."""
    named = {
        file.key
        for record in _records(evidence)
        for file in (record.files if isinstance(record, ShardRecord) else record.outputs)
    }
    superseded = {key for log in evidence.hours.values() for r in log.values() for key in r.inputs}
    explained = {*evidence.fresh, *evidence.raw, *superseded}
    for found in await each(store.head, sorted(named - explained)):
        if found is not None:
            _sort_in(evidence, found)
    newest: dict[Shard, int] = {}
    for key in evidence.fresh:
        name = parse_fresh(_name(key))
        if name is not None:
            newest[name.shard] = max(name.number, newest.get(name.shard, 0))
    for shard, number in newest.items():
        await _read_on(store, shard, number, evidence)


async def _read_on(store: Store, shard: Shard, number: int, evidence: Evidence) -> None:
    """Read the records that were written since, up to one that a file names."""
    log = evidence.logs.get(shard, {})
    following = max(log, default=number) + 1
    while following <= number:
        key = record_key(shard, following)
        records = await _read_all(store, ShardRecord, [key], evidence)
        if key not in records:
            return
        log[following] = records[key]
        following += 1


async def _gather_contents(store: Store, evidence: Evidence, *, deep: bool) -> None:
    filesystem, root = store.filesystem()

    async def look(key: str) -> tuple[int | str, str]:
        path = f"{root.rstrip('/')}/{key}"
        return await anyio.to_thread.run_sync(_content, filesystem, path, deep)

    keys = [*evidence.fresh, *evidence.raw]
    for key, (rows, checksum) in zip(keys, await each(look, keys, _FILES_AT_ONCE), strict=True):
        if rows == _GONE:  # swept or expired since it was listed
            evidence.fresh.pop(key, None)
            evidence.raw.pop(key, None)
            continue
        evidence.contents[key] = rows
        if checksum:
            evidence.checksums[key] = checksum


_GONE: Final = "gone"


def _content(filesystem: Any, path: str, deep: bool) -> tuple[int | str, str]:  # noqa: FBT001
    """Return a file's rows, or what is wrong with it; and its checksum if it is read whole."""
    try:
        with filesystem.open_input_file(path) as file:
            checksum = ""
            if deep:
                digest = sha256()
                while data := file.read(2**20):
                    digest.update(data)
                checksum = digest.hexdigest()
                file.seek(0)
            try:
                return pq.ParquetFile(file).metadata.num_rows, checksum
            except pa.ArrowException as error:
                return f"no Parquet file ({str(error).splitlines()[0][:120]})", checksum
    except FileNotFoundError:
        return _GONE, ""


def _records(evidence: Evidence) -> Iterator[ShardRecord | HourRecord]:
    for log in evidence.logs.values():
        yield from log.values()
    for hour in evidence.hours.values():
        yield from hour.values()


def _name(key: str) -> str:
    return key.rpartition("/")[2]
