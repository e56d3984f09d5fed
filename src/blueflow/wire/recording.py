"""Recordings: frames one behind the other, each behind its length as 4 big-endian bytes.

`--record` writes it, `replay:` and the simulated relay read it, and the recorded frames in
`tests/data/firehose` come in it.
"""

from __future__ import annotations

from blueflow.errors import RecordingError

FRAME_BYTES_MAX = 16 * 1024 * 1024  # far above the protocol's 5 MB: a larger length is garbage


def pack(frame: bytes) -> bytes:
    """Return the frame behind its length."""
    return len(frame).to_bytes(4, "big") + frame


class Unpacker:
    """Takes a recording in pieces of any size and gives whole frames back."""

    def __init__(self, name: str) -> None:
        """Remember `name` (of the recording) for error messages."""
        self._name = name
        self._rest = b""
        self._offset = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that are complete now.

        Raises:
            RecordingError: a length that no frame can have; the file is not a recording.
        """
        buffer = self._rest + data if self._rest else data
        frames = []
        start, end = 0, len(buffer)
        while start + 4 <= end:
            size = int.from_bytes(buffer[start : start + 4], "big")
            if not 0 < size <= FRAME_BYTES_MAX:
                raise RecordingError(self._name, self._offset + start, f"frame length {size}")
            if start + 4 + size > end:
                break
            frames.append(buffer[start + 4 : start + 4 + size])
            start += 4 + size
        self._rest = buffer[start:]
        self._offset += start
        return frames

    @property
    def rest(self) -> bytes:
        """The beginning of a frame that is not complete."""
        return self._rest

    @property
    def offset(self) -> int:
        """Where `rest` begins in the recording."""
        return self._offset

    def finish(self) -> int:
        """Return how many bytes are left over: more than 0 means that the last frame is cut off."""
        return len(self._rest)
