"""What a simulated relay has issued and still keeps: seqs, messages to send, the retention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from blueflow.testing.frames import NetworkFrame, restamp, websocket_message
from blueflow.testing.spoil import spoil_event, unknown_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from blueflow.testing.faultplan import Fault, FaultPlan
    from blueflow.testing.ledger import Entry, Ledger

RESTART_LEAP_US = 2_000_000  # more than events are late: a restarted sequence is newer for certain
_NUMBERING = ("gap", "restart", "unknown-type")


class EventLog(ABC):
    """Events by number, from 0. `start` is the oldest one kept, `end` the next one to issue."""

    def __init__(self, plan: FaultPlan, ledger: Ledger | None, retention: int) -> None:
        self.start = self.end = 0
        self.exhausted = False
        self.special: dict[int, list[Fault]] = {}  # by event: what the stream's faults changed
        self._special_events: list[int] = []
        self._pending = plan.of("stream")
        self._ledger = ledger
        self._retention = retention
        self._epoch = 0  # where the sequence restarted last
        self._seq_shift = self._time_shift_us = 0

    @abstractmethod
    def seq(self, event: int) -> int:
        """Return the seq of an event that is kept."""

    @abstractmethod
    def frame(self, event: int) -> NetworkFrame:
        """Return an event that is kept, as it would be without faults of the stream."""

    @abstractmethod
    def issue(self, count: int) -> int:
        """Issue up to `count` events; return how many. Fewer: the network has ended."""

    @abstractmethod
    def read(self, event: int, end: int, bytes_max: int) -> tuple[bytes, int]:
        """Return messages to send, at least one, and the event behind them.

        Args:
            event: the first one; it is kept and below `end`.
            end: no event from this one on.
            bytes_max: stop after the message that reaches it.
        """

    def locate(self, cursor: int, *, inclusive: bool) -> int:
        """Return the first event to send to a consumer with this cursor."""
        find = bisect_left if inclusive else bisect_right
        low = max(self.start, self._epoch)
        return low + find(range(low, self.end), cursor, key=self.seq)

    def next_special(self, event: int) -> int:
        """Return the first changed event at or after this one, or `end`."""
        at = bisect_left(self._special_events, event)
        return self._special_events[at] if at < len(self._special_events) else self.end

    @property
    def last_seq(self) -> int:
        """The newest seq issued; -1 before the first."""
        return self.seq(self.end - 1) if self.end > self.start else -1

    def _next_fault_event(self) -> int | None:
        return self._pending[0].at if self._pending else None

    def _renumber(self, frame: NetworkFrame, event: int) -> NetworkFrame:
        """Apply what faults did to the numbering before this event, and now at it."""
        for fault in [f for f in self._pending if f.at <= event and f.kind in _NUMBERING]:
            if fault.kind == "restart":
                self._seq_shift = int(fault.number) - frame.seq
                self._time_shift_us += RESTART_LEAP_US
                self._epoch = event
            else:
                self._seq_shift += int(fault.number) if fault.kind == "gap" else 1
            if fault.kind != "unknown-type":
                self._mark(event, fault)
        if not self._seq_shift and not self._time_shift_us:
            return frame
        seq, time_us = frame.seq + self._seq_shift, frame.time_us + self._time_shift_us
        return NetworkFrame(seq, time_us, restamp(frame.data, seq, time_us), frame.events)

    def _messages(self, frame: NetworkFrame, event: int) -> tuple[bytes, list[Entry]]:
        """Return what is sent for an event, spoilt where planned, and its ledger entries."""
        entries = [
            d.entry(event, frame.seq, at, frame.time_us) for at, d in enumerate(frame.events)
        ]
        before, message = b"", b""
        for fault in [f for f in self._pending if f.at <= event]:
            if fault.kind == "unknown-type":
                alien = unknown_type(fault.argument, frame.seq - 1, frame.time_us)
                before += websocket_message(alien)
                self._mark(event, fault)
                continue
            spoilt = None if message else spoil_event(fault, frame, event, entries)
            if spoilt is not None:  # None: this frame has nothing to spoil, so a later one has to
                message, entries = spoilt
                self._mark(event, fault)
        return before + (message or websocket_message(frame.data)), entries

    def _mark(self, event: int, fault: Fault) -> None:
        self._pending.remove(fault)
        if event not in self.special:
            self._special_events.append(event)  # rising, as events are issued in order
        self.special.setdefault(event, []).append(fault)

    def _note(self, entries: Iterable[Entry]) -> None:
        if self._ledger is not None:
            self._ledger.add(entries)


class RetainedLog(EventLog):
    """Keeps the newest `retention` frames of a network in memory."""

    def __init__(
        self, frames: Iterable[NetworkFrame], plan: FaultPlan, ledger: Ledger | None, retention: int
    ) -> None:
        super().__init__(plan, ledger, retention)
        self._frames: Iterator[NetworkFrame] = iter(frames)
        self._kept: list[NetworkFrame] = []
        self._ready: list[bytes] = []
        self._base = 0  # event number of the first one in the lists

    def seq(self, event: int) -> int:
        """See `EventLog`."""
        return self._kept[event - self._base].seq

    def frame(self, event: int) -> NetworkFrame:
        """See `EventLog`."""
        return self._kept[event - self._base]

    def issue(self, count: int) -> int:
        """See `EventLog`."""
        issued, entries = 0, []
        for _ in range(count):
            frame = next(self._frames, None)
            if frame is None:
                self.exhausted = True
                break
            event = self.end + issued
            frame = self._renumber(frame, event)
            message, fresh = self._messages(frame, event)
            self._kept.append(frame)
            self._ready.append(message)
            entries += fresh
            issued += 1
        self._note(entries)  # before `end` moves: nobody can have what the ledger does not
        self.end += issued
        self.start = max(self.start, self.end - self._retention)
        spare = self.start - self._base
        if spare > self._retention // 8:  # in one go, as taking from the front moves the rest
            del self._kept[:spare], self._ready[:spare]
            self._base += spare
        return issued

    def read(self, event: int, end: int, bytes_max: int) -> tuple[bytes, int]:
        """See `EventLog`."""
        first = last = event - self._base
        size = 0
        for last in range(first, end - self._base):
            size += len(self._ready[last])
            if size >= bytes_max:
                break
        return b"".join(self._ready[first : last + 1]), last + 1 + self._base
