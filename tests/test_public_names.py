"""What `import blueflow` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import blueflow

HEAVY = (
    *("anyio", "asyncio", "libipld", "msgspec", "prometheus_client", "websockets", "zstandard"),
    *("atproto", "ssl", "logging", "argparse", "dataclasses"),
)


def loaded_by(code: str) -> set[str]:
    """Return which heavy modules an interpreter of its own has loaded after `code`."""
    code = f"import sys\n{code}\nprint(*set(sys.modules) & set({HEAVY!r}))"
    environment = {"PYTHONPATH": str(Path(blueflow.__file__).parents[1])}
    # -S: what the environment's own .pth files load is not ours.
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("name", sorted(blueflow.__all__))
def test_every_public_name_resolves_to_the_thing_of_its_home(name: str) -> None:
    value = getattr(blueflow, name)
    assert value is getattr(blueflow, name)
    assert value is vars(sys.modules[blueflow._HOMES[name]])[name]
    assert name in dir(blueflow)


def test_every_name_has_a_home_and_is_sorted() -> None:
    assert sorted(blueflow._HOMES) == sorted(blueflow.__all__)
    assert len(set(blueflow.__all__)) == len(blueflow.__all__)


def test_the_version_is_there() -> None:
    assert blueflow.__version__[0].isdigit()
    assert "__version__" in dir(blueflow)


def test_a_star_import_gives_all() -> None:
    names: dict[str, object] = {}
    exec("from blueflow import *", names)  # noqa: S102 - it is what is tested
    assert set(blueflow.__all__) <= set(names)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'blueflow' has no attribute 'firehoes'"):
        blueflow.firehoes  # noqa: B018


def test_the_import_loads_nothing() -> None:
    assert loaded_by("import blueflow") == set()


@pytest.mark.parametrize(("name", "needed"), [("BlueflowError", set()), ("RepoOp", {"msgspec"})])
def test_a_name_loads_its_room_alone(name: str, needed: set[str]) -> None:
    before = "import site; site.main(); import blueflow"
    assert loaded_by(f"{before}; blueflow.{name}") - loaded_by(before) == needed
