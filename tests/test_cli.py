from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from blueflow import cli
from blueflow.config import Settings, add_flags
from blueflow.errors import (
    BlueflowError,
    Exit,
    FrameError,
    InvariantError,
    RelayRefusedError,
    RelayUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCES = str(Path(cli.__file__).parent.parent)
HEAVY = ("anyio", "asyncio", "libipld", "msgspec", "prometheus_client", "websockets")

AWAY = RelayUnavailableError("wss://me:hunter2@host", 30.0, "refused\nBF-999: forged")
REFUSED = RelayRefusedError("wss://host", "HTTP 501")
BROKEN = InvariantError("the cursor never goes back")
TORN = FrameError("host", 10, "no CBOR")


@pytest.fixture(autouse=True)
def root_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what `run` changes inside the test; pytest's own handlers must not be closed."""
    monkeypatch.chdir(tmp_path)  # nobody's blueflow.toml
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def python(*args: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": SOURCES, **environ}
    return subprocess.run(
        [sys.executable, *args],
        input=stdin,
        env=environment,
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )


def exit_of(error: BaseException) -> int:
    async def fail(_: Settings) -> None:
        await asyncio.sleep(0)
        raise error

    return cli.run(fail, Settings())


def test_run_hands_over_the_settings_and_returns_the_exit_code() -> None:
    parser = cli.parser_for("x", None)
    add_flags(parser)

    async def give_limit(settings: Settings) -> int | None:
        await asyncio.sleep(0)
        return settings.limit

    assert cli.run(give_limit, parser.parse_args(["--limit", "7"])) == 7
    assert cli.run(give_limit, Settings()) == Exit.OK


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (AWAY, Exit.UNAVAILABLE, "BF-102"),
        (REFUSED, Exit.REFUSED, "BF-103"),
        (ExceptionGroup("", [AWAY, REFUSED, TORN]), Exit.REFUSED, "BF-103"),
        (ExceptionGroup("", [TORN, AWAY]), Exit.UNAVAILABLE, "BF-110"),
        (
            ExceptionGroup("", [REFUSED, ExceptionGroup("", [BROKEN])]),
            Exit.BROKEN_PROMISE,
            "BF-001",
        ),
        (BaseExceptionGroup("", [asyncio.CancelledError(), AWAY]), Exit.UNAVAILABLE, "BF-102"),
    ],
)
def test_a_deliberate_error_becomes_one_line_and_its_exit_code(
    error: BaseException, code: int, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(error) == code
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"{first}: ")
    assert err.count("\n") == 1
    assert "hunter2" not in err


def test_the_line_ends_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    exit_of(AWAY)
    line = capsys.readouterr().err
    assert line.startswith("BF-102: no connection to wss://***@host within 30 s: refused\\nBF-999")
    assert line.rstrip().endswith(AWAY.remedy)


def test_an_unexpected_error_leaves_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(ZeroDivisionError("oops")) == Exit.UNEXPECTED
    err = capsys.readouterr().err
    assert '"level": "ERROR"' in err
    assert "ZeroDivisionError: oops" in err


def test_beside_an_unexpected_error_only_a_decision_counts_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    oops = ZeroDivisionError("oops")
    assert exit_of(ExceptionGroup("", [AWAY, oops])) == Exit.UNEXPECTED
    assert "BF-102:" not in capsys.readouterr().err.splitlines()[-1][:7]
    assert exit_of(ExceptionGroup("", [oops, REFUSED])) == Exit.REFUSED
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert err.splitlines()[-1].startswith("BF-103: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (BaseExceptionGroup("", [KeyboardInterrupt(), AWAY]), 130),
        (SystemExit(3), 3),
        (SystemExit(None), 0),
        (SystemExit("words"), 1),
    ],
)
def test_interrupts_and_exits(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._exit_code(error) == code
    assert not capsys.readouterr().err


def test_a_bad_setting_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    async def never(_: Settings) -> None:
        pytest.fail("ran")

    assert cli.run(never, Namespace(config=None, limit="ten")) == Exit.USAGE
    err = capsys.readouterr().err
    assert err.startswith("BF-002: limit (from flag --limit): 'ten' is not a whole number.")


def test_every_error_of_ours_is_one_line() -> None:
    def classes(base: type[BlueflowError]) -> Iterator[type[BlueflowError]]:
        for cls in base.__subclasses__():
            yield cls
            yield from classes(cls)

    for cls in classes(BlueflowError):
        assert "\n" not in cls.remedy
        assert cls.exit_code in set(Exit)


PIPE = """
import sys
from blueflow import cli
from blueflow.config import Settings
async def main(settings):
    while True:
        print("x" * 1000)
sys.exit(cli.run(main, Settings()))
"""


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PIPE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": SOURCES},
    )
    assert process.stdout
    assert process.stderr
    with process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == Exit.OK
        assert process.stderr.read() == b""


def test_a_broken_pipe_elsewhere_is_no_normal_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(BrokenPipeError(32, "Broken pipe")) == Exit.UNEXPECTED
    assert "BrokenPipeError" in capsys.readouterr().err


def test_ctrl_c_ends_with_130() -> None:
    code = PIPE.replace(
        "while True:", "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n    if 1:"
    )
    # As a terminal starts it: a parent of ours may have been told to ignore Ctrl-C.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    run = python("-c", heed + code)
    assert run.returncode == 130, run.stderr


def test_config_shows_values_and_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLUEFLOW_SOURCE", "wss://me:hunter2@host")
    assert cli.main(["config", "--limit", "10"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert rows["source"].split("  ")[0] == "wss://***@host"
    assert rows["source"].endswith("environment BLUEFLOW_SOURCE")
    assert rows["limit"].split()[0] == "10"
    assert rows["limit"].endswith("flag --limit")
    assert rows["drain_s"].split() == ["10s", "default"]
    assert "hunter2" not in out + err


def test_config_shows_the_rest_when_a_value_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--limit", "ten", "--for", "soon"]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert "drain_s" in out
    assert [line[:7] for line in err.splitlines()] == ["BF-002:", "BF-002:"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["prduce"], "did you mean produce?"),
        (["conf"], "did you mean config?"),
        (["xyz"], "there are produce, archive, lake, config"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_verb_that_does_not_exist(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == Exit.USAGE
    assert told in capsys.readouterr().err


def test_config_documents_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == cli.settings_table() + "\n"


def test_no_verb_shows_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == Exit.USAGE
    assert "produce" in capsys.readouterr().err


def test_version_and_help_of_the_module() -> None:
    version = python("-m", "blueflow", "--version")
    assert version.returncode == 0
    assert version.stdout.startswith("blueflow ")
    assert python("-m", "blueflow", "config", "--version").stdout == version.stdout
    assert "verbs:" in python("-m", "blueflow", "--help").stdout


@pytest.mark.parametrize("args", [["--help"], ["config", "--help"]])
def test_help_loads_nothing_heavy(
    args: list[str], record_property: Callable[[str, object], None]
) -> None:
    code = (
        "import sys, contextlib\n"
        "from blueflow.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({args!r})\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)\n"
    )
    begin = time.perf_counter()
    run = python("-c", code)
    record_property("help_seconds", time.perf_counter() - begin)
    assert "usage: blueflow" in run.stdout
    assert run.stderr == "[]\n"


def test_config_into_a_pipe_that_closes_is_quiet() -> None:
    command = f"{sys.executable} -m blueflow config --markdown | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],  # noqa: S607 - any bash
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
