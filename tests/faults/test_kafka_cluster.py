"""Three brokers, of which one or two die at a time: some partitions have no leader then."""

from __future__ import annotations

import logging
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from tests.faults.kafkaruns import (
    CAMPAIGN,
    REPEATED,
    Follower,
    Pipeline,
    Run,
    end,
    judge,
    relay_for,
    until_further,
)

from blueflow.testing.services.kafkacluster import KafkaCluster

if TYPE_CHECKING:
    from pathlib import Path

_logger = logging.getLogger(__name__)

ENDED = "the brokers left a transaction open"
TIMEOUT_S = 5
DEATHS, DEATHS_FULL = 2, 40
ALONE = 0.75  # so often only one dies, and two, which is more than a quorum bears, else
RATE = 200
WITHIN_S = 150

pytestmark = CAMPAIGN


@pytest.mark.timeout(1800)
async def test_brokers_of_a_cluster_that_die_cost_nothing(
    tmp_path: Path, kafka_jars: Path, *, full_campaign: bool
) -> None:
    random, ledger = Random(20_261_126), tmp_path / "ledger"
    # With one replica a partition has no leader while its broker is away.
    async with KafkaCluster(replicas=1) as cluster, relay_for(ledger, seed=15, rate=RATE) as relay:
        pipeline = Pipeline.new(relay.url, cluster.bootstrap)
        flags = ("--commit-interval", "0.1s", "--transaction-timeout", f"{TIMEOUT_S}s")
        with Follower(pipeline) as follower:
            async with Run(pipeline.command(*flags), tmp_path / "log") as run:
                await until_further(follower, run)
                for number in range(DEATHS_FULL if full_campaign else DEATHS):
                    await anyio.sleep(random.uniform(0, 1))
                    dead = random.sample(cluster.brokers, 1 if random.random() < ALONE else 2)
                    try:
                        for broker in dead:
                            await broker.kill()
                        await anyio.sleep(random.uniform(0, 1) + TIMEOUT_S * (number % 2 == 0))
                    finally:
                        await cluster.start(dead)
                    await until_further(follower, run, within_s=WITHIN_S)
                through = await end(run, follower)
                said = run.said()
            delivered = await anyio.to_thread.run_sync(judge, pipeline, ledger, through)
    _logger.info("%d events; what hung was ended %d times", delivered, said.count(ENDED))
    assert REPEATED in said
    assert ENDED in said or not full_campaign
