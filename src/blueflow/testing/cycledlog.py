"""A log for load: a few frames given out over and over with new seqs and times."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from struct import pack_into
from typing import TYPE_CHECKING

from blueflow.testing.eventlog import EventLog
from blueflow.testing.frames import (
    NetworkFrame,
    restamp,
    stamp_places,
    time_text,
    websocket_message,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.testing.faultplan import FaultPlan
    from blueflow.testing.ledger import Ledger

_SEQ_MIN = 2**32
_MILLISECONDS = tuple(f"{number:03d}".encode() for number in range(1000))


class CycledLog(EventLog):
    """Gives a few frames out over and over, each time with the next seq and time.

    Revs come again with every round, so this is for load, not for what checks chains of commits.

    A restarted sequence begins at 2**32 at the lowest: a lower seq is shorter in CBOR.

    Args:
        frames: at least one; seqs go on from the first one's.
        rate: events per second of simulated time.
    """

    def __init__(
        self,
        frames: Sequence[NetworkFrame],
        plan: FaultPlan,
        ledger: Ledger | None,
        retention: int,
        rate: float,
    ) -> None:
        super().__init__(plan, ledger, retention)
        self._pool = frames
        self._step_us = 1_000_000 / rate
        self._segments: list[tuple[int, int, int]] = [(0, frames[0].seq, frames[0].time_us)]
        self._special_messages: dict[int, bytes] = {}
        self._seconds: dict[int, bytes] = {}
        self._wheel, self._edges, self._places = bytearray(), [0], []
        for frame in frames:
            message = websocket_message(frame.data)
            places = stamp_places(frame.data)
            head = len(self._wheel) + len(message) - len(frame.data)
            self._places.append((head + places[0], head + places[1]))
            self._wheel += message
            self._edges.append(len(self._wheel))

    def seq(self, event: int) -> int:
        """See `EventLog`."""
        first, seq, _ = self._segment(event)
        return seq + event - first

    def frame(self, event: int) -> NetworkFrame:
        """See `EventLog`."""
        slot = event % len(self._pool)
        seq, time_us = self.seq(event), self._time_us(event)
        pooled = self._pool[slot]
        return NetworkFrame(seq, time_us, restamp(pooled.data, seq, time_us), pooled.events)

    def issue(self, count: int) -> int:
        """See `EventLog`."""
        goal = self.end + count
        while self.end < goal:
            fault_at = self._next_fault_event()
            stop = goal if fault_at is None else min(goal, max(fault_at, self.end))
            self._issue_plain(stop)
            if stop < goal:
                self._issue_changed(stop)
        self.start = max(self.start, self.end - self._retention)
        return count

    def read(self, event: int, end: int, bytes_max: int) -> tuple[bytes, int]:
        """See `EventLog`."""
        special = self._special_messages.get(event)
        if special is not None:
            return special, event + 1
        slot, edges = event % len(self._pool), self._edges
        stop = bisect_left(edges, edges[slot] + bytes_max)
        count = min(stop, len(self._pool)) - slot
        last = min(event + count, end, self.next_special(event))
        self._stamp(event, last)
        return bytes(memoryview(self._wheel)[edges[slot] : edges[slot + last - event]]), last

    def _issue_plain(self, stop: int) -> None:
        if self._ledger is not None:
            for event in range(self.end, stop):
                seq, time_us = self.seq(event), self._time_us(event)
                events = self._pool[event % len(self._pool)].events
                self._note(d.entry(event, seq, at, time_us) for at, d in enumerate(events))
        self.end = stop

    def _issue_changed(self, event: int) -> None:
        plain = self.frame(event)
        frame = self._renumber(plain, event)
        if frame.seq < _SEQ_MIN:
            data = restamp(plain.data, _SEQ_MIN, frame.time_us)
            frame = NetworkFrame(_SEQ_MIN, frame.time_us, data, frame.events)
        if frame is not plain:
            self._segments.append((event, frame.seq, frame.time_us + _late_us(event)))
            self._seq_shift = self._time_shift_us = 0  # the segment has them from here on
        message, entries = self._messages(frame, event)
        if event in self.special:
            self._special_messages[event] = message
        self._note(entries)
        self.end = event + 1

    def _segment(self, event: int) -> tuple[int, int, int]:
        if len(self._segments) == 1:
            return self._segments[0]
        return self._segments[bisect_right(self._segments, event, key=lambda s: s[0]) - 1]

    def _time_us(self, event: int) -> int:
        first, _, start_us = self._segment(event)
        time_us = start_us + int((event - first) * self._step_us) - _late_us(event)
        return time_us - time_us % 1000

    def _stamp(self, event: int, end: int) -> None:
        wheel, places, count = self._wheel, self._places, len(self._pool)
        first, first_seq, start_us = self._segment(event)
        step_us, seconds = self._step_us, self._seconds
        if len(seconds) > 1000:  # noqa: PLR2004 - a bound; a round needs a few
            seconds.clear()
        for number in range(event, end):  # the hottest loop here: 1 us a frame
            seq_at, time_at = places[number % count]
            pack_into(">Q", wheel, seq_at, first_seq + number - first)
            time_us = start_us + int((number - first) * step_us) - _late_us(number)
            second, rest_us = divmod(time_us, 1_000_000)
            text = seconds.get(second)
            if text is None:
                text = seconds[second] = time_text(time_us)[:20].encode()
            wheel[time_at : time_at + 23] = text + _MILLISECONDS[rest_us // 1000]


def _late_us(event: int) -> int:
    return event * 7919 % 97 * 1000  # neighbours go back, as on the public network
