"""Every error has a code of its own, a remedy and an entry in docs/errors.md, and it pickles."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import pytest

from blueflow import errors
from blueflow.errors import BlueflowError, Exit

ROOT = Path(__file__).parents[1]
ERRORS_PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"BF-\d{3}")
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, BlueflowError) and value is not BlueflowError
]
EXAMPLES = {  # by annotation: a value that stands out in a sentence
    "str": "tangerine",
    "int": 40_961,
    "int | None": 40_961,
    "float": 40.5,
    "Path": Path("tangerine"),
    "Path | str": "tangerine",
    "Exit": Exit.CANNOT_WRITE,
    "str | None": "tangerine",
    "tuple[str, ...]": ("tangerine", "pear"),
}


def example(error_class: type[BlueflowError]) -> BlueflowError:
    parameters = list(inspect.signature(error_class).parameters.values())
    assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)
    return error_class(*(EXAMPLES[one.annotation] for one in parameters))


def entry(error_class: type[BlueflowError]) -> str:
    heading = f"### {error_class.code} {error_class.__name__}\n"
    assert ERRORS_PAGE.count(heading) == 1, f"docs/errors.md needs one entry {heading.strip()!r}"
    return re.split(r"\n##", ERRORS_PAGE.split(heading)[1])[0]


def test_codes_are_unique_and_the_base_has_its_own() -> None:
    codes = [one.code for one in CLASSES]
    assert len(codes) > 10
    assert sorted(set(codes)) == sorted(codes)
    assert BlueflowError.code not in codes
    assert all(CODE.fullmatch(code) for code in codes)


def test_every_error_class_of_the_package_lives_in_errors() -> None:
    elsewhere = [
        path.name
        for path in (ROOT / "src").rglob("*.py")
        if path.name != "errors.py"
        and re.search(r"^class \w+\((?:\w*\.)?BlueflowError\)", path.read_text(), re.MULTILINE)
    ]
    assert elsewhere == []


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda one: one.__name__)
def test_an_error_is_one_line_with_code_values_and_remedy(
    error_class: type[BlueflowError],
) -> None:
    error = example(error_class)
    line = str(error)
    assert line.startswith(f"{error_class.code}: ")
    assert line.endswith(error.remedy)
    assert len(error.remedy) > 20
    assert error.remedy.endswith(".")
    assert error.what().endswith(".")
    assert "\n" not in line
    assert re.search("tangerine|40961|40,961|40.5", error.what())


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda one: one.__name__)
def test_an_error_pickles(error_class: type[BlueflowError]) -> None:
    error = example(error_class)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(copy), str(copy), vars(copy)) == (error_class, str(error), vars(error))


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda one: one.__name__)
def test_the_page_has_an_entry_with_the_right_exit_code(error_class: type[BlueflowError]) -> None:
    retry = "yes" if error_class.retryable else "no"
    text = entry(error_class)
    assert text.startswith(f"Exit {error_class.exit_code.value}. Retry: {retry}. ")
    assert len(text) > 80


def test_the_table_of_exit_codes_is_the_enumeration() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", ERRORS_PAGE, re.MULTILINE)
    assert rows == [(str(code.value), code.name) for code in Exit]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_an_unknown_code(page: Path) -> None:
    known = {BlueflowError.code, *(one.code for one in CLASSES)}
    assert set(CODE.findall(page.read_text(encoding="utf-8"))) - known == set()
