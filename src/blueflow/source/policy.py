"""What to do when a connection fails, ends or falls silent. A pure table: no I/O, no clock.

Source: https://atproto.com/specs/event-stream#websocket-connections,
RFC 6455 section 7.4.
"""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import NamedTuple

RETRY_AFTER_MAX_S = 600.0
_STALL_MIN_S, _STALL_MAX_S = 15.0, 300.0
_STALL_BEFORE_FIRST_S = 60.0
_STALL_GAPS = 1000  # a stream silent for a thousand times its usual gap has stalled
_SMOOTHING = 0.2
_NAMED_CLOSES = frozenset({1000, 1001, 1002, 1006, 1008, 1009, 1011, 1012, 1013})
_RETRYABLE_4XX = frozenset({408, 425, 429})
_TOO_MANY_REQUESTS, _NOT_IMPLEMENTED, _UNAVAILABLE = 429, 501, 503
_SUCCESSES, _CLIENT_ERRORS = 2, 4  # hundreds


class Refusal(NamedTuple):
    """What an HTTP answer other than 101 means: a metric label, and whether to try again."""

    reason: str
    fatal: bool
    wait_s: float = 0.0  # at least this long


def close_reason(code: int | None) -> str:
    """Return the metric label of a websocket close code; None and 1006 are a lost connection."""
    if code is None:
        return "closed_1006"
    return f"closed_{code}" if code in _NAMED_CLOSES else "closed_other"


def refusal(status: int, retry_after: str | None, *, seen_frames: bool, now_s: float) -> Refusal:
    """Judge an HTTP status that came instead of the websocket.

    Args:
        status: the status.
        retry_after: the header of that name: seconds or a date; garbage counts as absent.
        seen_frames: whether this address has ever given frames: then a 404 is a bad moment of a
            load balancer, otherwise it is not a relay.
        now_s: our clock, seconds since 1970.
    """
    wait_s = 0.0
    if status in (_TOO_MANY_REQUESTS, _UNAVAILABLE):  # RFC 6585 section 4, RFC 9110 section 15.6.4
        wait_s = min(_retry_after_s(retry_after or "", now_s), RETRY_AFTER_MAX_S)
    reason = "http_429" if status == _TOO_MANY_REQUESTS else "http_error"
    if status == _NOT_IMPLEMENTED:
        return Refusal(reason, fatal=True)
    no_relay = status // 100 in (_SUCCESSES, _CLIENT_ERRORS) and status not in _RETRYABLE_4XX
    return Refusal(reason, no_relay and not seen_frames, wait_s)


def _retry_after_s(text: str, now_s: float) -> float:
    """Return the seconds that a Retry-After asks for. Source: RFC 9110 section 10.2.3."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:  # "-0000", or an asctime date: HTTP's dates are in UTC
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, moment.timestamp() - now_s)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


class StallClock:
    """Decides when silence means that a connection is dead.

    A relay of the whole network never pauses for seconds, a small PDS may for minutes: the bound
    follows the rate seen, unless the user sets one. Time spent not reading is not silence.
    """

    def __init__(self, now_s: float, timeout_s: float | None) -> None:
        self._fixed_s = timeout_s
        self._gap_s: float | None = None
        self._frames = 0
        self._looked_s = self._last_frame_s = now_s

    @property
    def timeout_s(self) -> float:
        """The silence, in seconds, that counts as a stall now."""
        if self._fixed_s is not None:
            return self._fixed_s
        if self._gap_s is None:
            return _STALL_BEFORE_FIRST_S
        return min(_STALL_MAX_S, max(_STALL_MIN_S, self._gap_s * _STALL_GAPS))

    def look(self, now_s: float, frames: int, *, reading: bool) -> bool:
        """Return whether the connection has stalled.

        Args:
            now_s: monotonic seconds.
            frames: frames received on this connection so far.
            reading: whether frames can arrive, i.e. the buffer is not full.
        """
        new = frames - self._frames
        if new:
            gap_s = (now_s - self._looked_s) / new
            known = self._gap_s
            self._gap_s = gap_s if known is None else known + _SMOOTHING * (gap_s - known)
        if new or not reading:
            self._last_frame_s = now_s
        self._frames, self._looked_s = frames, now_s
        return now_s - self._last_frame_s > self.timeout_s
