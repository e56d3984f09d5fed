from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow import quantities
from blueflow.quantities import duration, size, whole, word

if TYPE_CHECKING:
    from collections.abc import Callable

read_duration = duration(0)
read_size = size(0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("2d", 172_800.0),
        ("500ms", 0.5),
        ("90", 90.0),
        ("2.5", 2.5),
        ("1.5 h", 5400.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64MiB", 64 * 1024**2),
        ("32MB", 32_000_000),
        ("1 kB", 1000),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("0.5GiB", 512 * 1024**2),
        ("1048576", 1_048_576),
        ("7B", 7),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert read_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "+1", "1e3", "nan", "inf", "1 week", "1M", "٣s", "1s\n", "9" * 400]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        read_duration(text)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "64M", "1e6", "nan", "1 MiBs", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        read_size(text)


@given(st.integers(0, 2**50))
def test_a_size_shown_is_read_back(count: int) -> None:
    assert read_size(quantities.show_size(count)) == count


@given(st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1000))
def test_a_duration_shown_is_read_back(seconds: float) -> None:
    assert read_duration(quantities.show_duration(seconds)) == seconds


def test_bounds_are_told_in_the_units_people_write() -> None:
    with pytest.raises(ValueError, match="is below 8MiB"):
        size(8 * 1024**2)("1MiB")
    with pytest.raises(ValueError, match="is above 3600s"):
        duration(0, 3600)("2h")
    with pytest.raises(ValueError, match=r"is below 1$"):
        whole(1)("0")
    assert size(8 * 1024**2)("8MiB") == 8 * 1024**2
    assert duration(0, 3600)("1h") == 3600


@pytest.mark.parametrize("text", ["", "1.0", "-1", "ten", "0x10", "²", "9" * 5000])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        whole(0)(text)


def test_whole_numbers_may_have_underscores() -> None:
    assert whole(0)("31_527_015_322") == 31_527_015_322


def test_words_are_read_in_any_case_and_spelling_named() -> None:
    level = word("info", "warning", same={"warn": "warning"})
    assert [level(text) for text in ("INFO", "Warn", "warning")] == ["info", "warning", "warning"]
    with pytest.raises(ValueError, match="is none of info, warning"):
        level("loud")


@pytest.mark.parametrize(
    ("text", "factor"), [("max", math.inf), ("MAX", math.inf), ("1", 1), ("10x", 10), ("0.5", 0.5)]
)
def test_speeds(text: str, factor: float) -> None:
    assert quantities.speed(text) == factor
    assert quantities.speed(quantities.show_speed(factor)) == factor


@pytest.mark.parametrize(
    "name", ["app.bsky.feed.post", "app.bsky.graph.*", "app.*", "com.whtwnd.blog.entry", "a.b.c"]
)
def test_collections(name: str) -> None:
    assert quantities.collection(name) == name


@pytest.mark.parametrize("text", ["saved", "Live", "oldest", "0", "31527015322", str(2**63 - 1)])
def test_cursors(text: str) -> None:
    assert quantities.cursor(text) == text.lower()


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (quantities.collection, "posts"),
        (quantities.collection, "app.bsky"),
        (quantities.collection, "*"),
        (quantities.collection, "app.bsky.*.post"),
        (quantities.collection, "app..feed"),
        (quantities.collection, "a." * 160 + "b"),
        (quantities.cursor, "latest"),
        (quantities.cursor, "-1"),
        (quantities.cursor, str(2**63)),
        (quantities.did, "alice.bsky.social"),
        (quantities.did, "did:plc:"),
        (quantities.did, "did:PLC:abc"),
        (quantities.did, "did:plc:" + "a" * 2048),
        (quantities.label, ""),
        (quantities.label, "../x"),
        (quantities.label, ".hidden"),
        (quantities.label, "a" * 65),
        (quantities.port, "65536"),
        (quantities.port, "http"),
        (quantities.port, "-1"),
        (quantities.rate, "0"),
        (quantities.rate, "fast"),
        (quantities.speed, "0"),
        (quantities.speed, "9" * 400),
        (quantities.text, ""),
        (quantities.path, ""),
    ],
)
def test_what_means_nothing_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|there) "):
        parse(text)


def test_a_port_that_kubernetes_made_up_is_told_apart() -> None:
    with pytest.raises(ValueError, match="enableServiceLinks: false"):
        quantities.port("tcp://10.0.0.1:9090")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("forever", math.inf), ("FOREVER", math.inf), ("60", 60.0), ("7d", 604_800.0)],
)
def test_retentions(text: str, seconds: float) -> None:
    assert quantities.retention(text) == seconds
    assert quantities.retention(quantities.show_retention(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "59", "inf", "-1", "ever"])
def test_what_is_no_retention(text: str) -> None:
    with pytest.raises(ValueError, match=r"^is "):
        quantities.retention(text)


@pytest.mark.parametrize("text", ["", "bluesky.", "a-b_c.", "x" * 128])
def test_topic_prefixes(text: str) -> None:
    assert quantities.topic_prefix(text) == text


@pytest.mark.parametrize("text", ["x" * 129, "a/b", "a b", "ä.", "a\n", "\0"])
def test_what_is_no_topic_prefix(text: str) -> None:
    with pytest.raises(ValueError, match="is not up to 128 letters"):
        quantities.topic_prefix(text)


@given(st.text())
def test_parsers_raise_nothing_but_value_errors(text: str) -> None:
    for parse in (
        *(read_duration, read_size, whole(0), word("a"), quantities.speed, quantities.rate),
        *(quantities.port, quantities.cursor, quantities.collection, quantities.did),
        *(quantities.label, quantities.text, quantities.retention, quantities.topic_prefix),
    ):
        with suppress(ValueError):
            parse(text)


@pytest.mark.parametrize(
    ("given_path", "problem"),
    [("~nosuchuser/x", "home folder"), ("a\0b", "NUL"), ("", "empty")],
)
def test_what_is_no_path(given_path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        quantities.path(given_path)


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
    assert quantities.show_rate(number) == text


@given(st.floats(1e-9, 1e21))
def test_every_number_is_one_that_the_settings_read(number: float) -> None:
    assert quantities.rate(quantities.show_rate(number)) == number
    assert quantities.duration(0)(quantities.show_duration(number)) == number
