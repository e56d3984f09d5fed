"""What every sink and every source has to keep, as test classes to inherit from.

    class TestMySink(SinkContract):
        async def make_sink(self) -> Sink: ...
        async def stored_events(self) -> Sequence[Mapping[str, Any]]: ...

A sink that keeps no position inherits from `OutputContract`, a source from `SourceContract`. The
tests are coroutines: run them with pytest and pytest-asyncio in auto mode. They build on the
Protocols of `blueflow.interfaces` alone, so they hold for a sink of yours as for ours.
"""

from __future__ import annotations

from blueflow.testing.samples import contract_events
from blueflow.testing.sinkcontract import OutputContract, SinkContract
from blueflow.testing.sourcecontract import SourceContract

__all__ = ["OutputContract", "SinkContract", "SourceContract", "contract_events"]
