"""The guide's code is what it says: a sink in about 30 lines that the contract suite proves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "custom-sink.md"
SINK, PROOF = re.findall(
    r"^```python\n(.*?)^```", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with the two files of the guide."""
    (tmp_path / "my_sinks.py").write_text(SINK, encoding="utf-8")
    (tmp_path / "test_my_sinks.py").write_text(PROOF, encoding="utf-8")
    return tmp_path


def prove(project: Path, *more: str) -> subprocess.CompletedProcess[str]:
    settings = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    # A folder of its own: runs beside each other would clear the shared one's old folders at once,
    # and a warning about that is an error here.
    settings += ["--basetemp", "temp"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", *settings, *more],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_guides_sink_passes_the_contract(project: Path) -> None:
    run = prove(project)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.findall(r"(\d+) passed", run.stdout)[0]) > 15


def test_the_guide_is_right_that_half_a_transaction_is_found(project: Path) -> None:
    sink = project / "my_sinks.py"
    broken = SINK.replace("with self._db:  #", "if True:  #")
    assert broken != SINK
    sink.write_text(broken, encoding="utf-8")
    run = prove(project, "-x", "--tb=no")
    assert run.returncode == 1
    assert "failed" in run.stdout


def test_the_sink_has_about_30_lines() -> None:
    body = SINK.split("class SqliteSink(Sink):\n")[1]
    lines = [line for line in body.splitlines() if line.strip()]
    assert len(lines) <= 33
