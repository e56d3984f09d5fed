"""Which frames are new, and what a seq that does not rise means: named cases, and a naive model."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.cases import share

from blueflow import cursor
from blueflow.cursor import CLOCK_SKEW_US, GAPS_MAX, LATE, NEXT, SKIP, Sequence
from blueflow.errors import SequenceResetError
from blueflow.events import Position

T0 = 1_783_175_887_000_000
SECOND = 1_000_000
NOW = T0 + 3600 * SECOND


def after(seq: int, time_us: int = T0) -> Sequence:
    return Sequence(Position("relay", seq, time_us))


def place(sequence: Sequence, seq: int, time_us: int = T0, now_us: int = NOW) -> int:
    return sequence.place("relay", seq, time_us, now_us)


def counts(sequence: Sequence) -> dict[str, int]:
    return {
        name: number
        for name in sequence.counts.__struct_fields__
        if (number := getattr(sequence.counts, name))
    }


def test_seqs_are_64_bit() -> None:
    for seq in (2**31 - 1, 2**53 - 1, 2**63 - 3):
        sequence = after(seq)
        assert [place(sequence, seq + step) for step in (1, 2)] == [NEXT, NEXT]
        assert sequence.last == seq + 2
        assert counts(sequence) == {}


def test_a_live_start_begins_with_any_seq_and_misses_nothing() -> None:
    sequence = Sequence(None)
    sequence.connected()
    assert place(sequence, 31_527_015_322) == NEXT
    assert (sequence.last, sequence.time_us) == (31_527_015_322, T0)
    assert counts(sequence) == {}


def test_what_is_older_than_a_live_start_is_not_ours() -> None:
    sequence = Sequence(None)
    place(sequence, 100)
    assert place(sequence, 99, T0 - 1) == SKIP
    assert counts(sequence) == {"duplicates": 1}


def test_a_gap_is_legal_and_counted() -> None:
    sequence = after(100)
    assert place(sequence, 105) == NEXT
    assert counts(sequence) == {"missed": 4}


def test_an_inclusive_resume_sends_the_cursors_frame_again() -> None:
    sequence = after(100)
    sequence.connected()
    assert [place(sequence, seq) for seq in (100, 101)] == [SKIP, NEXT]
    assert counts(sequence) == {"replayed": 1}


def test_an_exclusive_resume_goes_on_behind_the_cursor() -> None:
    sequence = after(100)
    sequence.connected()
    assert place(sequence, 101) == NEXT
    assert counts(sequence) == {}


def test_a_gap_right_behind_a_resume_may_be_a_loss() -> None:
    sequence = after(100)
    sequence.connected()
    assert [place(sequence, seq) for seq in (111, 121)] == [NEXT, NEXT]
    assert counts(sequence) == {"missed": 19, "possible_loss": 10}


def test_a_gap_behind_the_cursors_own_frame_is_no_loss() -> None:
    sequence = after(100)
    sequence.connected()
    assert [place(sequence, seq) for seq in (99, 100, 111)] == [SKIP, SKIP, NEXT]
    assert counts(sequence) == {"missed": 10, "replayed": 2}


def test_a_resume_from_further_back_is_skipped_up_to_the_position() -> None:
    sequence = Sequence(None)
    for seq in (10, 11, 15, 16):
        place(sequence, seq)
    sequence.connected()
    # 12 to 14 were not there before: what the relay has of them now was never delivered.
    assert [place(sequence, seq) for seq in (9, 10, 11, 13, 15, 16, 17)] == [
        SKIP, SKIP, SKIP, LATE, SKIP, SKIP, NEXT,
    ]  # fmt: skip
    assert counts(sequence) == {"missed": 3, "replayed": 5, "late": 1}


def test_a_duplicate_is_skipped() -> None:
    sequence = after(100)
    assert [place(sequence, seq) for seq in (101, 101, 102, 101)] == [NEXT, SKIP, NEXT, SKIP]
    assert counts(sequence) == {"duplicates": 2}


def test_a_reordered_frame_is_delivered_late_and_only_once() -> None:
    sequence = after(100)
    assert [place(sequence, seq) for seq in (101, 103, 102, 102, 104)] == [
        NEXT, NEXT, LATE, SKIP, NEXT,
    ]  # fmt: skip
    assert counts(sequence) == {"missed": 1, "late": 1, "duplicates": 1}
    assert sequence.last == 104


def test_a_reordered_frame_may_be_newer_than_its_successor() -> None:
    """Relay times do not rise with seq, so this is no restart of the sequence."""
    sequence = after(100)
    place(sequence, 102, T0)
    assert place(sequence, 101, T0 + CLOCK_SKEW_US) == LATE


def test_all_of_a_gap_can_come_late_in_any_order() -> None:
    sequence = after(0)
    place(sequence, 10)
    assert [place(sequence, seq) for seq in (5, 1, 9, 2, 8, 3, 7, 4, 6)] == [LATE] * 9
    assert [place(sequence, seq) for seq in range(1, 11)] == [SKIP] * 10
    assert not sequence._gaps


def test_a_late_frame_does_not_end_a_resume() -> None:
    sequence = after(100)
    place(sequence, 110)
    sequence.connected()
    assert place(sequence, 105) == LATE
    assert place(sequence, 121) == NEXT
    assert sequence.counts.possible_loss == 10


@pytest.mark.parametrize("seq", [1, 99, 150])
def test_a_lower_seq_with_a_newer_time_is_a_restarted_sequence(seq: int) -> None:
    sequence = after(100)
    for one in range(101, 201):
        place(sequence, one)
    sequence.connected()
    with pytest.raises(SequenceResetError) as error:
        place(sequence, seq, T0 + 1)
    assert (error.value.seq, error.value.last_seq) == (seq, 200)
    assert sequence.last == 200
    assert place(sequence, 201) == NEXT


def test_a_live_start_notices_a_restart_too() -> None:
    sequence = Sequence(None)
    place(sequence, 100)
    with pytest.raises(SequenceResetError):
        place(sequence, 1, T0 + 1)


def test_a_seq_out_of_a_gap_is_a_restart_when_it_is_much_newer() -> None:
    sequence = after(100)
    place(sequence, 200)
    with pytest.raises(SequenceResetError):
        place(sequence, 150, T0 + CLOCK_SKEW_US + 1)


def test_nothing_is_a_restart_while_the_positions_time_is_unknown() -> None:
    sequence = after(100, 0)
    assert place(sequence, 50, T0) == SKIP


def test_the_newest_time_counts_not_the_last() -> None:
    sequence = after(100, 0)
    place(sequence, 101, T0 + 5)
    place(sequence, 102, T0)
    assert sequence.time_us == T0 + 5
    assert place(sequence, 101, T0 + 5) == SKIP


def test_a_time_far_ahead_of_our_clock_is_not_believed() -> None:
    sequence = after(100)
    assert place(sequence, 101, T0 + CLOCK_SKEW_US + 1, now_us=T0) == NEXT
    assert sequence.time_us == T0
    assert place(sequence, 50, 2**62, now_us=T0) == SKIP
    assert place(sequence, 102, T0 + CLOCK_SKEW_US, now_us=T0) == NEXT
    assert sequence.time_us == T0 + CLOCK_SKEW_US


def test_the_cursors_frame_again_is_no_restart_though_its_time_is_believed_only_now() -> None:
    ahead = T0 + CLOCK_SKEW_US + SECOND
    sequence = after(100)
    place(sequence, 101, ahead, now_us=T0)
    sequence.connected()
    assert place(sequence, 101, ahead, now_us=T0 + 60 * SECOND) == SKIP


def test_a_frame_without_a_time_is_placed_all_the_same() -> None:
    sequence = after(100)
    assert [place(sequence, seq, 0) for seq in (101, 103, 102, 101)] == [NEXT, NEXT, LATE, SKIP]
    assert sequence.time_us == T0


def test_gaps_are_bounded_and_the_oldest_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor, "GAPS_MAX", 3)
    sequence = after(0)
    for seq in range(2, 14, 2):  # 1, 3, 5, 7, 9, 11 are missing, the last three are remembered
        place(sequence, seq)
    assert [place(sequence, seq) for seq in (1, 3, 5)] == [SKIP] * 3
    assert place(sequence, 20) == NEXT
    assert place(sequence, 15) == LATE  # splits a gap, which makes one too many
    assert place(sequence, 9) == SKIP
    assert [place(sequence, seq) for seq in (11, 13, 14, 16)] == [LATE] * 4
    assert sequence.counts.duplicates == 4
    assert GAPS_MAX == 16_384


class Step(NamedTuple):
    seq: int
    time_us: int
    reconnects: bool


class Model:
    """Remembers every seq that was ever consumed, and says the rules in one sentence each."""

    def __init__(self, start: int | None, time_us: int) -> None:
        self.last, self.time_us = start, time_us
        self.below = start
        self.seen: set[int] = set()
        self.tally = dict.fromkeys(("missed", "possible_loss", "replayed", "duplicates", "late"), 0)
        self.resuming = False

    def place(self, seq: int, time_us: int) -> int | None:
        """None is a restarted sequence."""
        if self.below is None:
            self.below = seq - 1
        if self.last is not None and seq <= self.last:
            return self._behind(seq, time_us)
        skipped = 0 if self.last is None else seq - self.last - 1
        self.tally["missed"] += skipped
        self.tally["possible_loss"] += skipped if self.resuming else 0
        self.resuming = False
        self.last = seq
        self.seen.add(seq)
        self.time_us = max(self.time_us, time_us)
        return NEXT

    def _behind(self, seq: int, time_us: int) -> int | None:
        consumed = seq in self.seen or seq <= (self.below or 0)
        slack_us = 0 if consumed else CLOCK_SKEW_US
        if seq != self.last and self.time_us and time_us > self.time_us + slack_us:
            return None
        if not consumed:
            self.seen.add(seq)
            self.tally["late"] += 1
            return LATE
        self.tally["replayed" if self.resuming else "duplicates"] += 1
        if seq == self.last:
            self.resuming = False
        return SKIP


steps = st.lists(
    st.builds(
        Step,
        st.integers(1, 40),
        st.one_of(
            st.just(0),
            st.integers(T0, T0 + 20),
            st.integers(T0 + CLOCK_SKEW_US, T0 + CLOCK_SKEW_US + 20),
        ),
        st.booleans(),
    ),
    max_size=40,
)


@share(10)
@given(st.one_of(st.none(), st.integers(0, 30)), st.sampled_from([0, T0]), steps)
def test_it_does_what_a_model_with_endless_memory_does(
    start: int | None, time_us: int, steps: list[Step]
) -> None:
    sequence = Sequence(None if start is None else Position("relay", start, time_us))
    model = Model(start, 0 if start is None else time_us)
    for seq, frame_time_us, reconnects in steps:
        if reconnects:
            sequence.connected()
            model.resuming = model.last is not None
        expected = model.place(seq, frame_time_us)
        if expected is None:
            with pytest.raises(SequenceResetError):
                place(sequence, seq, frame_time_us)
        else:
            assert place(sequence, seq, frame_time_us) == expected
    assert (sequence.last, sequence.time_us) == (model.last, model.time_us)
    assert counts(sequence) == {name: number for name, number in model.tally.items() if number}
