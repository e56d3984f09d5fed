"""Event time up to which every partition is read. A core.

No partition tells how far the others are, and a quiet one tells nothing. But what the producer
commits, it commits in the order of the source: once every partition is read beyond where it ended
after an event was seen, what is older than that event has been read as well, but for what the
source itself sends late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

_Partition = TypeVar("_Partition", bound="Hashable")


class Watermark(Generic[_Partition]):
    """Looks for moments at which all is read up to an event that was seen before."""

    def __init__(self) -> None:
        self.time_ms = 0
        self._seen_ms = 0
        self._asked_ms = 0
        self._ends: dict[_Partition, int] = {}

    def step(
        self,
        newest_ms: int,
        positions: Mapping[_Partition, int],
        ends: Mapping[_Partition, tuple[int | None, int | None]],
        now_ms: int,
    ) -> int:
        """Return the watermark, which never goes back.

        Args:
            newest_ms: the newest event seen in any partition; milliseconds since 1970.
            positions: how far each partition is read.
            ends: where it ended, open transactions included, and when that was asked.
            now_ms: by the clock that `ends` were asked by.
        """
        if not self._seen_ms:
            self._seen_ms, self._asked_ms, self._ends = newest_ms, now_ms, {}
            return self.time_ms
        for partition, (end, at_ms) in ends.items():
            known = end is not None and at_ms is not None
            if partition not in self._ends and known and at_ms > self._asked_ms:  # type: ignore[operator]
                self._ends[partition] = end  # type: ignore[assignment]
        if all(
            partition in self._ends and position >= self._ends[partition]
            for partition, position in positions.items()
        ):
            self.time_ms = max(self.time_ms, self._seen_ms)
            self._seen_ms = 0
        return self.time_ms
