from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from blueflow import health
from blueflow.config import Settings
from blueflow.errors import Exit, SettingError
from blueflow.health import Check, HealthServer
from blueflow.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

HOST = "127.0.0.1"
GET = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


@asynccontextmanager
async def serving(metrics: Metrics, **checks: Check) -> AsyncIterator[HealthServer]:
    answers = {name: lambda check=check: check for name, check in checks.items()}
    async with HealthServer(HOST, 0, metrics, answers) as server:
        yield server


async def ask(server: HealthServer, request: str | bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection(HOST, server.port)
    writer.write(request if isinstance(request, bytes) else request.encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def test_metrics_in_prometheus_text(metrics: Metrics) -> None:
    metrics.source.frames.inc(3)
    async with serving(metrics) as server:
        status, headers, body = await ask(server, GET.format("/metrics"))
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["Connection"] == "close"
    assert int(headers["Content-Length"]) == len(body)
    assert b"\nblueflow_source_frames_total 3.0\n" in body


async def test_ready_when_every_check_is_ok(metrics: Metrics) -> None:
    async with serving(metrics, source=Check(ok=True, reason="connected")) as server:
        status, headers, body = await ask(server, GET.format("/readyz?verbose=1"))
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {
        "ok": True,
        "checks": {"source": {"ok": True, "reason": "connected"}},
    }


async def test_not_ready_tells_why(metrics: Metrics) -> None:
    checks = {
        "source": Check(ok=False, reason="no frame for 20 s\r\nforged: x" + "x" * 10_000),
        "sink": Check(ok=True, reason="durable 3 s ago"),
    }
    async with serving(metrics, **checks) as server:
        status, headers, body = await ask(server, GET.format("/readyz"))
        alive, _, _ = await ask(server, GET.format("/livez"))
    assert (status, alive) == (503, 200)
    told = json.loads(body)
    assert not told["ok"]
    assert told["checks"]["source"]["reason"].startswith("no frame for 20 s\\r\\nforged")
    assert len(body) < 1000
    assert "forged" not in headers


async def test_only_live_checks_decide_about_life(metrics: Metrics) -> None:
    sick = {"pipeline": lambda: Check(ok=False, reason="hangs")}
    async with HealthServer(HOST, 0, metrics, {}, live_checks=sick) as server:
        assert (await ask(server, GET.format("/livez")))[0] == 503
        assert (await ask(server, GET.format("/readyz")))[0] == 200


async def test_head_has_no_body(metrics: Metrics) -> None:
    async with serving(metrics) as server:
        status, headers, body = await ask(server, "HEAD /metrics HTTP/1.0\r\n\r\n")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (GET.format("/"), 404),
        (GET.format("/metrics/"), 404),
        (GET.format("/\xff"), 404),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", 405),
        ("DELETE /livez HTTP/1.1\r\n\r\n", 405),
        ("GET /metrics\r\n\r\n", 400),
        ("GET /metrics HTTP/2.0\r\n\r\n", 400),
        ("\x00\x01\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nX: " + "x" * 20_000 + "\r\n\r\n", 431),
    ],
)
async def test_what_is_not_served(metrics: Metrics, request_text: str, status: int) -> None:
    async with serving(metrics) as server:
        found, headers, _ = await ask(server, request_text.encode("latin-1"))
        assert found == status
        assert headers.get("Allow") == ("GET, HEAD" if status == 405 else None)
        assert (await ask(server, GET.format("/livez")))[0] == 200


async def test_a_client_that_says_nothing_is_cut_off(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.05)
    async with serving(metrics) as server:
        status = await ask_nothing(server)
    assert status == b""


async def ask_nothing(server: HealthServer) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, server.port)
    writer.write(b"GET /metr")
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_client_that_takes_no_answer_is_cut_off(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.1)
    monkeypatch.setattr(metrics, "exposition", lambda: bytes(50_000_000))
    async with serving(metrics) as server:
        with socket.create_connection((HOST, server.port)) as client:
            client.sendall(GET.format("/metrics").encode())
            await until(lambda: len(server._clients) == 1)
            await until(lambda: not server._clients)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


async def test_too_many_clients_are_turned_away_and_the_first_ones_served(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CONNECTIONS_MAX", 2)
    async with serving(metrics) as server:
        first, first_writer = await asyncio.open_connection(HOST, server.port)
        _, second_writer = await asyncio.open_connection(HOST, server.port)
        await until(lambda: len(server._clients) == 2)
        assert await ask_nothing(server) == b""
        first_writer.write(GET.format("/livez").encode())
        assert (await first.read()).startswith(b"HTTP/1.1 200 ")
        for writer in (first_writer, second_writer):
            writer.close()


async def test_stopping_ends_open_connections_and_frees_the_port(metrics: Metrics) -> None:
    async with serving(metrics) as server:
        port = server.port
        reader, writer = await asyncio.open_connection(HOST, port)
        await until(lambda: len(server._clients) == 1)
    try:
        assert await reader.read() == b""
    except ConnectionResetError:
        pass
    finally:
        writer.close()
    async with HealthServer(HOST, port, metrics, {}) as again:
        assert again.port == port
    await server.stop()  # a second time does nothing


async def test_stopping_works_while_being_cancelled(metrics: Metrics) -> None:
    started = asyncio.Event()

    async def serve() -> None:
        async with serving(metrics) as server:
            with socket.create_connection((HOST, server.port)):
                await until(lambda: len(server._clients) == 1)
                started.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_default_port_that_is_busy_is_replaced(
    metrics: Metrics, busy_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = HealthServer.of(Settings(), busy_port, metrics, {})
    assert server is not None
    async with server:
        assert server.port not in (0, busy_port)
        assert (await ask(server, GET.format("/livez")))[0] == 200
    assert "took a free one" in caplog.text


async def test_a_chosen_port_that_is_busy_is_an_error(metrics: Metrics, busy_port: int) -> None:
    origins = {"prometheus_port": "environment PROMETHEUS_PORT"}
    settings = Settings(prometheus_port=busy_port, origins=origins)
    server = HealthServer.of(settings, 9401, metrics, {})
    assert server is not None
    with pytest.raises(SettingError) as caught:
        await server.start()
    told = (
        f"prometheus_port (from environment PROMETHEUS_PORT): cannot listen on {HOST}:{busy_port}: "
    )
    assert f"{told}address already in use. `blueflow config`" in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE
    await server.stop()


async def test_an_address_of_another_machine_is_an_error(metrics: Metrics) -> None:
    server = HealthServer.of(Settings(metrics_host="192.0.2.1"), 0, metrics, {})
    assert server is not None
    with pytest.raises(SettingError, match=r"metrics_host .* listen on 192\.0\.2\.1:0: "):
        await server.start()


async def test_an_address_that_is_no_name_is_an_error(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # tests ask no name server
    server = HealthServer("no-such-host", 0, metrics, {})
    with pytest.raises(SettingError, match=r"metrics_host .*no-such-host:0: .*not known"):
        await server.start()


def test_port_zero_turns_it_off(metrics: Metrics) -> None:
    assert HealthServer.of(Settings(prometheus_port=0), 9401, metrics, {}) is None


async def test_a_host_that_can_be_none_is_told(metrics: Metrics) -> None:
    server = HealthServer.of(Settings(metrics_host="a..b"), 0, metrics, {})
    assert server is not None
    with pytest.raises(SettingError, match=r"metrics_host .* a\.\.b:0: it can be no host"):
        await server.start()
