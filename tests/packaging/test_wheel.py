"""What a user gets from the index: the built wheel, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
COMMAND_S = 300

pytestmark = [
    pytest.mark.slow,  # installs from the package index
    pytest.mark.xdist_group("packaging"),  # one build serves all
]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built as `make dist` does."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], ROOT)
    return folder


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that has the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (wheel,) = dist.glob("*.whl")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    run([*pip, "install", "--quiet", *constraints, str(wheel)], folder)
    return folder / "bin"


def run(command: Sequence[str], folder: Path) -> str:
    """Run a command away from the checkout and its settings; return its stdout."""
    names = ("PYTHON", "BLUEFLOW_", "COV_", "COVERAGE")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_has_the_package_with_its_types_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "blueflow").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "blueflow/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_sdist_leaves_recorded_posts_out(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "src/blueflow/events.py" in names
    assert "LICENSE" in names
    assert [name for name in names if name.startswith("tests/")] == []


def test_the_installed_command_writes_ten_simulated_events(
    environment: Path, tmp_path: Path
) -> None:
    command = [str(environment / "blueflow"), "produce"]
    output = run([*command, "--source", "sim", "--sink", "stdout", "--limit", "10"], tmp_path)
    events = [json.loads(line) for line in output.splitlines()]
    assert len(events) == 10
    assert {event["kind"] for event in events} <= {"commit", "identity", "account", "sync"}
    assert all(event["seq"] > 0 for event in events)


def test_the_installed_command_tells_its_version(environment: Path, tmp_path: Path) -> None:
    (metadata,) = environment.parent.rglob("blueflow-*.dist-info")
    version = metadata.name.removeprefix("blueflow-").removesuffix(".dist-info")
    shown = run([str(environment / "blueflow"), "--version"], tmp_path)
    assert version in shown


def test_the_base_install_is_light(environment: Path, tmp_path: Path) -> None:
    listed = run([str(environment / "python"), "-m", "pip", "list", "--format=json"], tmp_path)
    names = {one["name"].lower().replace("_", "-") for one in json.loads(listed)}
    assert "blueflow" in names
    assert names & {"atproto", "pydantic", "pyarrow", "aiokafka", "redis", "cryptography"} == set()
