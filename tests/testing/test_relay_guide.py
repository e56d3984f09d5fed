from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from blueflow.testing.faultplan import FAULTS

GUIDE = (Path(__file__).parents[2] / "docs/guides/simulated-relay.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", example], env=environment, capture_output=True, check=True
    )
    assert run.stdout.startswith(b"100 messages, ")


def test_the_table_has_every_fault_and_no_other() -> None:
    (rows,) = re.findall(r"## Faults\n.*?\|---\|---\|---\|\n(.*?)\n\n", GUIDE, re.DOTALL)
    first_cells = [row.split("|")[1] for row in rows.splitlines()]
    named = {kind for cell in first_cells for kind in re.findall(r"`([a-z-]+)", cell)}
    assert named == set(FAULTS)


def test_flags_of_the_command_exist() -> None:
    usage = Path(__file__).parents[2] / "src/blueflow/testing/relaycommand.py"
    flags = set(re.findall(r'add\(\s*"(--[a-z-]+)"', usage.read_text(encoding="utf-8")))
    produce = {"--source", "--sink", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE)) <= flags | produce
