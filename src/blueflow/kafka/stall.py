"""Which partition stands still, and since when. A core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

_Partition = TypeVar("_Partition", bound="Hashable")


class StallWatch(Generic[_Partition]):
    """When each partition moved last, and when its broker answered last."""

    def __init__(self) -> None:
        self._since: dict[_Partition, tuple[int, float]] = {}
        self._answers: dict[_Partition, tuple[int | None, float]] = {}
        self._warned: dict[_Partition, int] = {}

    def note(
        self,
        partition: _Partition,
        offset: int,
        *,
        behind: bool,
        answered_ms: int | None,
        now_s: float,
    ) -> None:
        """Note where a partition is, whether more is there, and when it was answered for last."""
        if not behind:
            self._since.pop(partition, None)
        elif self._since.get(partition, (-1, 0.0))[0] != offset:
            self._since[partition] = (offset, now_s)
        if self._answers.get(partition, (-1, 0.0))[0] != answered_ms:
            self._answers[partition] = (answered_ms, now_s)

    def longest_held(self, now_s: float) -> tuple[_Partition, float] | None:
        """Return the partition that has waited longest behind its end, and for how long."""
        if not self._since:
            return None
        partition = min(self._since, key=lambda one: self._since[one][1])
        return partition, now_s - self._since[partition][1]

    def warn(self, partition: _Partition) -> bool:
        """Tell whether this stop was not told yet."""
        offset = self._since[partition][0]
        if self._warned.get(partition) == offset:
            return False
        self._warned[partition] = offset
        return True

    def silent_s(self, now_s: float) -> float:
        """Return for how long no broker has answered for any partition."""
        return now_s - max((at_s for _, at_s in self._answers.values()), default=now_s)
