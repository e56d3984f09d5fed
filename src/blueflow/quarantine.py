"""Input that could not become events, kept for a person to look at: bounded, never in the way."""

from __future__ import annotations

import logging
import os
from base64 import b64encode
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

import anyio.to_thread
import msgspec

from blueflow.logs import Throttle, clip

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from blueflow.interfaces import Rejected
    from blueflow.metrics import Metrics

FILE_NAME = "quarantine.jsonl"
OLDER_NAME = "quarantine.older.jsonl"
BYTES_MAX = 16 * 1024 * 1024  # of each of the two files
MESSAGE_BYTES_MAX = 1024 * 1024  # of one message; the rest is cut, and the entry says so
DETAIL_LENGTH_MAX = 500

_logger = logging.getLogger(__name__)


class Quarantine:
    """Appends what a source rejected to a file of JSON lines, the messages in base64.

    When the file is full it becomes the older one, and what was in that is dropped and counted. A
    disk that fails costs the entries, not the pipeline. Operations of one commit share its message:
    `message` is null where it is that of the entry before.

    Args:
        directory: made when the first entry comes.
        metrics: where to count.
        bytes_max: of each of the two files.
    """

    def __init__(self, directory: Path, metrics: Metrics, *, bytes_max: int = BYTES_MAX) -> None:
        self.directory = directory
        self._metrics = metrics.pipeline
        self._bytes_max = bytes_max
        self._throttle = Throttle()
        self.count = 0

    async def put(self, rejected: Sequence[Rejected], now_s: float) -> None:
        """Keep the rejected input.

        Args:
            rejected: from one batch.
            now_s: seconds since 1970.
        """
        self.count += len(rejected)
        for one in rejected:
            self._metrics.quarantined[one.reason].inc()
            if (left_out := self._throttle.admit(now_s)) is not None:
                extra = {
                    "reason": one.reason,
                    "detail": clip(one.detail, 200),
                    "seq": one.seq,
                    "after_seq": one.after_seq,
                    "directory": str(self.directory),
                    "left_out": left_out,
                }
                _logger.warning("input that cannot be read is in the quarantine", extra=extra)
        try:
            dropped = await anyio.to_thread.run_sync(
                self._append, rejected, now_s, abandon_on_cancel=True
            )
        except OSError as error:
            self._metrics.dropped["quarantine", "write_error"].inc(len(rejected))
            _logger.error(  # noqa: TRY400 - the sentence says it all
                "the quarantine cannot be written", extra={"problem": clip(error, 200)}
            )
        else:
            self._metrics.dropped["quarantine", "full"].inc(dropped)

    def _append(self, rejected: Sequence[Rejected], now_s: float) -> int:
        """Write; return how many older entries had to go."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path, older = self.directory / FILE_NAME, self.directory / OLDER_NAME
        dropped = 0
        file: BinaryIO = path.open("ab+")
        try:
            _end_line(file)
            before = None
            for one in rejected:
                line = _line(one, now_s, same=before is not None and one.message is before)
                before = one.message
                if file.tell() and file.tell() + len(line) > self._bytes_max:
                    file.close()
                    if older.exists():
                        dropped += older.read_bytes().count(b"\n")
                    path.replace(older)
                    file = path.open("ab")
                    line = _line(one, now_s, same=False)
                file.write(line)
        finally:
            file.close()
        return dropped


def _end_line(file: BinaryIO) -> None:
    """End a line that a crash or a full disk cut off, so that the next one can be read."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _line(one: Rejected, now_s: float, *, same: bool) -> bytes:
    """Return an entry; a commit with many bad operations has its bytes in the first of them."""
    cut = one.message[:MESSAGE_BYTES_MAX]
    entry = {
        "at": datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds"),
        "source": one.source,
        "after_seq": one.after_seq,
        "seq": one.seq,
        "op_index": one.op_index,
        "reason": one.reason,
        "detail": one.detail[:DETAIL_LENGTH_MAX].encode(errors="backslashreplace").decode(),
        "message_bytes": len(one.message),
        "message": None if same else b64encode(cut).decode(),
    }
    return msgspec.json.encode(entry) + b"\n"
