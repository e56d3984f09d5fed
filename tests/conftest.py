"""What every test shares: the recorded data, Hypothesis profiles, time limits.

A test that needs a program says so: `@pytest.mark.needs("promtool")`. Where the program is missing,
the test fails in CI and is named, with the way to get it, at the end of the run elsewhere.

Settings from the environment:
    CI=1: nothing may be left out.
    HYPOTHESIS_PROFILE: dev (default), ci (derandomized; default when CI is set) or long.
    BLUEFLOW_TEST_FULL=1: fault campaigns run in full (`make test-faults`, `make test-all`).

A property test of a codec is decorated with `@settings.get_profile("codec")`, which means 20,000
cases in CI.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

DATA = Path(__file__).parent / "data"
FRAMES = DATA / "firehose" / "frames.bin"
SLOW_TIMEOUT_S = 600
HOW_TO_GET = {
    "promtool": "comes with Prometheus (apt-get install prometheus, brew install prometheus)",
}

_CASES = {"dev": (50, 300), "ci": (300, 20_000), "long": (10_000, 1_000_000)}  # usual, codec
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")


def _load_hypothesis_profile(name: str) -> None:
    for profile, (cases, codec_cases) in _CASES.items():
        common = settings(
            deadline=None,  # a shared machine is slow at times; nothing here is a timed test
            derandomize=profile == "ci",
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )
        settings.register_profile(profile, common, max_examples=cases)
        if profile == name:
            settings.register_profile("codec", common, max_examples=codec_cases)
    settings.load_profile(name)


_load_hypothesis_profile(_PROFILE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests, and property tests with many cases, the longer time limit."""
    for item in items:
        many_cases = _PROFILE != "dev" and is_hypothesis_test(getattr(item, "obj", None))
        patient = item.get_closest_marker("slow") or item.get_closest_marker("faults")
        if (patient or many_cases) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out a test whose program is missing; in CI that is a failure."""
    for marker in item.iter_markers("needs"):
        (program,) = marker.args
        if shutil.which(program) is None:
            reason = f"{program} is missing: {HOW_TO_GET[program]}"
            if os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line for each part that was not run."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    for reason, tests in reasons.items():
        terminalreporter.write_line(f"not run: {tests} test{'s'[: tests > 1]}: {reason}")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of recorded and foreign test data, `tests/data`."""
    return DATA


@pytest.fixture(scope="session")
def recorded_frames() -> list[bytes]:
    """The 100 frames recorded from the public relay, byte for byte, in order."""
    recording, frames, position = FRAMES.read_bytes(), [], 0
    while position < len(recording):
        start = position + 4
        position = start + int.from_bytes(recording[position:start], "big")
        frames.append(recording[start:position])
    return frames


@pytest.fixture(scope="session")
def full_campaign() -> bool:
    """Whether fault campaigns run in full; otherwise a seeded sample of the same points."""
    return os.environ.get("BLUEFLOW_TEST_FULL") == "1"
