"""Text that people write, read as values: durations, sizes, numbers, names. Pure, quick to import.

A parser raises `ValueError` with the end of a sentence that begins with the text ("is not a port
number"), so that its caller decides whether the text itself may be shown.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, TypeVar

from blueflow.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Number = TypeVar("Number", int, float)
T = TypeVar("T")

PORT_MAX = 65_535
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{unit}B": 1000**power for power, unit in enumerate("kMGT", start=1)}
_BYTES |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", start=1)}
_BYTES_BY_LOWER = {unit.lower(): factor for unit, factor in _BYTES.items()}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_NSID_SEGMENT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_NSID_SEGMENTS_MIN = 3  # https://atproto.com/specs/nsid: two for the authority, one for the name
_NSID_LENGTH_MAX = 317
_DID = re.compile(r"did:[a-z]+:[A-Za-z0-9._:%-]*[A-Za-z0-9._-]")
_DID_LENGTH_MAX = 2048
_SERVER = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\])(?::(\d{1,5}))?")
_TOPIC_PREFIX = re.compile(r"[A-Za-z0-9._-]{0,128}")
_SHARD = re.compile(r"(0|[1-9]\d{0,3})/([1-9]\d{0,3})")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def argument(owner: str, name: str, given: str, read: Callable[[str], T]) -> T:
    """Read an argument of a class as the setting of the same name is read.

    Raises:
        SettingError: it is not one.
    """
    try:
        return read(given)
    except ValueError as error:
        raise SettingError(name, owner, f"{given!r} {error}") from error


def text(given: str) -> str:
    """Take any text that is not empty."""
    if not given:
        raise ValueError("is empty")
    if "\0" in given:
        raise ValueError("has a NUL character in it")
    return given


def path(given: str) -> Path:
    """Read a path; `~` is the home folder, also where no shell expands it."""
    from pathlib import Path  # noqa: PLC0415 - --help does without it

    try:
        return Path(text(given)).expanduser()
    except RuntimeError:
        raise ValueError("names a home folder that cannot be found") from None


def label(given: str) -> str:
    """Read a name that is safe in file names, transaction ids and labels."""
    if not _LABEL.fullmatch(given):
        raise ValueError("is not 1 to 64 letters, digits, dots, dashes or underscores")
    return given


def word(*allowed: str, same: dict[str, str] | None = None) -> Callable[[str], str]:
    """Make a parser of one of the words `allowed`, in any case; `same` maps other spellings."""

    def parse(given: str) -> str:
        found = given.lower()
        found = (same or {}).get(found, found)
        if found not in allowed:
            raise ValueError(f"is none of {', '.join(allowed)}")
        return found

    return parse


def whole(at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    """Make a parser of whole numbers within bounds; `1_000` is a thousand."""

    def parse(given: str) -> int:
        digits = given.replace("_", "")
        if not (digits.isascii() and digits.isdigit()) or len(digits) > len(str(2**63)):
            raise ValueError("is not a whole number")
        _check_bounds(int(digits), at_least, at_most, str)
        return int(digits)

    return parse


def duration(at_least: float, at_most: float | None = None) -> Callable[[str], float]:
    """Make a parser of durations within bounds, in seconds: `500ms`, `30s`, `5m`, `1h`, `2.5`."""

    def parse(given: str) -> float:
        amount = _AMOUNT.fullmatch(given)
        if amount is None or amount[2] not in _SECONDS:
            raise ValueError("is not a duration such as 30s, 5m or 1h")
        seconds = float(amount[1]) * _SECONDS[amount[2]]
        if not math.isfinite(seconds):
            raise ValueError("is not a duration such as 30s, 5m or 1h")
        _check_bounds(seconds, at_least, at_most, show_duration)
        return seconds

    return parse


def retention(given: str) -> float:
    """Read how long something is kept, in seconds; `forever` is infinity."""
    return math.inf if given.lower() == "forever" else duration(60)(given)


def size(at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    """Make a parser of sizes within bounds, in bytes: `64MiB`, `32MB`, `1048576`."""

    def parse(given: str) -> int:
        amount = _AMOUNT.fullmatch(given)
        if amount is None or amount[2].lower() not in _BYTES_BY_LOWER:
            raise ValueError("is not a size such as 64MiB or 32MB")
        count = float(amount[1]) * _BYTES_BY_LOWER[amount[2].lower()]
        if not math.isfinite(count):
            raise ValueError("is not a size such as 64MiB or 32MB")
        _check_bounds(int(count), at_least, at_most, show_size)
        return int(count)

    return parse


def speed(given: str) -> float:
    """Read a factor of real time; `max`, as fast as it goes, is infinity."""
    if given.lower() == "max":
        return math.inf
    amount = _AMOUNT.fullmatch(given)
    if amount is None or amount[2].lower() not in {"", "x"} or not 0 < float(amount[1]) < math.inf:
        raise ValueError("is neither max nor a factor above 0")
    return float(amount[1])


def rate(given: str) -> float:
    """Read events per second."""
    amount = _AMOUNT.fullmatch(given)
    if amount is None or amount[2] or not 0 < float(amount[1]) < math.inf:
        raise ValueError("is not a rate above 0, in events per second")
    return float(amount[1])


def port(given: str) -> int:
    """Read a TCP port; 0 means none."""
    if given.startswith("tcp://"):
        raise ValueError(
            "is an address that Kubernetes sets for a service of this name; "
            "enableServiceLinks: false in the pod stops that"
        )
    if not (given.isascii() and given.isdigit()) or len(given) > len(str(PORT_MAX)):
        raise ValueError("is not a port number")
    _check_bounds(int(given), 0, PORT_MAX, str)
    return int(given)


def servers(given: str) -> str:
    """Read the brokers to begin with, HOST:PORT or several with commas, without spaces."""
    items = [item.strip() for item in given.split(",")]
    for item in items:
        matched = _SERVER.fullmatch(item)
        if matched is None or not 1 <= int(matched[1] or 1) <= PORT_MAX:
            raise ValueError("is not HOST:PORT[,HOST:PORT]")
    return ",".join(items)


def shard(given: str) -> str:
    """Read I/N, one of N parts counted from 0."""
    matched = _SHARD.fullmatch(given)
    if matched is None or not int(matched[1]) < int(matched[2]):
        raise ValueError("is not I/N with I from 0 to N-1, such as 0/1")
    return given


def topic_prefix(given: str) -> str:
    """Read what the names of topics begin with; together they have at most 249 characters."""
    if not _TOPIC_PREFIX.fullmatch(given):
        raise ValueError("is not up to 128 letters, digits, dots, dashes or underscores")
    return given


def cursor(given: str) -> str:
    """Read where to begin: `saved`, `live`, `oldest` or a seq, which stays text."""
    found = given.lower()
    if found in {"saved", "live", "oldest"}:
        return found
    try:
        return str(whole(0, 2**63 - 1)(given))
    except ValueError:
        raise ValueError("is neither saved, live, oldest nor a seq") from None


def collection(given: str) -> str:
    """Read an NSID, or the beginning of NSIDs with `.*` at its end."""
    segments = given.removesuffix(".*").split(".")
    fewest = 1 if given.endswith(".*") else _NSID_SEGMENTS_MIN
    sound = len(segments) >= fewest and all(map(_NSID_SEGMENT.fullmatch, segments))
    if not sound or len(given) > _NSID_LENGTH_MAX:
        raise ValueError("is no collection such as app.bsky.feed.post or app.bsky.graph.*")
    return given


def did(given: str) -> str:
    """Read a DID."""
    if not _DID.fullmatch(given) or len(given) > _DID_LENGTH_MAX:
        raise ValueError("is no DID such as did:plc:z72i7hdynmk6r22z27h6tvur")
    return given


def show_duration(seconds: float) -> str:
    """Write a duration so that `duration` reads it again."""
    return f"{_digits(seconds)}s"


def show_retention(seconds: float) -> str:
    """Write a retention so that `retention` reads it again, in days where they are whole."""
    days, rest = divmod(seconds, _SECONDS["d"])
    if math.isinf(seconds):
        return "forever"
    return f"{days:.0f}d" if days and not rest else show_duration(seconds)


def show_size(count: int) -> str:
    """Write a size so that `size` reads it again, in the largest unit that fits exactly."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count and count % _BYTES[unit] == 0:
            return f"{count // _BYTES[unit]}{unit}"
    return str(count)


def show_speed(factor: float) -> str:
    """Write a speed so that `speed` reads it again."""
    return "max" if math.isinf(factor) else _digits(factor)


def show_rate(per_s: float) -> str:
    """Write a rate so that `rate` reads it again."""
    return _digits(per_s)


def _digits(number: float) -> str:
    """Write a number exactly, and without an exponent: nobody reads one here."""
    written = repr(number)
    if "e" in written:
        from decimal import Decimal  # noqa: PLC0415 - only rare numbers need it

        written = f"{Decimal(written):f}"
    return written.removesuffix(".0")


def _check_bounds(
    value: Number, at_least: Number, at_most: Number | None, show: Callable[[Number], str]
) -> None:
    if value < at_least:
        raise ValueError(f"is below {show(at_least)}")
    if at_most is not None and value > at_most:
        raise ValueError(f"is above {show(at_most)}")
