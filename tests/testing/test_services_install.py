"""The cache of files, with a stand-in for Maven."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from blueflow.errors import Exit, MissingProgramError, ServiceError
from blueflow.testing.services import __main__ as command
from blueflow.testing.services.install import find_java, install_kafka, versions

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_S = 20
INSTALL = """
from blueflow.testing.services.install import install_kafka
print(install_kafka())
"""
SLOW_MAVEN = """#!/bin/sh
echo "$@" >> "$XDG_CACHE_HOME/calls"
sleep 0.3
mkdir libs && echo jar > libs/kafka.jar
"""
BROKEN_MAVEN = """#!/bin/sh
mkdir libs && echo half > libs/kafka.jar
echo "[ERROR] no route to host"
exit 1
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")
    return tmp_path


def put(cache: Path, name: str, script: str) -> None:
    program = cache / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(script)
    program.chmod(0o755)


def put_maven(cache: Path, script: str) -> None:
    put(cache, "mvn", script)


def test_processes_that_start_at_once_install_once(cache: Path) -> None:
    put_maven(cache, SLOW_MAVEN)
    command = (sys.executable, "-c", INSTALL)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    said = {process.communicate(timeout=PATIENCE_S)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0], said
    libs = cache / "blueflow" / f"kafka-{versions('kafka')['kafka']}" / "libs"
    assert said == {f"{libs}\n".encode()}
    assert (libs / "kafka.jar").read_text() == "jar\n"
    calls = (cache / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert f"maven-dependency-plugin:{versions('kafka')['maven-dependency-plugin']}" in calls[0]


def test_what_maven_left_half_done_is_no_installation_and_is_done_again(cache: Path) -> None:
    put_maven(cache, BROKEN_MAVEN)
    with pytest.raises(ServiceError, match=r"could not get it; it said: \[ERROR\] no route to"):
        install_kafka()
    put_maven(cache, SLOW_MAVEN)
    libs = install_kafka()
    assert [path.name for path in libs.iterdir()] == ["kafka.jar"]
    assert (libs / "kafka.jar").read_text() == "jar\n"
    assert [path.name for path in libs.parent.parent.iterdir() if path.is_dir()] == [
        libs.parent.name
    ]


def test_files_of_other_versions_are_replaced(cache: Path) -> None:
    put_maven(cache, SLOW_MAVEN)
    libs = install_kafka()
    (libs.parent / "pom.xml").write_text("<project/>")
    (libs / "old.jar").touch()
    assert install_kafka() == libs
    assert [path.name for path in libs.iterdir()] == ["kafka.jar"]


def test_maven_that_takes_too_long_is_ended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blueflow.testing.services.install.INSTALL_TIMEOUT_S", 0.2)
    put_maven(cache, "#!/bin/sh\nexec sleep 1000\n")
    with pytest.raises(ServiceError, match=r"Maven was not done after 0\.2 s"):
        install_kafka()


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ('openjdk version "17.0.15" 2025-04-15', True),
        ('java version "25" 2025-09-16', True),
        ('openjdk version "11.0.2" 2019-01-15', False),
        ('java version "1.8.0_392"', False),
        ("Unable to locate a Java Runtime.", False),  # what macOS has before one is installed
    ],
)
def test_a_java_that_is_too_old_or_a_stub_counts_as_missing(
    cache: Path, said: str, *, right: bool
) -> None:
    put(cache, "java", f"#!/bin/sh\necho '{said}' >&2\n")
    if right:
        assert find_java() == str(cache / "bin" / "java")
    else:
        with pytest.raises(MissingProgramError, match="Kafka needs java 17 or newer"):
            find_java()


def test_missing_programs_are_one_line_with_the_remedy(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(MissingProgramError, match=r"needs mvn.*apt-get install maven"):
        install_kafka()
    put_maven(cache, SLOW_MAVEN)
    monkeypatch.setenv("PATH", f"{cache / 'bin'}{os.pathsep}{os.defpath}")
    install_kafka()
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(SystemExit) as ended:
        command.main(["up", "kafka"])
    assert ended.value.code == Exit.USAGE
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("BF-106: Kafka needs java")
    assert "apt-get install" in line
