"""Where a consumer is in a relay's sequence, and which frames it has had already. A core."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from blueflow.errors import SequenceResetError

if TYPE_CHECKING:
    from blueflow.events import Position

RECENT_SEQS = 16_384  # a relay keeps no consumer that is further behind
CLOCK_SKEW_US = 300_000_000  # a time more than 5 min ahead of ours is a claim, not a time

NEXT: Final = 1
LATE: Final = 2
SKIP: Final = 3


class SequenceCounts(msgspec.Struct):
    """What the seqs told, since the start of the process."""

    missed: int = 0  # seqs skipped by the relay; gaps are legal
    possible_loss: int = 0  # those among them between the cursor and the first frame of a resume
    replayed: int = 0  # at or below the cursor after a resume: expected
    duplicates: int = 0  # a seq a second time on one connection
    late: int = 0  # a skipped seq that came behind its successors


class Sequence:
    """Which seqs were consumed, and what a seq that does not rise means.

    Relays resume at the cursor or behind it, so some frames come twice. Relay times do not rise with
    seq (in recorded frames 45 of 99 neighbours go back, by up to 0.9 s), so the position carries
    their running maximum. A frame at or below the position that is newer than all of it can only
    come from a relay that counts anew.
    """

    def __init__(self, after: Position | None) -> None:
        """Begin behind `after`; None is a live start: the first seq decides."""
        self.last: int | None = after.seq if after else None
        self.time_us = after.time_us if after else 0
        self.counts = SequenceCounts()
        self._recent: deque[int] = deque(maxlen=RECENT_SEQS)  # rising
        self._floor = self.last  # nothing at or below it is new
        self._resuming = False

    def connected(self) -> None:
        """Note that the next frames come from a new connection, made with the position."""
        self._resuming = self.last is not None

    def place(self, source: str, seq: int, time_us: int, now_us: int) -> int:
        """Remember a frame, and return NEXT or LATE (deliver it), or SKIP.

        Args:
            source: for the error message.
            seq: the frame's.
            time_us: the frame's relay time; 0 when it has no usable one.
            now_us: our clock; times more than 5 minutes ahead of it are not believed.

        Raises:
            SequenceResetError: the relay restarted its sequence.
        """
        last = self.last
        if last is None or seq > last:
            if last is not None and seq != last + 1:
                self.counts.missed += seq - last - 1
                if self._resuming:
                    self.counts.possible_loss += seq - last - 1
            self._resuming = False
            self.last = seq
            self._recent.append(seq)
            if time_us > self.time_us and time_us <= now_us + CLOCK_SKEW_US:
                self.time_us = time_us
            return NEXT
        if self.time_us and self.time_us < time_us <= now_us + CLOCK_SKEW_US:
            raise SequenceResetError(source, seq, last)
        if not self._is_new(seq):
            if self._resuming:
                self.counts.replayed += 1
            else:
                self.counts.duplicates += 1
            return SKIP
        # It fell into a gap. Nothing will ever send it again (our cursor is past it), and dropping
        # the connection would not put it in order, so it is delivered where it came.
        self._recent.insert(bisect_left(self._recent, seq), seq)
        self.counts.late += 1
        return LATE

    def _is_new(self, seq: int) -> bool:
        recent = self._recent
        if self._floor is not None and seq <= self._floor:
            return False
        if len(recent) == RECENT_SEQS:
            self._floor = recent.popleft()
            return seq > self._floor and self._is_new(seq)
        if self._floor is None and seq < recent[0]:
            return False  # older than a live start: not ours to deliver
        index = bisect_left(recent, seq)
        return index == len(recent) or recent[index] != seq
