"""How the last transaction of a pipeline was decided, and how what hangs of it has to end. A core.

Its coordinator knows the decision until the next producer begins. What hangs has to end that way,
since some of its partitions may have their markers. Where nobody knows, it ends so that no event
is lost: with the cursor among what hangs it is aborted and comes again, and otherwise committed,
since the position may be behind it; at worst some events come twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blueflow.errors import TopicError

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from aiokafka import TopicPartition


class LastTransaction:
    """What is known of it over the lives of producers.

    Args:
        cursor: the partition that holds the positions.
    """

    def __init__(self, cursor: TopicPartition) -> None:
        self._cursor = cursor
        self._committed: bool | None = None
        self._ending: frozenset[TopicPartition] | None = None  # by a transaction of its own
        self._ending_committed: bool | None = None

    def told(self, *, committed: bool | None) -> None:
        """Take what the coordinator says before a producer begins.

        None is nothing: a life that got no further than its id was in between.
        """
        if committed is None:
            return
        if self._ending is None:
            self._committed = committed
        else:
            self._ending_committed = committed

    def end(self, hanging: AbstractSet[TopicPartition]) -> bool:
        """Return whether what hangs is to be committed; `ended` has to follow, or another life.

        Raises:
            TopicError: a transaction that was to commit what hung was aborted, and events with it
                that the position is behind of.
        """
        if self._ending is not None and self._committed and self._ending_committed is False:
            undone = self._ending - hanging
            if undone and self._cursor not in undone:
                raise _lost(undone)
            if undone:  # the position with it, so all comes again
                self._committed = False
        self._ending = self._ending_committed = None
        if not hanging:
            return False
        if self._committed is None:
            self._committed = self._cursor not in hanging
        self._ending = frozenset(hanging)
        return self._committed

    def ended(self) -> None:
        """Nothing hangs any more."""
        self._ending = None


def _lost(undone: AbstractSet[TopicPartition]) -> TopicError:
    places = ", ".join(f"{one.topic}/{one.partition}" for one in sorted(undone))
    problem = (
        "no longer has events in front of the position: the brokers had left a transaction open, "
        f"and a failure while it was ended aborted what was committed elsewhere ({places})"
    )
    how = "write the time before the newest position again, with a new --pipeline and --cursor"
    return TopicError(min(undone).topic, problem, how)
