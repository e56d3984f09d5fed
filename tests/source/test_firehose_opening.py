"""How a relay source meets what is no relay: servers that hang up, bad proxies, odd addresses."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from blueflow.backoff import Backoff
from blueflow.errors import RelayRefusedError, RelayUnavailableError, SettingError
from blueflow.events import Position
from blueflow.source.firehose import FirehoseSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUICK = Backoff(base_s=0.001, cap_s=0.01)


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """Serve `answer`, then hang up; the requests can be read in `requests`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def fail(source: FirehoseSource) -> None:
    with anyio.fail_after(20):
        try:
            await anext(source)
        finally:
            await source.stop()


async def test_a_server_that_hangs_up_is_away_and_is_tried_again() -> None:
    async with answering(b"") as url:
        source = FirehoseSource(url, connect_wait_s=0.1, backoff=QUICK)
        with pytest.raises(RelayUnavailableError, match=r"within 0\.1 s"):
            await fail(source)
    assert source.reconnects > 1


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_server_of_another_kind_is_no_relay(answer: bytes) -> None:
    async with answering(answer) as url:
        source = FirehoseSource(url, connect_wait_s=10, backoff=QUICK)
        with pytest.raises(RelayRefusedError):
            await fail(source)
    assert source.reconnects == 0


ODD = {
    "two times": b"HTTP/1.1 429 x\r\nRetry-After: 0\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
    "a page": b"HTTP/1.1 302 x\r\nLocation: https://status.example/maintenance\r\n\r\n",
    "no host": b"HTTP/1.1 302 x\r\nLocation: //[\r\n\r\n",
    "half a host": b"HTTP/1.1 302 x\r\nLocation: http://[::1\r\n\r\n",
    "no port": b"HTTP/1.1 302 x\r\nLocation: ws://h:99999/\r\n\r\n",
    "odd host": b"HTTP/1.1 302 x\r\nLocation: ws://a..b/\r\n\r\n",
    "two places": b"HTTP/1.1 302 x\r\nLocation: ws://a/\r\nLocation: ws://b/\r\n\r\n",
}


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
async def test_an_odd_answer_between_connections_is_a_bad_moment(answer: bytes) -> None:
    async with answering(answer) as url:
        source = FirehoseSource(url, backoff=QUICK)
        source._opened = True  # it has given frames
        await source.start(None)
        reading = asyncio.create_task(anext(source))
        with anyio.fail_after(10):
            while source.reconnects < 3:
                assert not reading.done(), reading.exception()
                await asyncio.sleep(0.01)
        await source.stop()
        with pytest.raises(StopAsyncIteration):
            await reading


@pytest.mark.parametrize("name", sorted(set(ODD) - {"two times"}))
async def test_a_redirect_that_leads_nowhere_is_no_relay_at_first(name: str) -> None:
    async with answering(ODD[name]) as url:
        with pytest.raises(RelayRefusedError):
            await fail(FirehoseSource(url, connect_wait_s=10, backoff=QUICK))


async def test_a_proxy_that_is_none_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "foo://me:hunter2@proxy.example")
    with pytest.raises(SettingError, match="isn't a valid proxy") as caught:
        await fail(FirehoseSource("ws://relay.example", connect_wait_s=5))
    assert "hunter2" not in str(caught.value)


async def test_a_cursor_is_sent_once_whatever_the_address_has() -> None:
    source = FirehoseSource("ws://127.0.0.1:9/stream?cursor=5&wanted=x&y=", connect_wait_s=0.05)
    await source.start(Position("127.0.0.1:9", 77))
    assert source._url_with_cursor() == "ws://127.0.0.1:9/stream?wanted=x&y=&cursor=77"
    await source.stop()
