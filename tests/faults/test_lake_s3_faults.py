"""An S3 server that refuses, loses, hangs, dies and forgets; the relay's ledger decides."""

from __future__ import annotations

import logging
import secrets
import signal
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from tests.faults.kafkaruns import Run
from tests.faults.lakeruns import Globber, Lake, judge, relay_for, seq_of, until_committed
from tests.groups import SERVERS

from blueflow.lake.address import store_of
from blueflow.lake.s3client import S3Options
from blueflow.testing.s3proxy import Operation, S3Proxy

if TYPE_CHECKING:
    from pathlib import Path

    from blueflow.testing.services.s3 import SeaweedServer

_logger = logging.getLogger(__name__)

ROUNDS, ROUNDS_FULL = 1, 10
DEATHS, DEATHS_FULL = 2, 20
CHANGES = (
    Operation.CREATE_UPLOAD,
    Operation.UPLOAD_PART,
    Operation.PUT_NEW,
    Operation.COMPLETE_UPLOAD,
)

pytestmark = [pytest.mark.faults, pytest.mark.xdist_group(SERVERS), pytest.mark.timeout(1500)]


def lake_behind(proxy: S3Proxy, server: SeaweedServer) -> Lake:
    """Return a lake in a new bucket whose writers go through the proxy; readers do not."""
    return Lake.in_bucket(f"faults-{secrets.token_hex(4)}", server, endpoint=proxy.endpoint)


async def further(lake: Lake, run: Run) -> None:
    """Wait for two commits more: the first may have begun before."""
    for _ in range(2):
        await until_committed(lake, run, await seq_of(lake))


async def test_calls_that_are_refused_lost_and_held_cost_nothing(
    tmp_path: Path, seaweed: SeaweedServer, *, full_campaign: bool
) -> None:
    """503 SlowDown, a timeout after success, half an answer, a silent peer; and a second writer."""
    rounds = ROUNDS_FULL if full_campaign else ROUNDS
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    async with relay_for(ledger, seed=5) as relay, S3Proxy(_address(seaweed)) as proxy:
        lake = lake_behind(proxy, seaweed)
        command, environment = lake.produce(relay), lake.environment
        with Globber(lake) as globber:
            async with Run(command, log, environment) as run:
                await until_committed(lake, run, 0)
                for _ in range(rounds):
                    for operation in CHANGES:
                        proxy.refuse(operation, times=3)
                        proxy.lose_reply(operation, times=2, skip=1)
                        proxy.lose_reply(operation, then="half", skip=2)
                        proxy.lose_request(operation, skip=3)
                        await further(lake, run)
                    proxy.lose_reply(Operation.PUT_NEW, then="hang")
                    await further(lake, run)
                    proxy.cut()
                    await further(lake, run)
                    proxy.block()
                    with anyio.fail_after(60):  # until somebody has met the silence
                        while not proxy.fired["block"]:
                            await anyio.sleep(0.1)
                    await anyio.sleep(3)
                    proxy.unblock()
                    await further(lake, run)
                async with Run(command, tmp_path / "second.log", environment) as second:
                    assert await run.ended(60) == 78, run.said()[-2000:]
                    assert "BF-245" in run.said()
                    await further(lake, second)
                    await second.stop()
        through = await seq_of(lake)
    await check(lake, ledger, through, globber)
    assert proxy.fired["refuse"] >= 3 * len(CHANGES) * rounds
    assert proxy.fired["lose_reply"] >= 3 * len(CHANGES) * rounds
    assert proxy.fired["lose_request"] >= len(CHANGES) * rounds
    assert proxy.fired["block"] >= rounds
    assert '"a call of the store is tried again"' in log.read_text()


async def test_a_server_that_dies_and_comes_back_has_every_event_once(
    tmp_path: Path, seaweed: SeaweedServer, *, full_campaign: bool
) -> None:
    deaths = DEATHS_FULL if full_campaign else DEATHS
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    lake = Lake.in_bucket(f"faults-{secrets.token_hex(4)}", seaweed)
    async with relay_for(ledger, seed=6) as relay:
        command, environment = lake.produce(relay), lake.environment
        async with Run(command, log, environment) as run:
            await until_committed(lake, run, 0)
            for number in range(deaths):
                await anyio.sleep(0.1 + 0.07 * number)  # another point of the commit each time
                await seaweed.kill()
                assert seaweed.pid == 0
                await anyio.sleep(number % 4)
                await seaweed.start()
                await further(lake, run)
            await run.stop()
        through = await seq_of(lake)
    with Globber(lake) as globber, anyio.fail_after(60):
        while not globber.looks["raw"]:
            await anyio.sleep(0.1)
    await check(lake, ledger, through, globber)
    assert log.read_text().count('"a call of the store is tried again"') >= deaths


async def test_uploads_that_expired_are_made_anew_from_the_relay(
    tmp_path: Path, seaweed: SeaweedServer, *, full_campaign: bool
) -> None:
    rounds = ROUNDS_FULL if full_campaign else ROUNDS
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    async with relay_for(ledger, seed=8) as relay, S3Proxy(_address(seaweed)) as proxy:
        lake = lake_behind(proxy, seaweed)
        command, environment = lake.produce(relay), lake.environment
        for _ in range(rounds):
            async with Run(command, log, environment) as run:
                before, refused = await seq_of(lake), proxy.fired["refuse"]
                await until_committed(lake, run, before)
                proxy.refuse(Operation.COMPLETE_UPLOAD, times=10_000)
                with anyio.fail_after(60):  # decided, and not complete
                    while proxy.fired["refuse"] == refused:
                        await anyio.sleep(0.02)
                assert await run.kill() == -signal.SIGKILL
            assert await forget_uploads(lake, seaweed) > 0
            proxy.forget()
            async with Run(command, log, environment) as run:
                await further(lake, run)
                assert '"files are gone and are made again from their input"' in run.said()
                await run.stop()
        through = await seq_of(lake)
    with Globber(lake) as globber, anyio.fail_after(60):
        while not globber.looks["raw"]:
            await anyio.sleep(0.1)
    await check(lake, ledger, through, globber)
    assert proxy.fired["refuse"] >= rounds


async def check(lake: Lake, ledger: Path, through: int, globber: Globber) -> None:
    verdict = await anyio.to_thread.run_sync(lambda: judge(lake, ledger, through=through))
    _logger.info("%d events, %d hours marked", verdict.delivered, len(globber.marked))
    assert globber.wrong == []
    assert verdict.ok, str(verdict)
    assert verdict.delivered == verdict.demanded > 1000


async def forget_uploads(lake: Lake, server: SeaweedServer) -> int:
    """Abort every upload, as servers do with those that nobody completed in time."""
    options = S3Options(server.endpoint, server.access_key, server.secret_key)
    store = store_of(lake.url, options)
    await store.open(create=False)
    try:
        found = await store.uploads("fresh/")
        for upload in found:
            await store.abort(upload)
    finally:
        await store.close()
    return len(found)


def _address(server: SeaweedServer) -> str:
    return server.endpoint.removeprefix("http://")
