"""What stands in the logs of a lake. Pure: no store, no clock.

Each log is a row of objects that are written once, each only if its name is free; what is written
has happened. A shard's log says which files exist and how far its input is read; the log of an hour
says which files of `fresh/` became which of `raw/`.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from blueflow.errors import CommitLogError
from blueflow.files.seal import seal, unseal

SHARD_FORMAT: Final = "blueflow-lake-shard-1"
HOUR_FORMAT: Final = "blueflow-lake-hour-1"
MARKER_FORMAT: Final = "blueflow-lake-marker-1"
LAKE_FORMAT: Final = "blueflow-lake-1"
RECORDS_KEPT: Final = 2_000  # more than the 26 h that files stay in fresh/, at one a minute
"""How many records of a log are kept; only the last one is ever needed, the others for `verify`."""

Reads: TypeAlias = Literal["source", "kafka"]


class Staged(msgspec.Struct, frozen=True):
    """A file that is stored and not visible yet; completing it makes it an object.

    Attributes:
        key: what it will be called.
        upload_id: the store's name for it until then.
        parts: the store's name for each part, in order.
        size: bytes.
        sha256: of the content, in hex.
    """

    key: str
    upload_id: str
    parts: tuple[str, ...]
    size: int
    sha256: str


class LakeFile(msgspec.Struct, frozen=True):
    """One Parquet file.

    Attributes:
        dataset: what it holds.
        hour: whose rows, in hours since 1970.
        rows: how many.
        time_min_us: the oldest event time, microseconds since 1970.
        time_max_us: the newest one.
        staged: where it is, and what completes it.
    """

    dataset: str
    hour: int
    rows: int
    time_min_us: int
    time_max_us: int
    staged: Staged

    @property
    def key(self) -> str:
        """What it is called."""
        return self.staged.key


class Input(msgspec.Struct, frozen=True):
    """How far one input is read.

    Attributes:
        next: the first offset that is not; of a source the last seq that is.
        time_us: the newest event time read, 0 when unknown.
        topic_id: of a Kafka partition, so that a topic made anew is noticed.
        generation: how often the input has begun to count anew, as a topic that was made anew does.
    """

    next: int
    time_us: int = 0
    topic_id: str = ""
    generation: int = 0


class Lost(msgspec.Struct, frozen=True):
    """A range of an input that was gone before it was read, and that an operator accepted."""

    input: str
    first: int
    end: int
    why: str


class Repair(msgspec.Struct, frozen=True):
    """Files that a record published and whose content is gone: to be made anew from the input.

    Attributes:
        files: what is missing.
        since: where the inputs were before that record.
        until: where that record left them.
    """

    files: tuple[LakeFile, ...]
    since: dict[str, Input]
    until: dict[str, Input]


class ShardRecord(msgspec.Struct, frozen=True):
    """One entry of a shard's log.

    Attributes:
        number: from 1, without gaps.
        kind: "claim", by a process that begins; "commit", of files and positions; "seal", by
            writers that divide the input anew: nothing follows but a claim.
        instance: the process that wrote it.
        made_s: its clock, seconds since 1970.
        reads: what kind of input it is; a log has one.
        inputs: how far every input is read, by name.
        since: the same before this record, of the inputs that it moves.
        watermark_us: events older than this are not expected any more; they would be late.
        files: what it publishes.
        repair: what has to be made anew before the next commit.
        lost: what was accepted as lost since the record before.
        rows: in the files of all records so far.
        bytes: of the files of all records so far.
    """

    number: int
    kind: Literal["claim", "commit", "seal"]
    instance: str
    made_s: float
    reads: Reads
    inputs: dict[str, Input]
    since: dict[str, Input] = {}
    watermark_us: int = 0
    files: tuple[LakeFile, ...] = ()
    repair: Repair | None = None
    lost: tuple[Lost, ...] = ()
    rows: int = 0
    bytes: int = 0


class HourRecord(msgspec.Struct, frozen=True):
    """One entry of the log of a dataset's hour.

    Attributes:
        version: from 1, without gaps.
        kind: "compacted": `inputs` became `outputs`, and a marker says so once all are visible;
            "expired": everything of the hour up to this version is to be removed.
        instance: the process that wrote it.
        made_s: its clock, seconds since 1970.
        inputs: keys in `fresh/` whose rows are in `outputs`; those of earlier versions are not
            repeated.
        outputs: the files in `raw/` that this version adds; none when the hour has no new rows.
        through: the number of the last record of every shard's log that was looked at.
        rows: in `raw/` with this version, in all.
        bytes: likewise.
    """

    version: int
    kind: Literal["compacted", "expired"]
    instance: str
    made_s: float
    inputs: tuple[str, ...] = ()
    outputs: tuple[LakeFile, ...] = ()
    through: dict[str, int] = {}
    rows: int = 0
    bytes: int = 0


class Marker(msgspec.Struct, frozen=True):
    """What `_complete-<version>.json` says: the hour is whole in `raw/`, and these are its files.

    Attributes:
        dataset: which.
        hour: `YYYY-MM-DDTHH`.
        version: the highest one counts.
        made_s: when, seconds since 1970; the files of `fresh/` go 26 h later.
        rows: in all files.
        bytes: of all files.
        files: the names of all files of the hour in `raw/`, of this and earlier versions.
        covers: the names of the files in `fresh/` whose rows they hold.
    """

    dataset: str
    hour: str
    version: int
    made_s: float
    rows: int
    bytes: int
    files: tuple[str, ...]
    covers: tuple[str, ...]


class Description(msgspec.Struct, frozen=True):
    """What `_blueflow/lake.json` says."""

    simulated: bool
    made_s: float


_T = TypeVar("_T", ShardRecord, HourRecord, Marker, Description)

_FORMATS: Final[dict[type, str]] = {
    ShardRecord: SHARD_FORMAT,
    HourRecord: HOUR_FORMAT,
    Marker: MARKER_FORMAT,
    Description: LAKE_FORMAT,
}


def encode(record: ShardRecord | HourRecord | Marker | Description) -> bytes:
    """Encode a record, sealed."""
    return seal(_FORMATS[type(record)], msgspec.json.encode(record))


def decode(path: str, kind: type[_T], data: bytes) -> _T:
    """Decode what `encode` wrote.

    Args:
        path: where it was, for the error.
        kind: what it has to be.
        data: the content.

    Raises:
        CommitLogError: it is damaged, or something else.
    """
    body = unseal(path, _FORMATS[kind], data)
    try:
        record: Any = msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CommitLogError(path, f"it is no record of this version ({error})") from error
    typed: _T = record
    return typed
