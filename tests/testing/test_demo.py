from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow import quantities
from blueflow.testing.demo import plain


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (20.0, "20"),
        (0.5, "0.5"),
        (0.1, "0.1"),
        (1_000_000.0, "1000000"),
        (1_500_000.5, "1500000.5"),
        (0.000_01, "0.00001"),
        (1e21, "1000000000000000000000"),
    ],
)
def test_a_number_is_written_as_people_write_it(number: float, text: str) -> None:
    assert plain(number) == text


@given(st.floats(1e-9, 1e21))
def test_every_number_is_one_that_the_settings_read(number: float) -> None:
    assert quantities.rate(plain(number)) == number
    assert quantities.duration(0)(f"{plain(number)}s") == number
