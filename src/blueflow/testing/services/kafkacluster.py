"""Apache Kafka: several brokers, each of them a controller as well, on the loopback interface."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from blueflow.testing.services.child import LOOPBACK
from blueflow.testing.services.kafka import QUICK_START, KafkaBroker, new_cluster_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

_JAVA_OPTIONS = ("-Xms256m", "-Xmx320m", *QUICK_START)


class KafkaCluster:
    """Real brokers as child processes: use it in `async with`.

    The topics that it keeps for itself have a replica on each broker.

    Args:
        size: how many brokers; an odd number.
        replicas: of topics that do not say; at least 2 of 3 or more have to be there for a write.
    """

    def __init__(self, size: int = 3, *, replicas: int = 3) -> None:
        self._data = Path(tempfile.mkdtemp(prefix="blueflow-kafka-"))
        cluster_id = new_cluster_id()
        self.brokers = [
            KafkaBroker(self._data / str(number), cluster_id=cluster_id, java_options=_JAVA_OPTIONS)
            for number in range(size)
        ]
        voters = ",".join(
            f"{number}@{LOOPBACK}:{broker.controller_port}"
            for number, broker in enumerate(self.brokers, 1)
        )
        for number, broker in enumerate(self.brokers, 1):
            broker.configure(
                {
                    "node.id": str(number),
                    "controller.quorum.voters": voters,
                    "default.replication.factor": str(replicas),
                    "min.insync.replicas": str(min(2, replicas)),
                    "offsets.topic.replication.factor": str(size),
                    "transaction.state.log.replication.factor": str(size),
                    "transaction.state.log.min.isr": str(min(2, size)),
                    "share.coordinator.state.topic.replication.factor": str(size),
                }
            )

    @property
    def bootstrap(self) -> str:
        """The addresses of all brokers."""
        return ",".join(broker.bootstrap for broker in self.brokers)

    async def start(self, brokers: Iterable[KafkaBroker] | None = None) -> None:
        """Start brokers, by default all, together: one alone is no quorum.

        Raises:
            MissingProgramError, ServiceError: as `KafkaBroker.start`.
        """
        async with anyio.create_task_group() as group:
            for broker in self.brokers if brokers is None else brokers:
                group.start_soon(broker.start)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for broker in self.brokers:  # the last ones have no quorum to say goodbye to
            with anyio.CancelScope(shield=True):
                await broker.kill()
        shutil.rmtree(self._data, ignore_errors=True)
