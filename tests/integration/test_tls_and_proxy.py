"""The relay behind TLS and behind an HTTP proxy, as the public one is reached."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from itertools import islice
from typing import TYPE_CHECKING

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from blueflow.backoff import Backoff
from blueflow.errors import RelayUnavailableError
from blueflow.pipeline import pump
from blueflow.source.firehose import FirehoseSource
from blueflow.testing.ledger import Ledger
from blueflow.testing.memory import MemorySink
from blueflow.testing.network import SimulatedNetwork
from blueflow.testing.relay import RelaySettings, SimulatedRelay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

EVENTS = 60
QUICK = Backoff(0.01, 0.05)


def certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 with its key, and return the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "relay.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *form)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (ConnectionError, ssl.SSLError):
        pass
    finally:
        writer.close()


@asynccontextmanager
async def forwarder(
    target: tuple[str, int] | None, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Forward connections to `target`, or where a CONNECT request says; give port and requests."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        goal = target
        if goal is None:
            request = await reader.readuntil(b"\r\n\r\n")
            requests.append(request)
            host, _, port = request.split()[1].decode().rpartition(":")
            goal = host, int(port)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        upstream_reader, upstream_writer = await asyncio.open_connection(*goal)
        await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], requests
    finally:
        server.close()


def relay_and_ledger() -> tuple[SimulatedRelay, Ledger]:
    ledger = Ledger()
    frames = islice(SimulatedNetwork(records=300, accounts=50), EVENTS)
    return SimulatedRelay(frames, RelaySettings(limit=EVENTS), ledger=ledger), ledger


async def read_all(source: FirehoseSource, relay: SimulatedRelay) -> MemorySink:
    sink, stop = MemorySink(), anyio.Event()

    async def end() -> None:
        while relay.log.end < EVENTS or not source.position:
            await anyio.sleep(0.01)
        while source.position.seq < relay.log.last_seq:
            await anyio.sleep(0.01)
        stop.set()

    ending = asyncio.create_task(end())
    try:
        with anyio.fail_after(15):
            await pump(source, sink, stop=stop)
    finally:
        ending.cancel()
    return sink


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    relay, ledger = relay_and_ledger()
    async with relay:
        host, port = relay.url.removeprefix("ws://").split(":")
        async with forwarder((host, int(port)), context) as (tls_port, _):
            url = f"wss://127.0.0.1:{tls_port}"
            with pytest.raises(RelayUnavailableError, match=r"(?i)certificate"):
                await pump(FirehoseSource(url, connect_wait_s=0.3, backoff=QUICK), MemorySink())
            monkeypatch.setenv("SSL_CERT_FILE", str(path))
            sink = await read_all(FirehoseSource(url, backoff=QUICK), relay)
    verdict = ledger.compare(sink.events)
    assert verdict.ok, str(verdict)


async def test_tls_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    relay, ledger = relay_and_ledger()
    async with relay:
        host, port = relay.url.removeprefix("ws://").split(":")
        async with (
            forwarder((host, int(port)), context) as (tls_port, _),
            forwarder(None) as (proxy_port, requests),
        ):
            monkeypatch.setenv("SSL_CERT_FILE", str(path))
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy_port}")
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            source = FirehoseSource(f"wss://127.0.0.1:{tls_port}", backoff=QUICK)
            sink = await read_all(source, relay)
    assert requests[0].startswith(f"CONNECT 127.0.0.1:{tls_port}".encode())
    verdict = ledger.compare(sink.events)
    assert verdict.ok, str(verdict)
