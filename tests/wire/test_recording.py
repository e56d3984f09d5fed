"""Recordings: whole frames out of pieces of any size, and an error with the right place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpus.cases import share

from blueflow.errors import RecordingError
from blueflow.wire.recording import FRAME_BYTES_MAX, Unpacker, pack


def feed_all(unpacker: Unpacker, pieces: list[bytes]) -> list[bytes]:
    return [frame for piece in pieces for frame in unpacker.feed(piece)]


@share(10)
@given(st.lists(st.binary(min_size=1, max_size=30)), st.lists(st.integers(0, 40)), st.data())
def test_frames_come_back_whatever_the_pieces(
    frames: list[bytes], sizes: list[int], data: st.DataObject
) -> None:
    recording = b"".join(map(pack, frames))
    cut = data.draw(st.integers(0, len(recording)))
    unpacker, got, position = Unpacker("x"), [], 0
    for size in [*sizes, len(recording)]:
        got += unpacker.feed(recording[position : min(position + size, cut)])
        position = min(position + size, cut)
    whole, rest = [], cut
    for frame in frames:
        if rest < 4 + len(frame):
            break
        whole.append(frame)
        rest -= 4 + len(frame)
    assert (got, unpacker.finish()) == (whole, rest)
    assert (unpacker.offset, unpacker.rest) == (cut - rest, recording[cut - rest : cut])


@share(5)
@given(st.lists(st.binary(min_size=1, max_size=10), max_size=5), st.integers(1, 50))
def test_garbage_is_told_with_its_place(frames: list[bytes], size: int) -> None:
    recording = b"".join(map(pack, frames))
    data = recording + (FRAME_BYTES_MAX + 1).to_bytes(4, "big")
    with pytest.raises(RecordingError) as error:
        feed_all(Unpacker("some.bin"), [data[at : at + size] for at in range(0, len(data), size)])
    assert (error.value.name, error.value.offset) == ("some.bin", len(recording))


def test_an_empty_frame_is_garbage() -> None:
    with pytest.raises(RecordingError, match="frame length 0 at byte 5"):
        Unpacker("x").feed(pack(b"a") + bytes(4))


def test_the_largest_frame_is_one() -> None:
    frame = bytes(FRAME_BYTES_MAX)
    assert Unpacker("x").feed(pack(frame)) == [frame]


def test_recorded_frames_are_read(recorded_frames: list[bytes]) -> None:
    unpacker = Unpacker("frames.bin")
    assert unpacker.feed(b"".join(map(pack, recorded_frames))) == recorded_frames
    assert unpacker.finish() == 0
