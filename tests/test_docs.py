"""The documents: links resolve, commands and tests they name exist, and they name no machine."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path

import pytest

from blueflow.settings import SETTINGS

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
FOLDERS = (".ci", "benchmarks", "docs", "src", "tests")
TOP = [path for path in ROOT.iterdir() if path.is_file() and path.suffix != ".pyc"]
FILES = [
    path
    for path in [*TOP, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.is_file()
    and "__pycache__" not in path.parts
    and (DATA not in path.parents or path.name == "README.md")
    and not path.name.startswith(".coverage")
]
PAGES = [path for path in FILES if path.suffix == ".md"]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
MACHINE = re.compile(
    r"(?<![\w.~])/(?:root|home|Users|work)/\w|pypi\.(?:org|python)|pythonhoste[d]|index[-_]url|/simp[l]e/"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_found() -> None:
    names = {name(page) for page in PAGES}
    assert {"README.md", "docs/architecture.md", "docs/errors.md", "tests/data/README.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_names_a_machine_or_a_package_registry(path: Path) -> None:
    found = MACHINE.findall(path.read_text(encoding="utf-8", errors="replace"))
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /" + "root/x", "at /" + "home/me", "https://pypi." + "org/project"]
)
def test_the_search_for_machines_finds_them(text: str) -> None:
    assert MACHINE.search(text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_that_pages_name_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)[^`]*`", page.read_text(encoding="utf-8")))
    assert named - targets == set()


def test_each_make_target_has_help() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split()
    helped = re.findall(r"^([a-z-]+):[^=\n]*## \S", makefile, re.MULTILINE)
    assert sorted(helped) == sorted(phony)


@pytest.mark.parametrize("page", ["README.md", "docs/errors.md", "docs/architecture.md"])
def test_flags_that_pages_name_exist(page: str) -> None:
    known = {"--help", "--version", "--config", *(setting.flag for setting in SETTINGS.values())}
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))
    assert len(named) > 1
    assert named - known == set()


def test_tests_that_invariants_name_exist() -> None:
    page = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 5
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).exists()
        or (test and not re.search(rf"def {test}\(", (ROOT / file).read_text(encoding="utf-8")))
    ]
    assert missing == []


def test_decisions_are_numbered_once_and_have_a_status() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [path.name[:3] for path in decisions]
    assert sorted(set(numbers)) == numbers
    for path in decisions:
        assert re.search(r"^Status: ", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def test_the_recorded_data_is_what_its_sums_say() -> None:
    lines = (DATA / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    expected = {file: digest for digest, file in (line.split("  ", 1) for line in lines)}
    actual = {
        str(path.relative_to(DATA)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in DATA.rglob("*")
        if path.is_file() and path.name not in {"README.md", "SHA256SUMS"}
    }
    assert actual == expected


def test_constraints_pin_each_dependency_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = [
        *project["project"]["dependencies"],
        *(one for extra in project["project"]["optional-dependencies"].values() for one in extra),
        *project["dependency-groups"]["dev"],
        *project["build-system"]["requires"],
    ]
    names = {re.split(r"[<>=\[]", one)[0] for one in declared}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([a-z0-9-]+)==[\w.]+$", constraints, re.MULTILINE)
    assert len(names) > 15
    assert names - set(pins) == set()
    assert sorted(set(pins)) == pins
