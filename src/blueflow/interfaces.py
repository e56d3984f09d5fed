"""The contracts between the rooms, without code; `blueflow.testing.contracts` proves the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from blueflow.events import Event, Position

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


class Rejected(msgspec.Struct, frozen=True):
    """Input that could not become an event: counted, and its bytes go to the quarantine.

    `reason` is one of a small fixed set (it becomes a metric label); `detail` is for people.
    """

    source: str
    after_seq: int | None
    seq: int | None
    op_index: int | None
    reason: str
    detail: str
    message: bytes


class Batch(msgspec.Struct, frozen=True):
    """What a source hands over at once: whole firehose events, in the source's order.

    `through` covers filtered and rejected frames too, so a batch may have no events and still move
    the cursor. None: nothing with a seq has arrived yet. `seqs` is the position behind each event
    where that is not the event's own seq: a recording of lines counts its lines.
    """

    events: Sequence[Event]
    through: Position | None
    frames: int = 0
    frame_bytes: int = 0
    rejected: Sequence[Rejected] = ()
    seqs: Sequence[int] | None = None


@runtime_checkable
class Source(Protocol):
    """Where events come from. One task iterates it."""

    @property
    def name(self) -> str:
        """What events and positions carry as `source`; the same after every restart."""

    @property
    def simulated(self) -> bool:
        """Whether the data is made up. Sinks mark it as such and do not mix it with real data."""

    async def start(self, after: Position | None) -> None:
        """Begin behind `after`; None is where the source's own settings say (live by default)."""

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Iterate over batches until the source ends (a recording) or is stopped."""

    async def stop(self) -> None:
        """Close the connection. Batches not yet taken are given up: they are behind the cursor."""


@runtime_checkable
class Sink(Protocol):
    """Where events go. One task calls it, batch after batch; calls never overlap.

    A sink may buffer what it was given, but events and the position that covers them become durable
    together or not at all, in the order written. `write` is called at least once a second, with no
    events when there are none, so a sink that commits by age looks at its clock there.
    """

    async def resume(self) -> Mapping[str, Position]:
        """Fence every older writer, repair what it left, return each source's durable position.

        Called once, before anything else. A sink that keeps no position returns an empty mapping,
        and says so with an attribute `keeps_position = False`: then a limit is met exactly, even
        within a commit.
        """

    async def write(self, events: Sequence[Event], *, through: Position) -> None:
        """Take `events`, which may be empty, and the position `through`, which never goes back.

        Raises a `BlueflowError` when they cannot be made durable; the sink is then only closed.
        """

    async def flush(self) -> None:
        """Return when everything written is durable."""

    @property
    def durable(self) -> Mapping[str, Position]:
        """The positions that would be returned by `resume()` if the process died now."""

    async def close(self) -> None:
        """Release everything. Called exactly once, also after an error; does not flush."""
