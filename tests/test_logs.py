from __future__ import annotations

import io
import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("blueflow.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Keep what `set_up` changes inside the test; pytest's own handlers must not be closed."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    for name in ("asyncio", "websockets"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def json_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_of_json_has_time_level_logger_message_and_extra_fields() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    logger.info("connected", extra={"host": "bsky.network", "seq": 31_527_015_322, "cursor": None})
    (line,) = json_lines(stream)
    time = line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "blueflow.test",
        "message": "connected",
        "host": "bsky.network",
        "seq": 31_527_015_322,
        "cursor": None,
    }
    assert len(time) == len("2026-07-04T12:00:00.000Z")
    assert time.endswith("Z")


def test_a_terminal_gets_text_and_form_overrides() -> None:
    terminal = Terminal()
    logs.set_up("info", stream=terminal)
    logger.warning("no frame", extra={"silent_s": 20.5, "note": "a b", "empty": ""})
    line = terminal.getvalue()
    assert line.endswith('Z WARNING blueflow.test: no frame silent_s=20.5 note="a b" empty=""\n')
    logs.set_up("info", "json", terminal)
    logger.info("again")
    assert json.loads(terminal.getvalue().removeprefix(line))["message"] == "again"
    pipe = io.StringIO()
    logs.set_up("info", "text", pipe)
    logger.info("text")
    assert pipe.getvalue().endswith(" INFO    blueflow.test: text\n")


def test_setting_up_again_replaces_the_first_time() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.set_up("info", stream=first)
    logs.set_up("info", stream=second)
    logger.info("once")
    assert not first.getvalue()
    assert len(json_lines(second)) == 1


def test_levels() -> None:
    stream = io.StringIO()
    logs.set_up("warning", stream=stream)
    logger.info("no")
    logger.warning("yes")
    logging.getLogger("websockets.client").info("theirs")
    assert [line["message"] for line in json_lines(stream)] == ["yes"]


def test_other_libraries_are_quiet_below_debug() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    logging.getLogger("websockets.client").info("theirs")
    assert not stream.getvalue()


def test_each_line_has_the_id_of_its_connection() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    token = logs.connection_id.set("c7")
    logger.info("inside")
    logs.connection_id.reset(token)
    logger.info("outside")
    inside, outside = json_lines(stream)
    assert inside["connection"] == "c7"
    assert "connection" not in outside


def test_a_traceback_is_kept_in_one_json_line_and_credentials_are_masked() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    try:
        raise OSError("wss://me:hunter2@host is away")  # noqa: TRY301
    except OSError:
        logger.exception("lost %s", "wss://me:hunter2@host", extra={"url": "wss://me:hunter2@host"})
    (line,) = json_lines(stream)
    assert line["message"] == "lost wss://***@host"
    assert line["url"] == "wss://***@host"
    assert line["traceback"].endswith("OSError: wss://***@host is away")
    terminal = Terminal()
    logs.set_up("info", stream=terminal)
    try:
        raise OSError("wss://me:hunter2@host is away")  # noqa: TRY301
    except OSError:
        logger.exception("lost")
    assert "hunter2" not in terminal.getvalue()
    assert "\nTraceback (most recent call last):\n" in terminal.getvalue()


def test_an_extra_field_cannot_pretend_to_be_the_lines_own() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    logger.info("real", extra={"level": "DEBUG", "time": "never"})
    (line,) = json_lines(stream)
    assert line["level"] == "INFO"
    assert line["time"] != "never"


def test_values_that_json_cannot_hold_are_still_json() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    logger.info("odd", extra={"rate": float("nan"), "most": float("inf"), "raw": b"\xff"})
    strict = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert (strict["rate"], strict["most"], strict["raw"]) == ("nan", "inf", "b'\\xff'")


def test_a_remote_text_cannot_forge_a_line_or_move_the_cursor() -> None:
    terminal = Terminal()
    logs.set_up("info", stream=terminal)
    logger.info("closed %s", "bye\nERROR forged", extra={"reason": "\x1b[2J\u202egpj.exe\r\n"})
    line = terminal.getvalue()
    assert line.count("\n") == 1
    assert "bye\\nERROR forged" in line
    assert "reason=\\x1b[2J\\u202egpj.exe\\r\\n" in line


def test_warnings_of_python_are_logged() -> None:
    stream = io.StringIO()
    logs.set_up("info", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    (line,) = json_lines(stream)
    assert line["logger"] == "py.warnings"
    assert "old way" in line["message"]


def test_clip_cuts() -> None:
    assert logs.clip("x" * 64) == "x" * 64
    assert logs.clip("x" * 65) == "x" * 63 + "…"
    assert logs.clip(b"\x00", 64) == "b'\\x00'"
    assert logs.clip("a\ud800b") == "a\\ud800b"


@given(st.text(st.characters()), st.integers(2, 80))
def test_clip_gives_one_printable_line_within_the_limit(text: str, limit: int) -> None:
    line = logs.clip(text, limit)
    assert len(line) <= limit
    assert line.isprintable()
    if text.isprintable() and len(text) <= limit:
        assert line == text


@given(st.lists(st.floats(0, 100), min_size=1), st.integers(0, 3), st.floats(0.1, 20))
def test_a_throttle_admits_few_and_counts_all(gaps: list[float], first: int, wait: float) -> None:
    throttle, now, admitted, told = logs.Throttle(first=first, interval_s=wait), 0.0, 0, 0
    held_back = 0
    for gap in gaps:
        now += gap
        count = throttle.admit(now)
        if count is None:
            held_back += 1
        else:
            admitted += 1
            told += count
            assert told == held_back
    assert admitted <= first + 1 + now / wait


def test_a_throttle_is_silent_after_the_first_ones_until_the_interval_ends() -> None:
    throttle = logs.Throttle(first=2, interval_s=60)
    answers = [throttle.admit(now_s) for now_s in (0, 1, 2, 3, 61.5, 62)]
    assert answers == [0, 0, None, None, 2, None]
