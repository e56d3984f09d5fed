"""The proxy passes Kafka's frames on unchanged, and loses, delays and holds those it is told to."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

import pytest
from aiokafka import AIOKafkaProducer

from blueflow.testing.kafkacodes import ApiKey
from blueflow.testing.kafkaproxy import KafkaProxy
from blueflow.testing.mockcluster import MockCluster

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import AsyncIterator

PATIENCE_S = 10
MOMENT_S = 0.05  # within which nothing comes where nothing should
MEGABYTE = 1_000_000


class EchoBroker:
    """Answers each request with its correlation id and its body."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []  # kind, correlation id
        self._server: asyncio.Server | None = None
        self._writers: list[StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server
        self._server.close()
        await self.close_connections()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        assert self._server
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close_connections(self) -> None:
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        self._writers.clear()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._writers.append(writer)
        with suppress(EOFError, OSError):
            while True:
                frame = await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
                self.requests.append((int.from_bytes(frame[:2]), int.from_bytes(frame[4:8])))
                writer.write((len(frame) - 4).to_bytes(4) + frame[4:])
                await writer.drain()
        writer.close()


class Client:
    """One connection of a client of Kafka."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, api: int, correlation: int, body: bytes = b"") -> None:
        frame = api.to_bytes(2) + b"\0\1" + correlation.to_bytes(4) + body
        self._writer.write(len(frame).to_bytes(4) + frame)

    async def receive(self) -> tuple[int, bytes]:
        frame = await self._reader.readexactly(int.from_bytes(await self._reader.readexactly(4)))
        return int.from_bytes(frame[:4]), frame[4:]

    async def ask(self, api: int, correlation: int) -> None:
        self.send(api, correlation)
        assert await self.receive() == (correlation, b"")

    async def hears_nothing(self) -> bool:
        try:
            async with asyncio.timeout(MOMENT_S):
                await self._reader.read(1)
        except TimeoutError:
            return True
        return False

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


@asynccontextmanager
async def connected(proxy: KafkaProxy) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield client
    finally:
        await client.close()


async def test_frames_pass_unchanged_and_are_counted() -> None:
    bodies = [b"", b"a", bytes(MEGABYTE), b"\xff" * 70_000]
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        async with connected(proxy) as client, connected(proxy) as other:
            for number, body in enumerate(bodies):
                client.send(ApiKey.FETCH, number, body)
            other.send(ApiKey.METADATA, 0)
            for number, body in enumerate(bodies):
                assert await client.receive() == (number, body)
            assert await other.receive() == (0, b"")
        assert [proxy.count(api) for api in (ApiKey.FETCH, ApiKey.METADATA)] == [len(bodies), 1]
        assert proxy.bootstrap == f"127.0.0.1:{proxy.port}"
        assert not proxy.fired


async def test_a_lost_reply_is_of_a_request_that_had_its_effect() -> None:
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        proxy.lose_reply(ApiKey.END_TXN)
        async with connected(proxy) as client:
            client.send(ApiKey.PRODUCE, 1)
            client.send(ApiKey.END_TXN, 2)
            assert await client.receive() == (1, b"")
            with pytest.raises(EOFError):
                await client.receive()
        assert broker.requests == [(ApiKey.PRODUCE, 1), (ApiKey.END_TXN, 2)]
        assert proxy.fired == {"lose_reply": 1}
        async with connected(proxy) as client:
            await client.ask(ApiKey.END_TXN, 3)


async def test_a_connection_can_hang_instead() -> None:
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        proxy.lose_reply(ApiKey.END_TXN, then="hang")
        async with connected(proxy) as client:
            client.send(ApiKey.END_TXN, 1)
            assert await client.hears_nothing()
            assert proxy.fired == {"lose_reply": 1}
            client.send(ApiKey.END_TXN, 2)
            assert await client.hears_nothing()
            async with connected(proxy) as other:
                await other.ask(ApiKey.END_TXN, 3)
        assert broker.requests == [(ApiKey.END_TXN, 1), (ApiKey.END_TXN, 3)]
        assert proxy.count(ApiKey.END_TXN) == 3


async def test_a_lost_request_never_arrives() -> None:
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        proxy.lose_request(ApiKey.PRODUCE)
        async with connected(proxy) as client:
            await client.ask(ApiKey.METADATA, 1)
            client.send(ApiKey.PRODUCE, 2)
            with pytest.raises(EOFError):
                await client.receive()
        assert broker.requests == [(ApiKey.METADATA, 1)]
        assert (proxy.count(ApiKey.PRODUCE), proxy.fired) == (1, {"lose_request": 1})


async def test_a_fault_skips_and_repeats() -> None:
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        proxy.lose_reply(ApiKey.PRODUCE, skip=1, times=2)
        lost = []
        for number in range(5):
            async with connected(proxy) as client:
                client.send(ApiKey.PRODUCE, number)
                try:
                    await client.receive()
                except EOFError:
                    lost.append(number)
        assert lost == [1, 2]
        assert (len(broker.requests), proxy.fired) == (5, {"lose_reply": 2})


async def test_a_late_reply_holds_those_behind_it() -> None:
    loop = asyncio.get_running_loop()
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        proxy.delay(ApiKey.PRODUCE, 2 * MOMENT_S)
        async with connected(proxy) as client:
            start_s = loop.time()
            client.send(ApiKey.PRODUCE, 1)
            client.send(ApiKey.METADATA, 2)
            assert [await client.receive(), await client.receive()] == [(1, b""), (2, b"")]
            assert loop.time() - start_s >= 2 * MOMENT_S
        assert proxy.fired == {"delay": 1}


async def test_a_late_request_arrives_although_its_client_has_gone() -> None:
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        proxy.delay(ApiKey.PRODUCE, 4 * MOMENT_S, of="request")
        async with connected(proxy) as client:
            client.send(ApiKey.PRODUCE, 1)
            assert await client.hears_nothing()
        assert broker.requests == []
        async with asyncio.timeout(PATIENCE_S):
            while not broker.requests:
                await asyncio.sleep(0.01)
        assert proxy.fired == {"delay": 1}


async def test_a_blocked_proxy_is_a_silent_peer() -> None:
    async with (
        EchoBroker() as broker,
        KafkaProxy(broker.address) as proxy,
        connected(proxy) as before,
    ):
        await before.ask(ApiKey.METADATA, 1)
        proxy.block()
        async with connected(proxy) as after:
            before.send(ApiKey.PRODUCE, 2)
            after.send(ApiKey.PRODUCE, 3)
            assert await before.hears_nothing()
            assert await after.hears_nothing()
            assert broker.requests == [(ApiKey.METADATA, 1)]
            proxy.unblock()
            assert await before.receive() == (2, b"")
            assert await after.receive() == (3, b"")
        assert proxy.fired["block"] >= 2
        proxy.block()
        await broker.close_connections()
        assert await before.hears_nothing()
        proxy.unblock()
        with pytest.raises(EOFError):
            await before.receive()


async def test_cut_resets_every_connection() -> None:
    async with EchoBroker() as broker, KafkaProxy(broker.address) as proxy:
        async with connected(proxy) as one, connected(proxy) as two:
            await one.ask(ApiKey.METADATA, 1)
            await two.ask(ApiKey.METADATA, 2)
            proxy.cut()
            for client in (one, two):
                with pytest.raises((EOFError, ConnectionResetError)):
                    await client.receive()
        assert proxy.fired == {"cut": 2}
        async with connected(proxy) as client:
            await client.ask(ApiKey.METADATA, 3)


async def test_the_broker_may_come_after_the_proxy() -> None:
    async with KafkaProxy("127.0.0.1:1") as proxy:
        async with connected(proxy) as client:
            with pytest.raises((EOFError, ConnectionResetError)):
                await client.receive()
        async with EchoBroker() as broker:
            proxy.upstream = broker.address
            async with connected(proxy) as client:
                await client.ask(ApiKey.METADATA, 1)
    await proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)


async def test_it_stops_while_a_client_is_connected_and_a_frame_is_held() -> None:
    async with (
        EchoBroker() as broker,
        KafkaProxy(broker.address) as proxy,
        connected(proxy) as client,
    ):
        proxy.block()
        client.send(ApiKey.METADATA, 1)
        assert await client.hears_nothing()
        await proxy.stop()
        with pytest.raises((EOFError, ConnectionResetError)):
            await client.receive()


async def test_a_transaction_whose_answers_are_lost_is_retried_by_aiokafka() -> None:
    with MockCluster(topics={"posts": 1}) as cluster:
        async with KafkaProxy(cluster.bootstrap) as proxy:
            cluster.advertise(proxy.port)
            producer = AIOKafkaProducer(
                bootstrap_servers=proxy.bootstrap,
                transactional_id="blueflow.test",
                acks="all",
                request_timeout_ms=500,
            )
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await producer.start()
                    proxy.lose_reply(ApiKey.PRODUCE)
                    proxy.lose_request(ApiKey.END_TXN)
                    proxy.lose_reply(ApiKey.END_TXN, then="hang")
                    async with producer.transaction():
                        await producer.send("posts", b"once", partition=0)
            finally:
                await producer.stop()
            assert proxy.fired == {"lose_reply": 2, "lose_request": 1}
            assert [proxy.count(api) for api in (ApiKey.PRODUCE, ApiKey.END_TXN)] == [2, 3]
            assert [cluster.requests(api) for api in (ApiKey.PRODUCE, ApiKey.END_TXN)] == [2, 2]
