"""How many cases a property test of a codec gets.

The settings profile "codec" has 20,000 cases in CI. Tests name their share of them. Those with a
generator of their own cost microseconds a case and have more than the whole together; those of
Hypothesis look for the smallest failing case and cost milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings

from blueflow.errors import CarError, RecordError

if TYPE_CHECKING:
    from collections.abc import Callable

CODEC = settings.get_profile("codec")


def share(percent: int) -> settings:
    """Return the settings for this part of the codec cases."""
    return settings(CODEC, max_examples=max(30, CODEC.max_examples * percent // 100))


def seeded(percent: int) -> range:
    """Return one number per case, for tests that are quicker with a generator of their own."""
    return range(CODEC.max_examples * percent // 100)


def refusal(read: Callable[[bytes], object], data: bytes) -> str | None:
    """Return the reason of the typed error that `read` raises; None when it takes the bytes."""
    try:
        read(data)
    except (CarError, RecordError) as error:
        return error.reason
    return None
