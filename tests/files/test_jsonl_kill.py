"""SIGKILL before every change to the disk: a restart loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("kill_campaign.py")


def test_killed_at_any_step_of_a_commit_a_restart_has_every_event_once(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, CAMPAIGN, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["kills_swept"] > 60  # three commits of several segments and folders
    assert result["kills_in_one_folder"] > 3
