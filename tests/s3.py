"""S3 servers that the tests of one worker share: each test takes a bucket of its own."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from tests.leaving import leave_out

from blueflow.errors import MissingProgramError
from blueflow.testing.services.child import LOOPBACK, Child, free_ports
from blueflow.testing.services.s3 import SeaweedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blueflow.lake.s3client import S3Options

MOTO_TIMEOUT_S = 30
# One request at a time: moto looks whether a key is taken, and then takes it.
MOTO = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
app = DomainDispatcherApplication(create_backend_app)
make_server("127.0.0.1", int(sys.argv[1]), app, threaded=False).serve_forever()
"""


def options_of(server: SeaweedServer, endpoint: str | None = None) -> S3Options:
    """Return how to log in, perhaps through a proxy."""
    return options(endpoint or server.endpoint, server.access_key, server.secret_key)


def options(*values: str) -> S3Options:
    from blueflow.lake.s3client import S3Options  # noqa: PLC0415 - most tests need no S3

    return S3Options(*values)


def new_bucket() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    """A running server; a test may kill, suspend or restart it; it has to run again at the end."""
    try:
        server = SeaweedServer()
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(server),
        ):
            yield server
    except MissingProgramError as error:
        leave_out(str(error))


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Options]:
    """A stand-in for S3 that keeps everything in memory and lets everybody in."""
    (port,) = free_ports(1)
    server = Child("moto", tmp_path_factory.mktemp("moto") / "log")
    server.start([sys.executable, "-W", "ignore", "-c", MOTO, str(port)])
    with start_blocking_portal() as portal:
        portal.call(_wait_for, port)
        yield options(f"{LOOPBACK}:{port}", "moto", "moto-secret")
        portal.call(server.kill)


async def _wait_for(port: int) -> None:
    with anyio.fail_after(MOTO_TIMEOUT_S):
        while True:
            try:
                async with await anyio.connect_tcp(LOOPBACK, port):
                    return
            except OSError:
                await anyio.sleep(0.05)
