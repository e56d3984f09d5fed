"""Uploads that nobody will complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blueflow.lake.hours import Hour
from blueflow.lake.layout import FRESH, RAW, hour_key, parse_fresh, parse_raw, place_of
from blueflow.lake.shardlogs import last_records
from blueflow.lake.survey import has_marker, hour_records

if TYPE_CHECKING:
    from blueflow.lake.store import PendingUpload, Store


async def abort_orphans(store: Store, *, upload_s: float, now_s: float) -> tuple[int, int]:
    """Give up uploads of ours that nobody will complete.

    An upload for `fresh/` is one when no shard's last record names it and it is older than
    `upload_s`; one for `raw/` as well, and at once when its version is finished without it.

    Args:
        store: holds the lake.
        upload_s: seconds.
        now_s: seconds since 1970.

    Returns:
        How many were given up, and how many uploads of ours are left.

    Raises:
        CommitLogError: a log is damaged; then nothing is given up that it may name.
        BlueflowError: what the store raises.
    """
    # First the uploads, then the logs: what is named later was not listed, or is too young.
    fresh = [one for one in await store.uploads(f"{FRESH}/") if _is_fresh(one)]
    raw = [(one, *_version(one)) for one in await store.uploads(f"{RAW}/") if _is_raw(one)]
    orphans: list[PendingUpload] = []
    old = [one for one in fresh if one.begun_s < now_s - upload_s]
    if old:
        last = (await last_records(store)).values()
        named = {file.staged.upload_id for record in last for file in record.files}
        orphans += (one for one in old if one.upload_id not in named)
    for upload, hour, version in raw:
        if await _is_finished(store, hour, version):
            orphans.append(upload)
        elif upload.begun_s < now_s - upload_s:
            records = await hour_records(store, hour)
            named = {file.staged.upload_id for one in records for file in one.outputs}
            if upload.upload_id not in named:
                orphans.append(upload)
    for upload in orphans:
        await store.abort(upload)
    return len(orphans), len(fresh) + len(raw) - len(orphans)


async def _is_finished(store: Store, hour: Hour, version: int) -> bool:
    """Tell whether a version has its marker, or a later one: then it has all its files."""
    if await has_marker(store, hour, version):
        return True
    return await store.head(hour_key(*hour, version + 1)) is not None


def _is_fresh(upload: PendingUpload) -> bool:
    place = place_of(upload.key)
    return place is not None and place[0] == FRESH and parse_fresh(place[3]) is not None


def _is_raw(upload: PendingUpload) -> bool:
    place = place_of(upload.key)
    return place is not None and place[0] == RAW and parse_raw(place[3]) is not None


def _version(upload: PendingUpload) -> tuple[Hour, int]:
    _, dataset, hour, name = place_of(upload.key) or ("", "", 0, "")
    return Hour(dataset, hour), (parse_raw(name) or (0, 0))[0]
