"""What does not fit together in a lake. Pure: it looks at evidence, not at a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec

from blueflow.lake.layout import (
    Shard,
    hour_key,
    hour_log,
    marker_key,
    parse_fresh,
    place_of,
    record_key,
)
from blueflow.lake.logrecord import RECORDS_KEPT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from blueflow.lake.evidence import Evidence, HourOf
    from blueflow.lake.logrecord import HourRecord, LakeFile, Marker, ShardRecord

Severity: TypeAlias = Literal["error", "warning", "note"]

ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "note")
_RESTORE: Final = "Put it back from a copy; blueflow repairs no damage."
_RESTART: Final = "Start its writer: it finishes or repairs what its last record names."
_KEEPER: Final = "Nothing, if the keeper runs; else `blueflow lake compact`."
_EXPIRE_AGAIN: Final = "`blueflow lake expire` again: it goes on where it was interrupted."
_OLD_UPLOAD_S: Final = 3600.0


class Finding(msgspec.Struct, frozen=True):
    """Something that does not fit, or that an operator should know.

    Attributes:
        severity: "error": rows are missing, doubled or cannot be proven right; "warning": look at
            it; "note": nothing is wrong.
        where: a key, or the name of a log.
        what: the sentence.
        remedy: what to do.
    """

    severity: Severity
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}. {self.remedy}"


def findings(evidence: Evidence, *, now_s: float) -> list[Finding]:
    """Return what does not fit, errors first.

    Args:
        evidence: what there is.
        now_s: seconds since 1970.
    """
    found = [
        Finding("error", key, problem, _RESTORE)
        for key, problem in sorted(evidence.damaged.items())
    ]
    for shard in sorted(evidence.logs):
        found += _of_log(shard, evidence)
    rows_of = _rows(evidence)
    for hour in sorted({*evidence.hours, *evidence.markers}):
        found += _of_hour(hour, evidence, rows_of)
    found += _unnamed(evidence)
    found += [
        Finding(
            "warning",
            key,
            "it is not blueflow's",
            "Move it away: a plain glob reads whatever ends in .parquet.",
        )
        for key in sorted(evidence.foreign)
    ]
    found += _of_uploads(evidence, now_s)
    return by_severity(found)


def by_severity(found: list[Finding]) -> list[Finding]:
    """Return findings, errors first."""
    return sorted(found, key=lambda one: ORDER.index(one.severity))


def _of_log(shard: Shard, evidence: Evidence) -> Iterator[Finding]:
    log = evidence.logs[shard]
    last = max(log, default=0)
    repaired = {
        file.key for record in log.values() if record.repair for file in record.repair.files
    }
    # Older ones may have been left where a process ended before it removed them.
    first = max(min(log, default=1), last - RECORDS_KEPT + 1)
    for number in range(first, last + 1):
        key, record, before = record_key(shard, number), log.get(number), log.get(number - 1)
        if record is None:
            if key not in evidence.damaged:
                yield Finding(
                    "error", key, "this record is missing, and later ones are there", _RESTORE
                )
            continue
        if before is not None:
            yield from _against_the_one_before(key, record, before)
        for loss in record.lost:
            lost = f"{loss.first} up to {loss.end} of {loss.input} is accepted as lost: {loss.why}"
            yield Finding("note", key, lost, "Get it from elsewhere if you need it.")
        for file in record.files:
            yield from _of_published(file, evidence, last=number == last, repaired=repaired)


def _against_the_one_before(
    key: str, record: ShardRecord, before: ShardRecord
) -> Iterator[Finding]:
    rows = before.rows + sum(file.rows for file in record.files)
    size = before.bytes + sum(file.staged.size for file in record.files)
    if (record.rows, record.bytes) != (rows, size):
        said = _sums(record.rows, record.bytes, rows, size)
        yield Finding("error", key, said, _RESTORE)
    if before.kind == "seal" and record.kind != "claim":
        yield Finding("error", key, "a sealed log went on without a claim", _RESTORE)
    if record.kind == "commit":
        for name, since in record.since.items():
            was = before.inputs.get(name)
            if was is not None and was.next != since.next:
                said = f"{name} begins at {since.next}, and the record before ended at {was.next}"
                yield Finding("error", key, said, _RESTORE)


def _of_published(
    file: LakeFile, evidence: Evidence, *, last: bool, repaired: set[str]
) -> Iterator[Finding]:
    found = evidence.fresh.get(file.key)
    if found is not None:
        size = None if file.key in repaired else file.staged.size  # its rows may pack differently
        yield from _of_content(file, found.size, evidence, size)
        return
    records = evidence.hours.get((file.dataset, file.hour), {}).values()
    if any(file.key in record.inputs for record in records):  # compacted, or expired
        return
    if _log_is_damaged(file.dataset, file.hour, evidence):
        return  # the record that cannot be read may name it
    if last or file.key in repaired:
        yield Finding("warning", file.key, "it is published and not visible yet", _RESTART)
    else:
        yield Finding("error", file.key, "it is published, and it is not there", _RESTORE)


def _of_content(
    file: LakeFile, size: int, evidence: Evidence, expected_size: int | None
) -> Iterator[Finding]:
    rows = evidence.contents.get(file.key)
    if expected_size is not None and size != expected_size:
        yield Finding(
            "error", file.key, f"it has {size} bytes instead of {expected_size}", _RESTORE
        )
    elif isinstance(rows, str):
        yield Finding("error", file.key, rows, _RESTORE)
    elif rows is not None and rows != file.rows:
        yield Finding("error", file.key, f"it has {rows} rows instead of {file.rows}", _RESTORE)
    elif (
        expected_size is not None
        and evidence.checksums.get(file.key, file.staged.sha256) != file.staged.sha256
    ):
        yield Finding("error", file.key, "its content does not match its checksum", _RESTORE)


def _rows(evidence: Evidence) -> dict[str, int]:
    """Return the rows of every file in `fresh/` of which they are known, removed or not."""
    rows = {key: count for key, count in evidence.contents.items() if isinstance(count, int)}
    for log in evidence.logs.values():
        for record in log.values():
            rows.update((file.key, file.rows) for file in record.files)
    return rows


def _of_hour(hour: HourOf, evidence: Evidence, rows_of: Mapping[str, int]) -> Iterator[Finding]:
    records, markers = evidence.hours.get(hour, {}), evidence.markers.get(hour, {})
    last = max(records, default=0)
    files: list[LakeFile] = []
    covers: list[str] = []
    expired = 0
    for version in range(1, last + 1):
        key, record = hour_key(*hour, version), records.get(version)
        if record is None:
            if key not in evidence.damaged:
                yield Finding(
                    "error", key, "this record is missing, and later ones are there", _RESTORE
                )
            return  # what follows cannot be added up
        if record.kind == "expired":
            files, covers, expired = [], [], version
            continue
        twice = set(record.inputs).intersection(covers)
        if twice:
            yield Finding("error", key, f"{min(twice)} is compacted for the second time", _RESTORE)
        files, covers = [*files, *record.outputs], [*covers, *record.inputs]
        yield from _of_version(key, record, files, rows_of)
        yield from _of_marker(
            marker_key(*hour, version), markers.get(version), (files, covers), evidence,
            last=version == last, expired_later=_expires(records, version),
        )  # fmt: skip
    unread = {version for version in markers if hour_key(*hour, version) in evidence.damaged}
    for version in sorted(set(markers) - set(records) - unread):
        yield Finding(
            "error", marker_key(*hour, version), "no record of its hour made it", _RESTORE
        )
    yield from _left_behind(hour, expired, evidence)


def _expires(records: Mapping[int, HourRecord], version: int) -> bool:
    return any(number > version and one.kind == "expired" for number, one in records.items())


def _of_version(
    key: str, record: HourRecord, files: list[LakeFile], rows_of: Mapping[str, int]
) -> Iterator[Finding]:
    rows, size = sum(file.rows for file in files), sum(file.staged.size for file in files)
    if (record.rows, record.bytes) != (rows, size):
        said = _sums(record.rows, record.bytes, rows, size)
        yield Finding("error", key, said, _RESTORE)
    if not rows_of.keys() >= set(record.inputs):
        return  # one was swept, and its record was trimmed
    read, made = sum(map(rows_of.__getitem__, record.inputs)), sum(f.rows for f in record.outputs)
    if read != made:
        yield Finding("error", key, f"{read} rows of fresh/ became {made} of raw/", _RESTORE)


def _of_marker(
    key: str,
    marker: Marker | None,
    expected: tuple[list[LakeFile], list[str]],
    evidence: Evidence,
    *,
    last: bool,
    expired_later: bool,
) -> Iterator[Finding]:
    files, covers = expected
    if expired_later:
        if marker is not None:
            yield Finding("warning", key, "its hour has expired", _EXPIRE_AGAIN)
        return
    if marker is None:
        if key not in evidence.damaged:
            severity: Severity = "warning" if last else "error"
            yield Finding(
                severity, key, "the hour is compacted, and its marker is missing", _KEEPER
            )
        return
    rows, size = sum(file.rows for file in files), sum(file.staged.size for file in files)
    if (marker.rows, marker.bytes) != (rows, size):
        said = _sums(marker.rows, marker.bytes, rows, size)
        yield Finding("error", key, said, _RESTORE)
    if set(marker.files) != {_name(file.key) for file in files}:
        yield Finding("error", key, "its files are not those of the records", _RESTORE)
    if set(marker.covers) != set(map(_name, covers)):
        yield Finding("error", key, "what it covers is not what the records say", _RESTORE)
    if last:
        yield from _of_marked(files, evidence)


def _of_marked(files: list[LakeFile], evidence: Evidence) -> Iterator[Finding]:
    for file in files:
        found = evidence.raw.get(file.key)
        if found is None:
            yield Finding("error", file.key, "a marker names it, and it is not there", _RESTORE)
        else:
            yield from _of_content(file, found.size, evidence, file.staged.size)


def _left_behind(hour: HourOf, expired: int, evidence: Evidence) -> Iterator[Finding]:
    """Yield what is still there of versions that expired."""
    if not expired:
        return
    records = evidence.hours[hour]
    old = [record for version, record in records.items() if version <= expired]
    gone = {file.key for record in old for file in record.outputs}
    gone.update(key for record in old for key in record.inputs)
    for key in sorted(gone.intersection({*evidence.raw, *evidence.fresh})):
        yield Finding("warning", key, "its hour has expired", _EXPIRE_AGAIN)


def _unnamed(evidence: Evidence) -> Iterator[Finding]:
    """Yield files with names of ours that no record made: a plain glob counts them."""
    made = {
        file.key
        for hour in evidence.hours.values()
        for record in hour.values()
        for file in record.outputs
    }
    for key in sorted(evidence.raw):
        place = place_of(key)
        if place and key not in made and not _log_is_damaged(place[1], place[2], evidence):
            yield Finding("error", key, "no record of its hour made it", _move_away(key))
    for key in sorted(evidence.fresh):
        name = parse_fresh(_name(key))
        log = evidence.logs.get(name.shard, {}) if name else {}
        if name is None or record_key(name.shard, name.number) in evidence.damaged:
            continue
        record = log.get(name.number)
        if record is not None and any(file.key == key for file in record.files):
            continue
        if record is None and log and name.number < min(log):
            continue  # its record was trimmed
        yield Finding("error", key, "no record of its log published it", _move_away(key))


def _log_is_damaged(dataset: str, hour: int, evidence: Evidence) -> bool:
    return any(key.startswith(hour_log(dataset, hour)) for key in evidence.damaged)


def _of_uploads(evidence: Evidence, now_s: float) -> Iterator[Finding]:
    lasts = [log[max(log)] for log in evidence.logs.values() if log]
    due = {file.key for record in lasts for file in record.files}
    for upload in sorted(evidence.uploads, key=lambda one: one.key):
        age_s = max(0.0, now_s - upload.begun_s)
        what = f"an upload that is invisible for {age_s:,.0f} s"
        if upload.key in due:
            yield Finding("note", upload.key, f"{what} and published", _RESTART)
        elif age_s < _OLD_UPLOAD_S:
            yield Finding("note", upload.key, f"{what}, of a flush under way", "Nothing.")
        else:
            forgotten = "Nothing: the keeper and the store remove it in time."
            yield Finding("warning", upload.key, f"{what} and forgotten", forgotten)


def _sums(rows_said: int, bytes_said: int, rows: int, size: int) -> str:
    return f"it says {rows_said} rows and {bytes_said} bytes in all, and it is {rows} and {size}"


def _move_away(key: str) -> str:
    return f"Move it away: a plain glob of {key.partition('/')[0]}/ counts its rows."


def _name(key: str) -> str:
    return key.rpartition("/")[2]
