"""What every sink and every source has to keep, as test classes to inherit from.

    class TestMySink(SinkContract):
        async def make_sink(self) -> Sink: ...
        async def stored_events(self) -> Sequence[Mapping[str, Any]]: ...

A sink that keeps no position inherits from `OutputContract`, a source from `SourceContract`, a
place for a lake from `StoreContract`. The tests are coroutines: run them with pytest and
pytest-asyncio in auto mode. They build on the Protocols of `blueflow.interfaces` and
`blueflow.lake.store` alone, so they hold for a sink of yours as for ours.
"""

from __future__ import annotations

from blueflow.testing.samples import contract_events
from blueflow.testing.sinkcontract import OutputContract, SinkContract
from blueflow.testing.sourcecontract import SourceContract
from blueflow.testing.storecontract import StoreContract

__all__ = ["OutputContract", "SinkContract", "SourceContract", "StoreContract", "contract_events"]
