"""What `import blueflow.kafka` gives and loads, with the extra and without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import blueflow.kafka

WITHOUT = """
import sys
class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "aiokafka":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", sorted(blueflow.kafka.__all__))
def test_every_public_name_resolves_to_the_thing_of_its_home(name: str) -> None:
    value = getattr(blueflow.kafka, name)
    assert value is getattr(blueflow.kafka, name)
    home = f"blueflow.kafka.{blueflow.kafka._HOMES[name]}"
    assert value is vars(sys.modules[home])[name]
    assert name in dir(blueflow.kafka)


def test_every_name_has_a_home_and_is_sorted() -> None:
    assert sorted(blueflow.kafka._HOMES) == sorted(blueflow.kafka.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'blueflow\.kafka' has no attribute 'reed'"):
        blueflow.kafka.reed  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import blueflow.kafka",
        "import blueflow.kafka; dir(blueflow.kafka)",
        "import blueflow.cli, blueflow.produce; blueflow.cli._verbs_parser().format_help()",
        "import blueflow.factory",
        "import blueflow.kafka.transaction, blueflow.kafka.cursorrecord",
        "import blueflow.metrics; blueflow.metrics.Metrics()",
    ],
)
def test_what_loads_no_client_of_kafka(code: str) -> None:
    done = run(f"import sys; {code}; print('aiokafka' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("name", sorted(blueflow.kafka.__all__))
def test_without_the_extra_each_name_says_what_to_install(name: str) -> None:
    code = f"""
{WITHOUT}
import blueflow.kafka
from blueflow.errors import MissingExtraError
try:
    blueflow.kafka.{name}
except MissingExtraError as error:
    print(error)
"""
    done = run(code)
    assert done.stderr == ""
    assert "blueflow[kafka]" in done.stdout


def test_without_the_extra_a_sink_says_what_to_install_and_everything_else_works() -> None:
    cli = f"{WITHOUT}\nfrom blueflow.cli import main\nsys.exit(main(sys.argv[1:]))"
    for arguments in (["--help"], ["produce", "--help"], ["config"]):
        done = run(cli, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    done = run(cli, "produce", "--source", "sim", "--sink", "kafka://localhost:1", "--limit", "1")
    assert done.returncode != 0
    assert "blueflow[kafka]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_of_ours_that_is_missing_is_told_as_it_is() -> None:
    ours = WITHOUT.replace('name.partition(".")[0] == "aiokafka"', 'name == "blueflow.kafka.sink"')
    done = run(f"{ours}\nimport blueflow.kafka\nblueflow.kafka.KafkaSink")
    assert "ModuleNotFoundError: No module named 'blueflow.kafka.sink'" in done.stderr
    assert "MissingExtraError" not in done.stderr
