"""The source contract over the list double; real sources run it beside their own tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blueflow.testing.contracts import SourceContract, contract_events
from blueflow.testing.memory import ListSource, batches_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.events import Event
    from blueflow.interfaces import Source

EVENTS = contract_events("list.example", 40)


class TestListSource(SourceContract):
    endless = False

    async def make_source(self) -> Source:
        return ListSource(batches_of(EVENTS, 7), endless=self.endless)

    async def expected_events(self) -> Sequence[Event]:
        return EVENTS


class TestEndlessListSource(TestListSource):
    endless = True
