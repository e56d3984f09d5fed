"""The names of the topics, and which of them an event goes to. A core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX: Final = "bluesky."
SINGLE: Final = "events"
CURSOR: Final = "cursor"
DLQ: Final = "dlq"
BY_KIND: Final = "by-kind"
ROUTES: Final = (BY_KIND, "single")


class TopicNames:
    """All topics of one prefix.

    Args:
        prefix: what every name begins with.
        route: "by-kind", a topic for each data set, or "single", one topic for all events.
    """

    def __init__(self, prefix: str = PREFIX, route: str = BY_KIND) -> None:
        self.prefix, self.route = prefix, route
        by_kind = route == BY_KIND
        self.of_dataset = {name: prefix + (name if by_kind else SINGLE) for name in DATASETS}
        self.cursor, self.dlq = prefix + CURSOR, prefix + DLQ

    def transactional_id(self, pipeline: str) -> str:
        """Return the id under which one process at a time writes for a pipeline.

        A pipeline is one of these topics: the same name under another prefix is another pipeline.
        """
        own = "" if self.prefix == PREFIX else f"{self.prefix}|"
        return f"blueflow.{own}{pipeline}"

    @property
    def other_route(self) -> Sequence[str]:
        """Return where events went if the topics were once written with the other route."""
        if self.route == BY_KIND:
            return [self.prefix + SINGLE]
        return [self.prefix + name for name in DATASETS]

    @property
    def events(self) -> Sequence[str]:
        """The topics that events go to; they have equal numbers of partitions."""
        return list(dict.fromkeys(self.of_dataset.values()))
