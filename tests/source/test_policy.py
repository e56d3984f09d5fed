from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.metrics import RECONNECT_REASONS
from blueflow.source.policy import (
    RETRY_AFTER_MAX_S,
    StallClock,
    close_reason,
    refusal,
)

LOOK_S = 1.0
NOW_S = 1_792_567_620.0  # 2026-10-21 07:27:00 UTC
DATES = st.datetimes().map(lambda when: when.strftime("%a, %d %b %Y %H:%M:%S GMT"))
NAMED = (1000, 1001, 1002, 1006, 1008, 1009, 1011, 1012, 1013)


@pytest.mark.parametrize("code", NAMED)
def test_a_close_code_that_relays_use_has_its_own_label(code: int) -> None:
    assert close_reason(code) == f"closed_{code}"


@pytest.mark.parametrize("code", [0, 1003, 1007, 1010, 1014, 1015, 2999, 3000, 4000, 4999, 65_535])
def test_other_close_codes_share_a_label(code: int) -> None:
    assert close_reason(code) == "closed_other"


def test_no_close_code_is_a_lost_connection() -> None:
    assert close_reason(None) == close_reason(1006) == "closed_1006"


@given(st.one_of(st.none(), st.integers(0, 65_535)))
def test_every_close_reason_is_a_known_label(code: int | None) -> None:
    assert close_reason(code) in RECONNECT_REASONS


def test_a_message_above_our_limit_is_known_by_its_close_code() -> None:
    assert close_reason(1009) == "closed_1009"


@pytest.mark.parametrize(
    ("status", "fatal_at_first", "fatal_later"),
    [
        (200, True, False),  # a web server: no relay, or one behind a load balancer that is not up
        (204, True, False),
        (300, False, False),  # a redirect that could not be followed
        (302, False, False),
        (400, True, False),
        (401, True, False),
        (403, True, False),
        (404, True, False),
        (405, True, False),
        (408, False, False),
        (410, True, False),
        (425, False, False),
        (426, True, False),
        (429, False, False),
        (500, False, False),
        (501, True, True),  # it says that it never will
        (502, False, False),
        (503, False, False),
        (504, False, False),
        (599, False, False),
    ],
)
def test_an_http_status_is_fatal_or_not(
    status: int, *, fatal_at_first: bool, fatal_later: bool
) -> None:
    assert refusal(status, None, seen_frames=False, now_s=NOW_S).fatal is fatal_at_first
    assert refusal(status, None, seen_frames=True, now_s=NOW_S).fatal is fatal_later


@given(
    status=st.integers(100, 999),
    retry_after=st.one_of(st.none(), st.text(), st.text("WedOct GMT,:+-0123456789"), DATES),
    seen_frames=st.booleans(),
)
def test_every_refusal_has_a_known_label_and_a_bounded_wait(
    status: int, retry_after: str | None, *, seen_frames: bool
) -> None:
    verdict = refusal(status, retry_after, seen_frames=seen_frames, now_s=NOW_S)
    assert verdict.reason in RECONNECT_REASONS
    assert verdict.reason == ("http_429" if status == 429 else "http_error")
    assert 0 <= verdict.wait_s <= RETRY_AFTER_MAX_S


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        ("7", 7),
        ("120", 120),
        ("601", RETRY_AFTER_MAX_S),
        ("9" * 400, RETRY_AFTER_MAX_S),
        ("9" * 10_000, RETRY_AFTER_MAX_S),
        ("-5", 0),
        ("1.5", 0),
        ("1e9", 0),
        ("nan", 0),
        ("inf", 0),
        ("soon", 0),
        ("\u0661\u0662", 0),  # digits, but not ASCII
        ("Wed, 21 Oct 2026 07:28:00 GMT", 60),  # NOW_S is a minute before it
        ("Wednesday, 21-Oct-26 07:28:00 GMT", 60),
        ("Wed Oct 21 07:28:00 2026", 60),
        ("Wed, 21 Oct 2026 07:26:00 GMT", 0),
        ("Thu, 22 Oct 2026 07:28:00 GMT", RETRY_AFTER_MAX_S),
        ("Wed, 21 Oct 9999999 07:28:00 GMT", 0),
        ("Wed, 71 Oct 2026 07:28:00 GMT", 0),
    ],
)
def test_retry_after(status: int, header: str | None, wait_s: float) -> None:
    assert refusal(status, header, seen_frames=False, now_s=NOW_S).wait_s == wait_s


def test_retry_after_of_other_answers_is_not_heeded() -> None:
    assert refusal(500, "120", seen_frames=True, now_s=NOW_S).wait_s == 0


@given(
    st.one_of(st.none(), st.floats(0.1, 3600)),
    st.lists(st.tuples(st.floats(0, 200), st.integers(1, 10_000)), max_size=50),
)
def test_a_connection_that_brings_frames_at_every_look_never_stalls(
    timeout_s: float | None, steps: list[tuple[float, int]]
) -> None:
    now_s, frames = 1000.0, 0
    clock = StallClock(now_s, timeout_s)
    for passed_s, new in steps:
        now_s, frames = now_s + passed_s, frames + new
        assert not clock.look(now_s, frames, reading=True)


@given(
    st.one_of(st.none(), st.floats(0.1, 3600)),
    st.lists(st.floats(0, 10_000), max_size=50),
)
def test_while_nothing_is_read_nothing_stalls(timeout_s: float | None, steps: list[float]) -> None:
    now_s = 0.0
    clock = StallClock(now_s, timeout_s)
    for passed_s in steps:
        now_s += passed_s
        assert not clock.look(now_s, 0, reading=False)
    assert not clock.look(now_s + clock.timeout_s / 2, 0, reading=True)  # silence begins now


@st.composite
def looks(draw: st.DrawFn) -> list[tuple[float, int, bool]]:
    """Give what a connection did before it fell silent: seconds, frames, whether it was read."""
    step = st.tuples(st.floats(0.01, 30), st.integers(0, 5000), st.booleans())
    return draw(st.lists(step, max_size=40))


@given(st.one_of(st.none(), st.floats(0.1, 3600)), looks())
def test_silence_stalls_when_and_only_when_the_timeout_has_passed(
    timeout_s: float | None, before: list[tuple[float, int, bool]]
) -> None:
    """A model that keeps the time of the last sign of life; the clock must agree at each look."""
    now_s, frames, alive_s = 50.0, 0, 50.0
    clock = StallClock(now_s, timeout_s)
    for passed_s, new, reading in before:
        now_s, frames = now_s + passed_s, frames + new
        stalled = clock.look(now_s, frames, reading=reading)
        if new or not reading:
            alive_s = now_s
        assert stalled == (now_s - alive_s > clock.timeout_s)
    bound_s = clock.timeout_s
    while now_s - alive_s <= bound_s:
        assert not clock.look(now_s, frames, reading=True)
        now_s += max(bound_s / 7, LOOK_S)
    assert clock.look(now_s, frames, reading=True)
    assert clock.timeout_s == bound_s  # silence does not stretch its own bound


@given(looks())
def test_the_bound_follows_the_rate_within_limits(before: list[tuple[float, int, bool]]) -> None:
    now_s, frames = 0.0, 0
    clock = StallClock(now_s, None)
    assert clock.timeout_s == 60
    for passed_s, new, reading in before:
        now_s, frames = now_s + passed_s, frames + new
        clock.look(now_s, frames, reading=reading)
        assert 15 <= clock.timeout_s <= 300


@pytest.mark.parametrize(
    ("frames_per_s", "timeout_s"), [(500, 15), (100, 15), (20, 50), (5, 200), (1, 300)]
)
def test_a_quick_stream_is_missed_sooner_than_a_slow_one(
    frames_per_s: int, timeout_s: float
) -> None:
    clock = StallClock(0.0, None)
    for second in range(1, 100):
        clock.look(float(second), second * frames_per_s, reading=True)
    assert clock.timeout_s == pytest.approx(timeout_s)


def test_a_stream_that_becomes_slower_is_given_more_time() -> None:
    clock = StallClock(0.0, None)
    now_s, frames = 0.0, 0
    for _ in range(100):
        now_s, frames = now_s + 1, frames + 500
        clock.look(now_s, frames, reading=True)
    assert clock.timeout_s == 15
    for _ in range(60):
        now_s, frames = now_s + 10, frames + 1
        assert not clock.look(now_s, frames, reading=True)
    assert clock.timeout_s == 300


def test_a_timeout_that_is_set_does_not_follow() -> None:
    clock = StallClock(0.0, 7.0)
    for second in range(1, 50):
        clock.look(float(second), second, reading=True)
    assert clock.timeout_s == 7
