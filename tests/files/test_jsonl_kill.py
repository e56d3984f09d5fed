"""SIGKILL before every change to the disk: a restart loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("kill_campaign.py")


@pytest.mark.faults
def test_killed_at_any_step_of_a_commit_a_restart_has_every_event_once(
    tmp_path: Path, *, full_campaign: bool
) -> None:
    every = 1 if full_campaign else 4
    run = subprocess.run(
        [sys.executable, CAMPAIGN, tmp_path, str(every)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["kills_swept"] > 100 // every  # three commits of several segments and folders
    assert result["kills_in_one_folder"] > 3
