"""Where a consumer is in a relay's sequence, and which frames it has had already. A core."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from blueflow.errors import FutureCursorError, SequenceResetError
from blueflow.events import Position

if TYPE_CHECKING:
    from blueflow.interfaces import Batch

GAPS_MAX = 16_384  # a relay keeps no consumer that is further behind; older gaps count as closed
REPLAY_MAX = 16_384  # how far behind the cursor a relay may resume
CLOCK_SKEW_US = 300_000_000  # a time more than 5 min ahead of ours is a claim, not a time

NEXT: Final = 1
LATE: Final = 2
SKIP: Final = 3


class SequenceCounts(msgspec.Struct):
    """What the seqs told, since the start of the process."""

    missed: int = 0  # seqs skipped by the relay; gaps are legal
    possible_loss: int = 0  # those among them between the cursor and the first frame of a resume
    replayed: int = 0  # at or below the cursor after a resume: expected
    duplicates: int = 0  # at or below the cursor at another time, and no seq that was skipped
    late: int = 0  # a skipped seq that came behind its successors


class Sequence:
    """Which seqs were consumed, and what a seq that does not rise means.

    Relays resume at the cursor or behind it, so some frames come twice. What was consumed is
    everything up to the last seq but the gaps, and only gaps need memory. Relay times do not rise
    with seq (in recorded frames 45 of 99 neighbours go back, by up to 0.9 s), so the position
    carries their running maximum. A frame that was consumed already but is newer than all of it
    can only come from a relay that counts anew.
    """

    def __init__(self, after: Position | None) -> None:
        """Begin behind `after`; None is a live start: the first seq decides."""
        self.last: int | None = after.seq if after else None
        self.time_us = after.time_us if after else 0
        self.counts = SequenceCounts()
        self._gaps: deque[tuple[int, int]] = deque()  # (first, last) seq of each, rising
        self._resuming = False

    def connected(self) -> None:
        """Note that the next frames come from a new connection, made with the position."""
        self._resuming = self.last is not None

    def place(self, source: str, seq: int, time_us: int, now_us: int) -> int:
        """Remember a frame, and return NEXT or LATE (deliver it), or SKIP.

        Args:
            source: for the error message.
            seq: the frame's, at least 0.
            time_us: the frame's relay time; 0 when it has no usable one.
            now_us: our clock; times more than 5 minutes ahead of it are not believed.

        Raises:
            SequenceResetError: the relay restarted its sequence.
            FutureCursorError: the cursor was never issued.
        """
        last = self.last
        if last is not None and seq != last + 1:
            if seq <= last:
                return self._place_behind(source, seq, time_us, now_us)
            self._skip_to(seq, last)
        self._resuming = False
        self.last = seq
        if self.time_us < time_us <= now_us + CLOCK_SKEW_US:
            self.time_us = time_us
        return NEXT

    def _skip_to(self, seq: int, last: int) -> None:
        self.counts.missed += seq - last - 1
        if self._resuming:
            self.counts.possible_loss += seq - last - 1
        self._gaps.append((last + 1, seq - 1))
        if len(self._gaps) > GAPS_MAX:
            self._gaps.popleft()

    def _place_behind(self, source: str, seq: int, time_us: int, now_us: int) -> int:
        if self._resuming and not self.time_us and seq < (self.last or 0) - REPLAY_MAX:
            # A seq was asked for that is not issued yet; the relay says nothing and goes on live.
            raise FutureCursorError(source, self.last or 0)
        gap = self._gap_around(seq)
        if self._tells_reset(seq, time_us, now_us, consumed=gap is None):
            raise SequenceResetError(source, seq, self.last or 0)
        if gap is not None:
            # Nothing will ever send it again (our cursor is past it), and dropping the connection
            # would not put it in order, so it is delivered where it came.
            self._close_gap(gap, seq)
            self.counts.late += 1
            return LATE
        if self._resuming:
            self.counts.replayed += 1
            if seq == self.last:
                self._resuming = False  # it still has our cursor's frame, hence all behind it
        else:
            self.counts.duplicates += 1
        return SKIP

    def _tells_reset(self, seq: int, time_us: int, now_us: int, *, consumed: bool) -> bool:
        """Tell whether a frame at or below the position shows that the relay counts anew."""
        if not self.time_us or time_us > now_us + CLOCK_SKEW_US:
            return False
        if seq == self.last:
            # Nearly always an inclusive resume. Its time may have been too far ahead to be believed
            # when it came first, and be newer than the position's for that reason alone.
            return False
        # What was not consumed did not add to the running maximum, and the clocks of its origins
        # differ, so a little newer says nothing about it.
        return time_us > self.time_us + (0 if consumed else CLOCK_SKEW_US)

    def _gap_around(self, seq: int) -> int | None:
        index = bisect_right(self._gaps, seq, key=_first_of) - 1
        return index if index >= 0 and seq <= self._gaps[index][1] else None

    def _close_gap(self, index: int, seq: int) -> None:
        first, last = self._gaps[index]
        del self._gaps[index]
        if seq < last:
            self._gaps.insert(index, (seq + 1, last))
        if first < seq:
            self._gaps.insert(index, (first, seq - 1))
        if len(self._gaps) > GAPS_MAX:
            self._gaps.popleft()


def _first_of(gap: tuple[int, int]) -> int:
    return gap[0]


def position_behind(batch: Batch, count: int, before: Position | None) -> Position | None:
    """Return the position behind the first events of a batch; None where there is none.

    There is none within a commit of several operations, nor before an event that came late: it
    would cover what is behind it.

    Args:
        batch: as a source gave it.
        count: events that were consumed, from the first.
        before: the position before the batch.
    """
    events, through = batch.events, batch.through
    if through is None or count <= 0:
        return before
    if count >= len(events):
        return through
    seqs = batch.seqs or [event.seq for event in events]
    seq, time_us = max(seqs[:count]), max(event.time_us for event in events[:count])
    # Frames without events may be newer than this; what is not believed is newer than `through`.
    time_us = max(0, min(time_us, through.time_us))
    if before is not None and before.source == through.source:
        seq, time_us = max(seq, before.seq), max(time_us, before.time_us)
    return Position(through.source, seq, time_us) if min(seqs[count:]) > seq else None
