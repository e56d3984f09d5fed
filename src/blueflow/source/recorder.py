"""`--record FILE`: the frames as they came, for `replay:FILE` and for tests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, BinaryIO

import zstandard

from blueflow.errors import OutputNotWritableError
from blueflow.logs import clip
from blueflow.wire.recording import pack

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.metrics import Metrics

_BUFFER_BYTES = 1024 * 1024

_logger = logging.getLogger(__name__)


class Recorder:
    """Appends frames to a new file; a name that ends in `.zst` is compressed.

    A disk that fails ends the recording, not the flow; the frames left out are counted.

    Args:
        path: must not exist.
        metrics: where to count.

    Raises:
        OutputNotWritableError: the file exists or cannot be made.
    """

    def __init__(self, path: Path, metrics: Metrics) -> None:
        try:
            self._file: BinaryIO | None = path.open("xb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise OutputNotWritableError(str(path), error.strerror or str(error)) from error
        self._raw: BinaryIO = self._file
        if path.suffix == ".zst":
            self._file = zstandard.ZstdCompressor(level=3).stream_writer(self._raw)
        self._path = path
        self._dropped = metrics.pipeline.dropped["record", "write_error"]
        self.frames = 0

    def add(self, frame: bytes) -> None:
        """Append one frame."""
        if self._file is None:
            self._dropped.inc()
            return
        try:
            self._file.write(pack(frame))
            self.frames += 1
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is buffered."""
        if self._file is None:
            return
        try:
            self._file.close()
            self._raw.close()
        except OSError as error:
            self._give_up(error)
        self._file = None

    def _give_up(self, error: OSError) -> None:
        _logger.error(
            "the recording ends here: the file cannot be written",
            extra={"path": str(self._path), "problem": clip(error, 200), "frames": self.frames},
        )
        self._dropped.inc()
        self._file = None
