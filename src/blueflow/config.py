"""Settings from their sources, each above the one before: default, TOML file, environment, flag.

`--help` pays for the import of this module, so it takes nothing heavy along.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blueflow.errors import SettingError
from blueflow.masking import mask_credentials
from blueflow.settings import SETTINGS, Settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

__all__ = ["SETTINGS", "Settings", "add_flags", "load", "resolve", "version"]

CONFIG_FILE = "blueflow.toml"
CONFIG_VARIABLE = "BLUEFLOW_CONFIG"

_PREFIX = "BLUEFLOW_"
_SHOWN_LENGTH_MAX = 80  # of a bad value in an error


def load(
    flags: argparse.Namespace | Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings of this process.

    Args:
        flags: what a parser with `add_flags` gave, or values by name of setting; None is not given.
        environ: the environment; that of the process by default.

    Raises:
        SettingError: a value cannot be used, or the TOML file is not there or not understood.
    """
    settings, problems = resolve(flags, environ)
    if problems:
        raise problems[0]
    return settings


def resolve(
    flags: argparse.Namespace | Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Settings, list[SettingError]]:
    """As `load`, but return what is wrong; a setting with a bad value has its default."""
    environ = os.environ if environ is None else environ
    by_flag = dict(flags) if isinstance(flags, Mapping) else vars(flags) if flags else {}
    given, problems = _from_file(by_flag.get("config"), environ)
    for name, spec in SETTINGS.items():
        if environ.get(spec.environment):  # Compose hands over variables that are unset as empty
            given[name] = (environ[spec.environment], f"environment {spec.environment}")
        if by_flag.get(name) is not None:
            given[name] = (by_flag[name], f"flag {spec.flag}")
    problems += _misspelt(environ)
    values: dict[str, Any] = {}
    for name, (raw, origin) in given.items():
        try:
            values[name] = SETTINGS[name].read(raw)
        except ValueError as error:
            problems.append(SettingError(name, origin, f"{_bad(name, raw)} {error}"))
    origins = {name: origin for name, (_, origin) in given.items() if name in values}
    if values.get("sink") is None and (servers := values.get("kafka_bootstrap_servers")):
        values["sink"], origins["sink"] = f"kafka://{servers}", origins["kafka_bootstrap_servers"]
    return Settings(**values, origins=origins), problems


def version() -> str:
    """Return the version of the installed package."""
    from importlib import metadata  # noqa: PLC0415 - only who asks pays for it

    try:
        return metadata.version("blueflow")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Add `--config` and the flags of the settings `names` (all by default), in groups.

    The flags keep text: `load` reads it, so that a bad value is the same error from every source.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file with settings [default: ./{CONFIG_FILE} if there; env {CONFIG_VARIABLE}]",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for spec in map(SETTINGS.__getitem__, SETTINGS if names is None else names):
        group = groups.get(spec.group) or parser.add_argument_group(spec.group)
        groups[spec.group] = group
        note = f" [default: {spec.shown(spec.default)}; env {spec.environment}]"
        bare: dict[str, Any] = {} if spec.bare is None else {"nargs": "?", "const": spec.bare}
        group.add_argument(
            spec.flag,
            dest=spec.name,
            metavar=spec.metavar,
            action="append" if spec.many else "store",
            help=(spec.help + note).replace("%", "%%"),
            **bare,
        )


def _from_file(
    flag: object, environ: Mapping[str, str]
) -> tuple[dict[str, tuple[object, str]], list[SettingError]]:
    if flag:
        name, origin = str(flag), "flag --config"
    elif environ.get(CONFIG_VARIABLE):
        name, origin = environ[CONFIG_VARIABLE], f"environment {CONFIG_VARIABLE}"
    elif os.path.exists(CONFIG_FILE):  # noqa: PTH110 - pathlib costs --help 5 ms
        name, origin = CONFIG_FILE, "the working folder"
    else:
        return {}, []
    import tomllib  # noqa: PLC0415 - only who has a file pays for it

    try:
        with open(name, "rb") as file:  # noqa: PTH123 - as above
            table = tomllib.load(file)
    except OSError as error:
        problem = f"cannot read {name}: {error.strerror}"
        return {}, [SettingError("config", origin, problem)]
    except ValueError as error:  # not TOML, or not even UTF-8
        return {}, [SettingError("config", origin, f"{name} is not TOML: {error}".rstrip("."))]
    origin = f"file {name}"
    names = {key: key for key in SETTINGS}
    unknown = [
        SettingError(key, origin, _no_setting(_near(key, names)))
        for key in table
        if key not in SETTINGS
    ]
    return {key: (raw, origin) for key, raw in table.items() if key in SETTINGS}, unknown


def _misspelt(environ: Mapping[str, str]) -> list[SettingError]:
    """Return a problem for each variable that was surely meant for a setting.

    Not for every unknown one: platforms make variables too (BLUEFLOW_SERVICE_HOST in Kubernetes).
    """
    known = {spec.environment for spec in SETTINGS.values()} | {CONFIG_VARIABLE}
    problems = []
    for name in environ:
        if name.startswith(_PREFIX) and name not in known and environ[name]:
            near = _near(name.removeprefix(_PREFIX).upper(), _guesses(), cutoff=0.8)
            if near:
                problems.append(SettingError(name, f"environment {name}", _no_setting(near)))
    return problems


def _guesses() -> dict[str, str]:
    """Return the variables of all settings by what people take for them, without the prefix."""
    guesses = {key.upper(): spec.environment for key, spec in SETTINGS.items()}
    for spec in SETTINGS.values():  # --for and --collection: the flag is the natural guess
        guesses[spec.flag.removeprefix("--").replace("-", "_").upper()] = spec.environment
    return guesses


def _near(name: str, meant: Mapping[str, str], *, cutoff: float = 0.6) -> str | None:
    """Return what the closest of the names in `meant` stands for; None when none is close."""
    from difflib import get_close_matches  # noqa: PLC0415 - only who mistypes pays for it

    near = get_close_matches(name, meant, n=1, cutoff=cutoff)
    return meant[near[0]] if near else None


def _no_setting(near: str | None) -> str:
    return "there is no such setting" + (f"; perhaps {near} was meant" if near else "")


def _bad(name: str, raw: object) -> str:
    if SETTINGS[name].secret:
        return "the value"
    items: Sequence[object] = raw if isinstance(raw, (list, tuple)) else [raw]
    text = mask_credentials(", ".join(map(str, items)))
    cut = text if len(text) <= _SHOWN_LENGTH_MAX else text[:_SHOWN_LENGTH_MAX] + "…"
    return repr(cut)
