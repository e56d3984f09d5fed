"""What every test shares: the recorded data, Hypothesis profiles, time limits.

A test that needs a program says so: `@pytest.mark.needs("promtool")`. Where the program is missing,
the test fails in CI and is named, with the way to get it, at the end of the run elsewhere. A test
that takes the fixture `kafka` or `guarded` needs Java, runs in the one worker that has the broker,
and may wait for its start; likewise `seaweed` and `moto`, the S3 servers of `tests/s3.py`.

Settings from the environment:
    CI=1: nothing may be left out.
    HYPOTHESIS_PROFILE: dev (default), ci (derandomized; default when CI is set), long, or mutants
        (an example that fails is not made smaller).
    BLUEFLOW_TEST_FULL=1: fault campaigns run in full (`make test-faults`, `make test-all`).

A property test of a codec is decorated with `@settings.get_profile("codec")`, which means 20,000
cases in CI.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.nodeid import coerce_node_id
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, is_hypothesis_test, settings
from tests.groups import SERVERS
from tests.leaving import leave_out

from blueflow.errors import MissingProgramError, ServiceError
from blueflow.testing.services.child import free_ports
from blueflow.testing.services.install import PACKAGES, find_java, install_kafka
from blueflow.testing.services.kafka import KafkaBroker

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["tests.s3"]

DATA = Path(__file__).parent / "data"
FRAMES = DATA / "firehose" / "frames.bin"
SLOW_TIMEOUT_S = 600
SERVER_TIMEOUT_S = 120  # a broker takes 4 s to start on two quiet cores
KAFKA, S3 = {"kafka", "fresh_kafka", "guarded"}, {"seaweed", "moto"}  # fixtures that are servers
HOW_TO_GET = {
    **PACKAGES,
    "kcat": "comes with the system (apt-get install kcat, brew install kcat)",
    "strace": "comes with the system (apt-get install strace)",
    "promtool": "comes with Prometheus (apt-get install prometheus, brew install prometheus)",
}

_CASES = {  # usual, codec
    "dev": (50, 300),
    "mutants": (50, 300),
    "ci": (300, 20_000),
    "long": (10_000, 1_000_000),
}
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")


def _load_hypothesis_profile(name: str) -> None:
    for profile, (cases, codec_cases) in _CASES.items():
        common = settings(
            deadline=None,  # a shared machine is slow at times; nothing here is a timed test
            derandomize=profile in ("ci", "mutants"),
            phases=set(Phase) - ({Phase.shrink, Phase.explain} if profile == "mutants" else set()),
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )
        settings.register_profile(profile, common, max_examples=cases)
        if profile == name:
            settings.register_profile("codec", common, max_examples=codec_cases)
    settings.load_profile(name)


_load_hypothesis_profile(_PROFILE)


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give slow tests, and property tests with many cases, the longer time limit."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if (KAFKA | S3) & fixtures:
            item.add_marker(pytest.mark.xdist_group(SERVERS))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(SERVER_TIMEOUT_S))
        if KAFKA & fixtures:
            item.add_marker(pytest.mark.needs("java"))
        many_cases = _PROFILE in ("ci", "long") and is_hypothesis_test(getattr(item, "obj", None))
        patient = item.get_closest_marker("slow") or item.get_closest_marker("faults")
        if (patient or many_cases) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
        marked = item.get_closest_marker("xdist_group")
        if marked and getattr(config.option, "loadgroup", False):
            # pytest-xdist 3.8 puts the group where pytest 9.2 does not look any more, and then
            # spreads the tests of a group over all workers (pytest-xdist issue 1386).
            item._id = coerce_node_id(f"{item.nodeid}@{marked.args[0]}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out a test whose program is missing; in CI that is a failure."""
    for marker in item.iter_markers("needs"):
        (program,) = marker.args
        if shutil.which(program) is None:
            leave_out(f"{program} is missing: {HOW_TO_GET[program]}")


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


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """The folder with Kafka's jars; where they cannot be had the test is left out."""
    try:
        find_java()
        return install_kafka()
    except (MissingProgramError, ServiceError) as error:
        leave_out(str(error))


@pytest.fixture(scope="session")
def kafka(kafka_jars: Path) -> Iterator[KafkaBroker]:
    """A running broker, shared: each test takes topics of its own, and leaves it running."""
    yield from running_broker()


@pytest.fixture(scope="module")
def fresh_kafka(kafka_jars: Path) -> Iterator[KafkaBroker]:
    """A running broker for the tests of one module, which may kill, suspend and restart it.

    The shared one would take minutes to come back: it reads again what all tests left in it.
    """
    yield from running_broker()


def running_broker() -> Iterator[KafkaBroker]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(KafkaBroker()) as broker,
    ):
        yield broker


@pytest.fixture(scope="session")
def guarded(kafka_jars: Path) -> Iterator[GuardedBroker]:
    """A running broker with users and rights, which a proxy can stand in front of.

    A test may not kill it, and takes back the rights that it granted.
    """
    guarded = GuardedBroker()
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(guarded.broker),
    ):
        yield guarded


class GuardedBroker:
    """A broker with SCRAM; who logs in without TLS is sent to `proxy_port`, where a test listens.

    So a test loses replies of those clients, and looks at the broker without the proxy.
    """

    def __init__(self) -> None:
        (self.proxy_port,) = free_ports(1)
        # Else a transaction that nobody ends holds readers back for up to 10 s.
        quick = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "500"}
        self.broker = KafkaBroker(security="scram", properties=quick)
        self.broker._properties["advertised.listeners"] = (
            f"PLAINTEXT://{self.broker.bootstrap},SASL_SSL://{self.broker.tls_bootstrap},"
            f"SASL_PLAINTEXT://127.0.0.1:{self.proxy_port}"
        )
