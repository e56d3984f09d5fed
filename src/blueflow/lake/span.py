"""The time that a reader asks for. Pure."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from blueflow.files.layout import HOUR_US

if TYPE_CHECKING:
    from collections.abc import Iterator

Moment: TypeAlias = "datetime | date | str"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Span(NamedTuple):
    """From `start_us` up to `end_us`, exclusive; microseconds since 1970; None is without bound."""

    start_us: int | None = None
    end_us: int | None = None

    @classmethod
    def of(cls, start: Moment | None, end: Moment | None) -> Span:
        """Return the time between two moments.

        Raises:
            ValueError: one is no moment, or the end is before the start.
            TypeError: one is of another type.
        """
        span = cls(moment_us(start), moment_us(end))
        if span.start_us is not None and span.end_us is not None and span.end_us < span.start_us:
            raise ValueError(f"the end, {end}, is before the start, {start}")
        return span

    def since(self) -> Span:
        """Return the time from the start up to now and later."""
        return Span(self.start_us)

    def touches(self, hour: int) -> bool:
        """Tell whether a moment of an hour, since 1970, may be in it."""
        after_start = self.start_us is None or self.start_us < (hour + 1) * HOUR_US
        return after_start and (self.end_us is None or hour * HOUR_US < self.end_us)

    def hours(self) -> Iterator[int] | None:
        """Return every hour that it touches; None when they are not bounded."""
        if self.start_us is None or self.end_us is None:
            return None
        return iter(range(self.start_us // HOUR_US, -(-self.end_us // HOUR_US)))


def moment_us(value: Moment | None) -> int | None:
    """Return what a user means by a moment, in microseconds since 1970.

    Args:
        value: a datetime with its time zone; a date, which is its midnight, UTC; or text such as
            `2026-07-04`, `2026-07-04T16` or `2026-07-04T16:30:00+02:00`, UTC unless it says.

    Raises:
        ValueError: text that is no time, or a datetime without a time zone.
        TypeError: another type.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value.strip())
        except ValueError as error:
            raise ValueError(f"{value!r} is no time such as 2026-07-04T16") from error
        value = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    elif not isinstance(value, datetime):
        raise TypeError(f"{value!r} is no datetime, date or text")
    if value.tzinfo is None:
        raise ValueError(f"{value!r} has no time zone; say datetime(…, tzinfo=timezone.utc)")
    return (value - _EPOCH) // timedelta(microseconds=1)


def hour_start(hour: int) -> datetime:
    """Return when an hour, since 1970, begins."""
    return _EPOCH + timedelta(hours=hour)
