"""What stands in a commit log, and what is left to do after a crash. Pure: no disk, no clock."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blueflow.errors import CommitLogError
from blueflow.files.seal import seal, unseal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FORMAT: Final = "blueflow-log-1"
_RECORD_NAME: Final = re.compile(r"(\d{12})\.json")
_HIDDEN_NAME: Final = re.compile(r"\d{12}(-\d{4,})?\.(part|json)")


class LogFile(msgspec.Struct, frozen=True):
    """One file of a commit.

    Attributes:
        path: where readers see it, relative to the root, with `/`.
        hidden: its name in the hidden folder until then.
        size: length in bytes.
        rows: events in it.
        sha256: of its content, in hex.
    """

    path: str
    hidden: str
    size: int
    rows: int
    sha256: str


class LogRecord(msgspec.Struct, frozen=True):
    """One commit: its number (from 1, without gaps), its files, and what the writer says of it."""

    number: int
    files: tuple[LogFile, ...]
    head: dict[str, Any]


class RecoveryPlan(msgspec.Struct, frozen=True):
    """What a crash left to do, in this order.

    Attributes:
        free: hidden names to remove that nothing needs.
        link: files to link into place.
        unlink: hidden names to remove that were needed until then.
    """

    free: tuple[str, ...]
    link: tuple[LogFile, ...]
    unlink: tuple[str, ...]


def record_name(number: int) -> str:
    """Return the file name of record `number`; names sort as numbers do."""
    return f"{number:012d}.json"


def hidden_name(number: int, index: int) -> str:
    """Return the hidden name of file `index` of commit `number`."""
    return f"{number:012d}-{index:04d}.part"


def record_numbers(names: Iterable[str]) -> list[int]:
    """Return the numbers of the records among `names`, rising; foreign names are left alone."""
    return sorted(int(match[1]) for name in names if (match := _RECORD_NAME.fullmatch(name)))


def encode_record(record: LogRecord) -> bytes:
    """Encode a record with a seal, which tells a damaged record from a whole one."""
    return seal(FORMAT, msgspec.json.encode(record))


def decode_record(path: str, number: int, data: bytes) -> LogRecord:
    """Decode what `encode_record` wrote as record `number`.

    Raises:
        CommitLogError: it is empty, cut off, changed, of another number or of another format.
    """
    body = unseal(path, FORMAT, data)
    try:
        record = msgspec.json.decode(body, type=LogRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CommitLogError(path, f"{len(data)} bytes that are no record ({error})") from error
    if record.number != number:
        raise CommitLogError(path, f"it says that it is record {record.number}")
    for file in record.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise CommitLogError(path, f"it names {file.path!r}, outside the folder")
    return record


def plan_recovery(
    record: LogRecord | None,
    hidden: Iterable[str],
    hidden_size: Callable[[str], int | None],
    visible_size: Callable[[str], int | None],
) -> RecoveryPlan:
    """Decide what completes the last record and what belongs to no record.

    A copy of the record stays in the hidden folder until all its files are in place for good. While
    it is there, each file has to be hidden or in place. Without it, a file that is in neither was
    in place once, and a reader moved it away: that is allowed.

    Args:
        record: the last record; None when there is none yet.
        hidden: the names in the hidden folder.
        hidden_size: length of a hidden file by name; None when it is missing.
        visible_size: length of a file in its place by path; None when it is missing.

    Raises:
        CommitLogError: a file of the record is lost or has another size.
    """
    names = sorted(name for name in hidden if _HIDDEN_NAME.fullmatch(name))
    if record is None:
        return RecoveryPlan(tuple(names), (), ())
    pending = record_name(record.number) in names
    missing = []
    for file in record.files:
        size = visible_size(file.path)
        if size is None and pending:
            size = hidden_size(file.hidden)
            if size is None:
                raise CommitLogError(file.path, f"record {record.number} names it, and it is lost")
            missing.append(file)
        if size is not None and size != file.size:
            problem = f"it has {size} bytes, record {record.number} says {file.size}"
            raise CommitLogError(file.path, problem)
    names_of_record = {record_name(record.number), *(file.hidden for file in record.files)}
    needed = names_of_record if pending else set()  # without the copy all was in place once
    free = tuple(name for name in names if name not in needed)
    return RecoveryPlan(free, tuple(missing), unlink_order(needed.intersection(names)))


def unlink_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort hidden names so that a record's copy goes first: while it is there, so are its files."""
    return tuple(sorted(names, key=lambda name: (not name.endswith(".json"), name)))
