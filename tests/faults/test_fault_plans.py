"""Seeded plans of many faults at once: each proven to have fired, and delivered equals issued."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import anyio
import pytest

from blueflow.backoff import Backoff
from blueflow.metrics import Metrics
from blueflow.pipeline import pump
from blueflow.source.firehose import FirehoseSource
from blueflow.testing.faultplan import FAULTS, FaultPlan
from blueflow.testing.ledger import Ledger
from blueflow.testing.memory import MemorySink
from blueflow.testing.network import SimulatedNetwork
from blueflow.testing.relay import RelaySettings, SimulatedRelay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blueflow.interfaces import Rejected

EVENTS = 3000
PLANS, PLANS_FULL = 4, 60
# A restart of the sequence, FutureCursor and a final HTTP status end a run by design; see the tests
# of the source. Stalls are waited for, so they are short.
ENDING = {"restart", "error", "http", "stall", "half-open", "oversize-stays", "oversize"}
KINDS = sorted(set(FAULTS) - ENDING)
FRAMES = list(islice(SimulatedNetwork(records=300, accounts=300, gap_share=0.01), EVENTS + 100))
SPOILT = {"garbage-stays", "truncated-stays", "text-stays", "corrupt-record", "corrupt-node"} | {
    "missing-record",
    "bomb",
}


class Rejections:
    def __init__(self) -> None:
        self.rejected: list[Rejected] = []

    async def put(self, rejected: Sequence[Rejected], now_s: float) -> None:
        self.rejected += rejected


def seeds() -> range:
    full = bool(os.environ.get("BLUEFLOW_TEST_FULL"))
    return range(PLANS_FULL if full else PLANS)


@pytest.mark.faults
@pytest.mark.parametrize("resume", ["inclusive", "exclusive"])
@pytest.mark.parametrize("seed", seeds())
async def test_a_plan_of_many_faults_loses_and_doubles_nothing(seed: int, resume: str) -> None:
    drawn = FaultPlan.random(seed, events=EVENTS, kinds=KINDS, count=24)
    # A swap needs two plain neighbours: beside another fault it cannot fire.
    places = Counter(place for fault in drawn.faults for place in range(fault.at - 2, fault.at + 3))
    kept = [f for f in drawn.faults if f.kind != "reorder" or places[f.at] == 1]
    plan = FaultPlan(
        f"{','.join(map(str, kept))},stall:20@700,half-open:20@1400,oversize@2100,http:429/0@1"
    )
    ledger, metrics, rejections = Ledger(), Metrics(), Rejections()
    settings = RelaySettings(
        limit=EVENTS,
        resume=resume,  # type: ignore[arg-type]
        speed=1,
        rate=2500.0,
    )
    sink, stop = MemorySink(buffered=seed % 2 == 1), anyio.Event()
    async with SimulatedRelay(iter(FRAMES), settings, faults=plan, ledger=ledger) as relay:
        source = FirehoseSource(
            relay.url,
            name="sim",
            metrics=metrics,
            backoff=Backoff(0.01, 0.05),
            stall_timeout_s=0.5,
            ping_interval_s=0.4,
        )

        async def end() -> None:
            while relay.log.end < EVENTS or _seq(source) < relay.log.last_seq:
                await anyio.sleep(0.02)
            stop.set()

        ending = asyncio.create_task(end())
        try:
            with anyio.fail_after(100):
                await pump(
                    source,
                    sink,
                    stop=stop,
                    metrics=metrics,
                    quarantine=rejections,  # type: ignore[arg-type]
                )
        finally:
            ending.cancel()
    assert not relay.faults.unfired, relay.faults.unfired
    verdict = ledger.compare(sink.events)
    # A frame that the relay sent behind its successor is delivered as it came: see decision 004.
    swapped = {fault.at for fault in plan.faults if fault.kind == "reorder"}
    late = {f"seq {entry.seq} op" for entry in ledger if entry.index in swapped}
    findings = {name: count for name, count in verdict.counts.items() if count}
    assert set(findings) <= {"reordered"}, f"seed {seed}: {verdict}"
    assert all(any(place in one for place in late) for one in verdict.reordered), str(verdict)
    spoilt = [fault for fault in plan.faults if fault.kind in SPOILT]
    assert len({(one.seq, one.message) for one in rejections.rejected}) >= len(spoilt)


def _seq(source: FirehoseSource) -> int:
    position = source.position
    return position.seq if position else 0
