"""When an author says that a record was written: a claim, read leniently. A core.

Nearly all are RFC 3339 in UTC, which Arrow reads by the column; what is not goes one by one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from blueflow.lake.schema import INT64, TIME

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST: Final = datetime.min.replace(tzinfo=UTC) - _EPOCH
_LAST: Final = datetime.max.replace(tzinfo=UTC) - _EPOCH
_MICROSECOND: Final = timedelta(microseconds=1)
_USUAL: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z$"
_FIRST_US: Final = _FIRST // _MICROSECOND
_LAST_US: Final = _LAST // _MICROSECOND
_DAY_US: Final = 86_400_000_000
_LENGTH_MAX: Final = 64  # a time is shorter; what is not is not even looked at


def parse_us(text: str) -> int | None:
    """Return microseconds since 1970, UTC; None where the text is no time from year 1 to 9999.

    Everything of ISO 8601 with a date is taken; what names no offset counts as UTC.
    """
    if len(text) > _LENGTH_MAX:
        return None
    text = text.strip().upper()
    if not text.isprintable():
        return None  # a NUL ends the text for Python
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    since = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)) - _EPOCH
    return since // _MICROSECOND if _FIRST <= since <= _LAST else None


def parse_all(texts: Any) -> Any:
    """Return a timestamp column for a column of text; null where `parse_us` gives None."""
    try:
        return _cast(texts)
    except pa.ArrowInvalid:  # one of them is unusual
        usual = pc.match_substring_regex(texts, _USUAL)
    try:
        times = _cast(pc.if_else(usual, texts, None))
    except pa.ArrowInvalid:  # the 31st of February
        return _one_by_one(texts)
    return pc.coalesce(times, _one_by_one(pc.if_else(usual, None, texts)))


def _cast(texts: Any) -> Any:
    """Let Arrow read them all.

    Raises:
        pa.ArrowInvalid: one is not in Arrow's form, or so near to the first or the last year that
            Python's times may not reach it.
    """
    times = texts.cast(TIME)
    ends = pc.min_max(times.cast(INT64))
    least, most = ends["min"].as_py(), ends["max"].as_py()
    if least is not None and (least < _FIRST_US + _DAY_US or most > _LAST_US - _DAY_US):
        raise pa.ArrowInvalid("a time at the end of all times")
    return times


def _one_by_one(texts: Any) -> Any:
    times = [None if text is None else parse_us(text) for text in texts.to_pylist()]
    return pa.array(times, INT64).cast(TIME)
