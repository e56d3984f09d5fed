"""One run of the archive: the parts that the settings name, signals, health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from blueflow.archiver import Archive
from blueflow.errors import Exit, SettingError, sole
from blueflow.factory import connection_of, lake_store_of
from blueflow.health import HealthServer
from blueflow.lake.keeper import keeper_of
from blueflow.lake.layout import Shard
from blueflow.lake.shard import new_instance
from blueflow.lake.shardwriter import COMMIT_INTERVAL_S
from blueflow.metrics import Metrics
from blueflow.process import stop_on_signals, tune_memory

if TYPE_CHECKING:
    from blueflow.settings import Settings

PORT: Final = 9402
_CLOSE_S: Final = 2.0


async def archive(settings: Settings) -> int:
    """Run until a signal or a limit of time; return the exit code.

    Raises:
        BlueflowError: anything that ends a run early.
    """
    tune_memory()
    metrics = Metrics()
    servers = settings.kafka_bootstrap_servers
    if servers is None:
        problem = "there are no brokers to read from"
        raise SettingError(
            "kafka_bootstrap_servers", settings.origin("kafka_bootstrap_servers"), problem
        )
    connection = connection_of(settings, servers)
    ordinal, _, total = settings.shard.partition("/")
    shard = Shard(settings.pipeline, int(ordinal), int(total))
    store = lake_store_of(settings, metrics.lake)
    metrics.describe(pipeline=settings.pipeline, source="kafka", sink="lake", simulated=False)
    keeper = None
    if settings.compaction == "on":
        keeper = keeper_of(
            store,
            shard,
            lateness_s=settings.lateness_s,
            keep_fresh_s=settings.keep_fresh_s,
            commit_interval_s=settings.commit_interval_s or COMMIT_INTERVAL_S,
            instance=new_instance(),
            metrics=metrics.lake,
        )
    run = Archive(connection, store, shard, settings, metrics, keeper)
    health = HealthServer.of(settings, PORT, metrics, {"lake": run.health})
    stop = anyio.Event()
    stop_on_signals(stop)
    if health is not None:
        await health.start()
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            if settings.for_s is not None:
                tasks.start_soon(_stop_after, settings.for_s, stop)
            await run.until(stop)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = sole(group)
    finally:
        with anyio.move_on_after(_CLOSE_S, shield=True):
            if health is not None:
                await health.stop()
    if failure is not None:
        raise failure  # outside of the handler, which would make the group its context
    return Exit.OK


async def _stop_after(seconds: float, stop: anyio.Event) -> None:
    await anyio.sleep(seconds)
    stop.set()
