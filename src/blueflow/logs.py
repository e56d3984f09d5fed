"""What a process logs, on stderr: readable lines on a terminal, one JSON object a line elsewhere.

Libraries of the package only call `logging.getLogger(__name__)`; commands call `set_up`.
"""

from __future__ import annotations

import io
import json
import logging
import select
import sys
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from math import isfinite
from typing import TYPE_CHECKING

from blueflow.masking import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

connection_id: ContextVar[str | None] = ContextVar("connection_id", default=None)
"""The connection that this task works for; every line logged meanwhile carries it."""

CLEAR_LINE = "\r\x1b[2K"  # of a terminal
_VALUE_LENGTH_MAX = 256  # backstop; remote text is cut to 64 by its caller, see `clip`
_TRACEBACK_LENGTH_MAX = 20_000
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def set_up(level: str, form: str = "auto", stream: TextIO | None = None) -> None:
    """Send what is logged to `stream` (stderr by default), in place of where it went before.

    Args:
        level: debug, info, warning or error.
        form: text, json, or auto: text on a terminal, json elsewhere.
        stream: where the lines go.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    if form == "auto":
        form = "text" if terminal else "json"
    text = form == "text"
    handler = _TerminalHandler(stream) if terminal and text else logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":  # their life-cycle is not ours, and theirs is a line per connection
        for name in ("asyncio", "websockets"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # It logs each try to reach a broker as an error; what fails for good is told by us.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.captureWarnings(capture=True)


def tell(text: str, *, wait_s: float = 0.0, stream: TextIO | None = None) -> bool:
    """Write to stderr for a person; False: it cannot take anything now, or ever again.

    A run outlives the terminal, the pipe or the disk that its progress goes to, and does not wait
    for a reader (Ctrl-S, a pager) any longer than `wait_s`.
    """
    stream = stream or sys.stderr
    try:
        with suppress(io.UnsupportedOperation):  # no descriptor: it cannot block either
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if not poll.poll(wait_s * 1000):
                return False
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # gone, full, or closed
        return False
    return True


def clip(text: object, limit: int = 64) -> str:
    """Return foreign text as one printable line of at most `limit` characters.

    Control, format (bidirectional overrides among them) and surrogate characters come out escaped:
    what a server sends must not write lines of its own into a log or move a terminal's cursor.
    """
    whole = str(text)
    # The text may be megabytes; nothing behind the limit can be shown.
    line = "".join(map(_printable, whole[: limit + 1]))
    return line if len(line) <= limit else line[: limit - 1] + "…"


class JsonFormatter(logging.Formatter):
    """One JSON object per line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": mask_credentials(record.getMessage()),
        }
        # An extra field cannot rename the line's own.
        line |= {name: value for name, value in _fields(record).items() if name not in line}
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line["traceback"] = mask_credentials(trace)[-_TRACEBACK_LENGTH_MAX:]
        return json.dumps(line, ensure_ascii=True, allow_nan=False)


class TextFormatter(logging.Formatter):
    """A line for people: time, level, logger, message, then `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline; a traceback follows on lines of its own."""
        message = clip(mask_credentials(record.getMessage()), 4 * _VALUE_LENGTH_MAX)
        parts = [_time(record), f"{record.levelname:<7}", f"{record.name}:", message]
        parts += [f"{name}={_quoted(value)}" for name, value in _fields(record).items()]
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            parts.append("\n" + mask_credentials(trace)[-_TRACEBACK_LENGTH_MAX:])
        return " ".join(parts)


class _TerminalHandler(logging.StreamHandler["TextIO"]):
    """Clears the line that is kept up to date first, and waits for no stopped terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tell(CLEAR_LINE + self.format(record) + self.terminator, stream=self.stream)
        except Exception:  # noqa: BLE001 - as every handler of the standard library
            self.handleError(record)


class Throttle:
    """Decides which of many like warnings to log: the first ones, then one per interval. Pure.

    >>> throttle = Throttle(first=1, interval_s=60)
    >>> [throttle.admit(now_s) for now_s in (0, 1, 2, 70)]
    [0, None, None, 2]
    """

    def __init__(self, *, first: int = 5, interval_s: float = 60.0) -> None:
        self._left, self._interval_s = first, interval_s
        self._next_s = 0.0
        self._held_back = 0

    def admit(self, now_s: float) -> int | None:
        """Return how many were held back since the last one admitted; None: hold this one back."""
        if self._left > 0:
            self._left -= 1
        elif now_s < self._next_s:
            self._held_back += 1
            return None
        self._next_s = now_s + self._interval_s
        held_back, self._held_back = self._held_back, 0
        return held_back


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = {name: _value(v) for name, v in vars(record).items() if name not in _STANDARD}
    connection = connection_id.get()
    if connection is not None:
        fields.setdefault("connection", connection)
    return fields


def _value(value: object) -> object:
    if value is None or isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        return value
    return clip(mask_credentials(str(value)), _VALUE_LENGTH_MAX)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or "=" in text else text
