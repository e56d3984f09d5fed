"""One run of the main job: the parts that the settings name, signals, health, progress, summary."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import anyio

from blueflow.errors import CursorError, Exit, OutputClosedError
from blueflow.factory import KAFKA, SIM, quarantine_of, sink_of, source_of
from blueflow.health import Check, HealthServer
from blueflow.metrics import Metrics
from blueflow.pipeline import Flow, pump
from blueflow.process import stop_on_signals, tune_memory
from blueflow.progress import Progress, summary
from blueflow.quarantine import Quarantine
from blueflow.source.firehose import FirehoseSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from blueflow.events import Position
    from blueflow.interfaces import Source
    from blueflow.settings import Settings

PORT = 9401
_STALE_S = 120.0
_COMMIT_S = 60.0  # the longest interval that a sink has by default
_KAFKA_COMMIT_S = 5.0  # a position without events waits as long
_BUSY_S = 5.0  # a sink that works on one call for longer is what the rest waits for

_logger = logging.getLogger(__name__)


async def produce(settings: Settings) -> int:
    """Run until a limit, a signal or the end of the source; return the exit code.

    Raises:
        BlueflowError: anything that ends a run early.
    """
    tune_memory()
    metrics = Metrics()
    recorder = None
    if settings.record is not None:
        from blueflow.source.recorder import Recorder

        recorder = Recorder(settings.record.expanduser(), metrics, simulated=settings.source == SIM)
    source = source_of(settings, metrics, recorder)
    sink = sink_of(settings, source, metrics)
    flow = Flow()
    metrics.describe(
        pipeline=settings.pipeline,
        source=source.name,
        sink=(settings.sink or "").partition(":")[0],
        simulated=source.simulated,
    )
    quarantine = Quarantine(quarantine_of(settings), metrics)
    health = HealthServer.of(settings, PORT, metrics, _checks(settings, source, flow))
    progress = Progress(flow, source, settings)
    stop, begun = anyio.Event(), anyio.Event()
    stop_on_signals(stop)

    def accept(after: Position | None) -> None:
        _accept(settings, after)
        begun.set()

    if health is not None:
        await health.start()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.show)
            if settings.for_s is not None:
                tasks.start_soon(_stop_after, settings.for_s, begun, stop)
            try:
                await pump(
                    source,
                    sink,
                    limit=settings.limit,
                    stop=stop,
                    drain_s=settings.drain_s,
                    quarantine=quarantine,
                    metrics=metrics,
                    flow=flow,
                    accept=accept,
                )
            except OutputClosedError:
                _logger.info("the reader of the output has gone")
            tasks.cancel_scope.cancel()
    finally:
        progress.end()
        with anyio.move_on_after(2, shield=True):
            if health is not None:
                await health.stop()
    summary(flow, settings, source, progress.elapsed_s)
    return Exit.OK


def _accept(settings: Settings, after: Position | None) -> None:
    """Refuse a cursor that contradicts the position the sink has."""
    if after is not None and settings.cursor != "saved":
        raise CursorError(
            settings.cursor, f"the sink is at seq {after.seq} of {after.source} already"
        )


async def _stop_after(seconds: float, begun: anyio.Event, stop: anyio.Event) -> None:
    """End a run after its time; but a sink that cannot begin is an error and no short run."""
    await anyio.sleep(seconds)
    await begun.wait()
    stop.set()


def _checks(settings: Settings, source: Source, flow: Flow) -> dict[str, Callable[[], Check]]:
    checks = _Checks(settings, source, flow)
    return {"source": checks.connected, "frames": checks.flowing, "sink": checks.durable}


class _Checks:
    """What `/readyz` asks."""

    def __init__(self, settings: Settings, source: Source, flow: Flow) -> None:
        self._source, self._flow = source, flow
        usual_s = _KAFKA_COMMIT_S if (settings.sink or "").startswith(KAFKA) else _COMMIT_S
        self._late_s = 3 * (settings.commit_interval_s or usual_s) + settings.drain_s
        self._began_s = time.monotonic()

    def connected(self) -> Check:
        if isinstance(self._source, FirehoseSource) and not self._source.connected:
            return Check(ok=False, reason="not connected to the relay; see the log")
        return Check(ok=True, reason="connected")

    def flowing(self) -> Check:
        if self._busy_s > _BUSY_S:
            return Check(ok=True, reason="waiting for the sink")
        quiet_s = time.monotonic() - (self._flow.moved_s or self._began_s)
        if quiet_s > _STALE_S:
            return Check(ok=False, reason=f"no frame for {quiet_s:.0f} s")
        return Check(ok=True, reason=f"last frames {quiet_s:.0f} s ago")

    def durable(self) -> Check:
        flow = self._flow
        if self._busy_s > _STALE_S:
            return Check(ok=False, reason=f"the sink has been at one call for {self._busy_s:.0f} s")
        age_s = time.monotonic() - (flow.durable_s or self._began_s)
        if flow.keeps_position and flow.position != flow.durable and age_s > self._late_s:
            return Check(ok=False, reason=f"nothing made durable for {age_s:.0f} s")
        if not flow.durable_s:
            return Check(ok=True, reason="nothing was to be made durable yet")
        return Check(ok=True, reason=f"durable {age_s:.0f} s ago")

    @property
    def _busy_s(self) -> float:
        """For how long the sink has been at one call."""
        return time.monotonic() - self._flow.sink_call_s if self._flow.sink_call_s else 0.0
