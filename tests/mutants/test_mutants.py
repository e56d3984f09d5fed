"""Do the tests notice bugs? Each mutant goes into a copy of the package; its test must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

if TYPE_CHECKING:
    from collections.abc import Collection

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
PACKAGE = CHECKOUT / "src" / "blueflow"
PASSED, FAILED = 0, 1  # exit codes of pytest; others say that it could not run


class Mutant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bug: `old` in `module` becomes `new`, and `test` fails."""

    bug: str
    module: str
    old: str
    new: str
    test: str


MUTANTS = msgspec.convert(
    tomllib.loads((HERE / "mutants.toml").read_text("utf-8"))["mutant"], list[Mutant]
)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug.replace(" ", "-"))
def test_a_bug_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "package" / "blueflow")
    module = copy / mutant.module
    text = module.read_text("utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.module} has not one {mutant.old!r}"
    module.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    run = pytest_with(copy.parent, [mutant.test], tmp_path)
    assert run.returncode == FAILED, run.stdout[-3000:] + run.stderr
    assert " failed" in run.stdout.splitlines()[-1]  # and not only a warning at the end


@pytest.mark.slow
def test_without_a_bug_the_same_tests_pass(tmp_path: Path) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "package" / "blueflow")
    run = pytest_with(copy.parent, {mutant.test for mutant in MUTANTS}, tmp_path)
    assert run.returncode == PASSED, run.stdout[-3000:] + run.stderr


def test_the_copy_is_what_would_be_tested(tmp_path: Path) -> None:
    (tmp_path / "blueflow").mkdir()
    (tmp_path / "blueflow" / "__init__.py").write_text("raise ImportError('the copy')\n")
    run = pytest_with(tmp_path, ["tests/test_wanted.py"], tmp_path)
    assert "the copy" in run.stdout + run.stderr


def pytest_with(
    package: Path, tests: Collection[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run tests against the package below a folder, until one fails."""
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "HYPOTHESIS_PROFILE": "mutants",  # that it fails is enough, with any example
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    for name in [name for name in environment if name.startswith(("PYTEST_", "BLUEFLOW_TEST_"))]:
        del environment[name]
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    options += ["--basetemp", str(folder / "temp"), "--timeout", "60"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
