"""`--record FILE`: the frames as they came, for `replay:FILE` and for tests."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, BinaryIO

import zstandard

from blueflow.errors import RecordFileError
from blueflow.logs import clip
from blueflow.wire.recording import pack

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.metrics import Metrics

SIMULATED_SUFFIX = ".simulated"
_BUFFER_BYTES = 1024 * 1024

_logger = logging.getLogger(__name__)


class Recorder:
    """Writes frames to a new file; a name that ends in `.zst` is compressed.

    The file is made with the first frame, so that a run that is refused leaves none behind. A disk
    that fails ends the recording, not the flow; the frames left out are counted.

    Args:
        path: must not exist.
        metrics: where to count.
        simulated: whether the data is made up: then a file beside it, with `.simulated` behind its
            name, says so, and `replay:` believes it.

    Raises:
        RecordFileError: the file exists, or its folder cannot be written to.
    """

    def __init__(self, path: Path, metrics: Metrics, *, simulated: bool = False) -> None:
        if path.exists() or path.is_symlink():
            raise RecordFileError(str(path), "it exists")
        if not path.parent.is_dir():
            raise RecordFileError(str(path), "its folder does not exist")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise RecordFileError(str(path), "its folder may not be written to")
        self._path = path
        self._mark = path.with_name(path.name + SIMULATED_SUFFIX) if simulated else None
        self._dropped = metrics.pipeline.dropped["record", "write_error"]
        self._file: BinaryIO | None = None
        self._raw: BinaryIO | None = None
        self._ended = False
        self.frames = 0

    def add(self, frame: bytes) -> None:
        """Append one frame."""
        if self._ended:
            self._dropped.inc()
            return
        try:
            file = self._file or self._open()
            file.write(pack(frame))
            self.frames += 1
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is buffered; the recording ends."""
        self._ended = True
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError as error:
            self._give_up(error)

    def _open(self) -> BinaryIO:
        if self._mark is not None:
            self._mark.write_text(f"{self._path.name} was recorded from the simulated network.\n")
        self._raw = raw = self._path.open("xb", buffering=_BUFFER_BYTES)
        self._file = raw
        if self._path.suffix == ".zst":
            self._file = zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(raw)
        return self._file

    def _give_up(self, error: OSError) -> None:
        _logger.error(
            "the recording ends here: the file cannot be written; what was buffered is not in it",
            extra={"path": str(self._path), "problem": clip(error, 200), "taken": self.frames},
        )
        self._dropped.inc()
        self._ended, self._file = True, None
        if self._raw is not None:
            with contextlib.suppress(OSError):
                self._raw.close()
