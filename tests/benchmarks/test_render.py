from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

RENDER = Path(__file__).parents[2] / "benchmarks" / "render.py"
GOALS_OF_DECODE = {
    "json_unhashed_vs_sdk": 6.0,
    "json_hashed_vs_sdk": 3.3,
    "posts_only_vs_sdk": 20.0,
}


def run_render(folder: Path, ratios: Mapping[str, float | None]) -> tuple[int, str, str]:
    """Return the exit code, the complaints and the page for a decode benchmark of these ratios."""
    cases = [
        {
            "case": case,
            "ours": 12_345.6 * (ratio or 1),
            "peer": None if ratio is None else 12_345.6,
            "unit": "frames/s",
            "ratio": ratio,
        }
        for case, ratio in ratios.items()
    ]
    result = {
        "name": "decode",
        "cases": cases,
        "versions": {"atproto": "0.0.73"},
        "machine": {"cpu": "test", "cores": 2},
    }
    (folder / "decode.json").write_text(json.dumps(result))
    page = folder / "RESULTS.md"
    done = subprocess.run(
        [sys.executable, RENDER, folder, page], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr, page.read_text()


def test_goals_that_are_just_reached_pass(tmp_path: Path) -> None:
    code, complaints, page = run_render(tmp_path, GOALS_OF_DECODE)
    assert (code, complaints) == (0, "")
    assert (
        "| json_hashed_vs_sdk | 40,740 | 12,346 | frames/s | 3.30 | at least 3.3: reached |" in page
    )
    assert "atproto 0.0.73" in page
    assert "cpu test, cores 2" in page


@pytest.mark.parametrize("case", GOALS_OF_DECODE)
def test_a_ratio_below_its_goal_fails_and_is_named(tmp_path: Path, case: str) -> None:
    missed = GOALS_OF_DECODE[case] - 0.01
    code, complaints, page = run_render(tmp_path, GOALS_OF_DECODE | {case: missed})
    assert code == 1
    assert [case in line for line in complaints.splitlines()] == [True]
    assert page.count("missed") == 1


@pytest.mark.parametrize("case", GOALS_OF_DECODE)
def test_a_goal_that_was_not_measured_fails(tmp_path: Path, case: str) -> None:
    ratios = {name: ratio for name, ratio in GOALS_OF_DECODE.items() if name != case}
    code, complaints, _ = run_render(tmp_path, ratios)
    assert code == 1
    assert f"{case} was not measured" in complaints


def test_a_case_without_peer_is_shown_without_ratio(tmp_path: Path) -> None:
    code, _, page = run_render(tmp_path, GOALS_OF_DECODE | {"blocks_only": None})
    assert code == 0
    assert "| blocks_only | 12,346 | none | frames/s |  |  |" in page
