from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from blueflow.backoff import Backoff


@given(
    st.floats(0.001, 100),
    st.floats(0.001, 1000),
    st.integers(0, 10**9),
    st.floats(0, 1, exclude_max=True),
)
def test_a_delay_is_within_a_bound_that_doubles(
    base_s: float, cap_s: float, failures: int, jitter: float
) -> None:
    backoff = Backoff(base_s, cap_s)
    delay_s = backoff.delay_s(failures, jitter)
    assert 0 <= delay_s <= cap_s
    assert delay_s <= base_s * 2.0 ** min(failures, 1000)
    assert backoff.delay_s(failures, 0.0) == 0  # full jitter: nobody waits at least so long
    largest_s = math.nextafter(1, 0)
    assert backoff.delay_s(failures + 1, largest_s) >= backoff.delay_s(failures, largest_s)


def test_delays_grow_to_the_cap() -> None:
    bounds = [Backoff(0.5, 60).delay_s(failures, 1.0) for failures in range(9)]
    assert bounds == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
