"""Which faults a simulated relay commits, and at which event. A plan counts what came to pass.

Text form: `kind[:argument]@event[xtimes]`, separated by commas, e.g.
`close:1001@500,stall:5@800,garbage@900x2,garbage-stays@1200,http:429@0`. `event` counts the events
of the stream from 0: the fault comes instead of that event, or right before it. `FAULTS` lists the
kinds; docs/guides/simulated-relay.md explains them.
"""

from __future__ import annotations

import re
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from blueflow.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CLOSE_CODES = (1000, 1001, 1006, 1011, 1012, 1013)
Scope: TypeAlias = Literal["wire", "stream", "handshake"]


class Kind(msgspec.Struct, frozen=True):
    """A kind of fault.

    Attributes:
        scope: "wire" befalls the first connection that comes to the event, and then no other
            (`times` more); "stream" changes the event for everybody; "handshake" refuses the next
            connection after so many events.
        effect: one line for people.
        argument: what stands for a missing one.
    """

    scope: Scope
    effect: str
    argument: str = ""


FAULTS: dict[str, Kind] = {
    "close": Kind("wire", "closes with this code; 1006 cuts the TCP connection", "1001"),
    "stall": Kind("wire", "sends nothing for so many seconds, but answers pings", "60"),
    "half-open": Kind("wire", "answers nothing for so many seconds; the socket stays", "60"),
    "error": Kind("wire", "sends an error frame with this name, and closes", "FutureCursor"),
    "slow": Kind("wire", "kicks the consumer as if it were too far behind: ConsumerTooSlow"),
    "info": Kind("wire", "sends an #info with this name", "OutdatedCursor"),
    "garbage": Kind("wire", "sends noise instead of the event"),
    "truncated": Kind("wire", "sends the first half of the frame"),
    "oversize": Kind("wire", "sends a frame of so many bytes instead of the event", "5200000"),
    "text": Kind("wire", "sends a text message instead of the event"),
    "duplicate": Kind("wire", "sends the event twice"),
    "reorder": Kind("wire", "sends the event behind its successor"),
    "unknown-op": Kind("wire", "sends a frame of this op first", "7"),
    "garbage-stays": Kind("stream", "the event is noise, for everybody and always"),
    "truncated-stays": Kind("stream", "the event's frame is cut in half, for everybody and always"),
    "oversize-stays": Kind("stream", "the event has so many bytes, always", "5200000"),
    "text-stays": Kind("stream", "the event is a text message, always"),
    "corrupt-record": Kind("stream", "one bit of a record is flipped"),
    "corrupt-node": Kind("stream", "one bit of a tree node is flipped"),
    "missing-record": Kind("stream", "a record is not among the blocks"),
    "bomb": Kind("stream", "a record is nested so deep", "20000"),
    "unknown-type": Kind("stream", "a frame of this type, with a seq, comes first", "#novelty"),
    "gap": Kind("stream", "so many seqs are skipped", "10"),
    "restart": Kind("stream", "seqs begin anew at this number; times go on", "1"),
    "http": Kind(
        "handshake", "refuses with this status, and 429 with Retry-After (`429/2`)", "429"
    ),
}
"""Every kind of fault by its name in a plan."""

_TEXT = re.compile(r"([a-z-]+)(?::([^@,:]+))?@(\d+)(?::([^@,:x]+))?(?:x(\d+))?")
_TIMES_MAX = 1_000_000


class Fault(msgspec.Struct, frozen=True):
    """One planned fault; `str()` gives its text form."""

    kind: str
    at: int
    argument: str = ""
    times: int = 1

    def __str__(self) -> str:
        argument = f":{self.argument}" if self.argument else ""
        return f"{self.kind}{argument}@{self.at}" + (f"x{self.times}" if self.times > 1 else "")

    @property
    def scope(self) -> Scope:
        """Whom it befalls."""
        return FAULTS[self.kind].scope

    @property
    def number(self) -> float:
        """The argument as a number: a code, seconds, bytes, a seq."""
        return float(self.argument.partition("/")[0].removesuffix("s"))


class FaultPlan:
    """Faults in the order of their events, and how often each one fired.

    Args:
        faults: `Fault`s, or the text form.

    Raises:
        SettingError: an unknown kind, an argument that makes no sense, or a text of another form.
    """

    def __init__(self, faults: str | Iterable[Fault] = ()) -> None:
        parsed = _parse(faults) if isinstance(faults, str) else [_checked(f) for f in faults]
        self.faults: Sequence[Fault] = sorted(parsed, key=lambda fault: fault.at)
        self.fired: Counter[str] = Counter({str(fault): 0 for fault in self.faults})
        self._wire: dict[int, list[list[Fault]]] = {}  # by event: faults still to come
        for fault in self.of("wire"):
            self._wire.setdefault(fault.at, []).append([fault] * fault.times)
        self._handshake = [fault for fault in self.of("handshake") for _ in range(fault.times)]

    @classmethod
    def random(cls, seed: int, *, events: int, kinds: Sequence[str], count: int) -> FaultPlan:
        """Draw a plan of `count` faults over `events` events; equal seeds give equal plans."""
        random = Random(f"blueflow faults {seed}")
        places = sorted(random.sample(range(1, events - 1), count))
        faults = []
        for place in places:
            kind = random.choice(kinds)
            argument = str(random.choice(CLOSE_CODES)) if kind == "close" else ""
            faults.append(Fault(kind, place, argument))
        return cls(faults)

    def __str__(self) -> str:
        return ",".join(map(str, self.faults))

    @property
    def unfired(self) -> list[str]:
        """The faults that have not come to pass: a test with any of them proves nothing."""
        return [text for text, count in self.fired.items() if count == 0]

    def of(self, scope: Scope) -> list[Fault]:
        """Return the faults of one scope in the order of their events."""
        return [fault for fault in self.faults if fault.scope == scope]

    def wire_events(self) -> list[int]:
        """Return the events at which something may befall a connection, rising."""
        return sorted(self._wire)

    def next_wire(self, event: int) -> Fault | None:
        """Return the next fault that a connection at this event suffers."""
        waiting = self._waiting(event)
        return waiting[-1] if waiting else None

    def take_wire(self, event: int) -> Fault | None:
        """Return the same, and use it up once."""
        waiting = self._waiting(event)
        return waiting.pop() if waiting else None

    def take_handshake(self, issued: int) -> Fault | None:
        """Return the refusal due after so many issued events, and use it up once."""
        if self._handshake and self._handshake[0].at <= issued:
            return self._handshake.pop(0)
        return None

    def note(self, fault: Fault) -> None:
        """Count that a fault came to pass."""
        self.fired[str(fault)] += 1

    def _waiting(self, event: int) -> list[Fault]:
        return next((waiting for waiting in self._wire.get(event, ()) if waiting), [])


def _parse(text: str) -> list[Fault]:
    faults = []
    for part in filter(None, map(str.strip, text.split(","))):
        found = _TEXT.fullmatch(part)
        if found is None:
            raise SettingError("faults", "the plan", f"{part!r} is not kind[:argument]@event[xN]")
        kind, before, at, behind, times = found.groups()
        faults.append(_checked(Fault(kind, int(at), before or behind or "", int(times or 1))))
    return faults


def _checked(fault: Fault) -> Fault:
    kind = FAULTS.get(fault.kind)
    if kind is None:
        known = ", ".join(FAULTS)
        raise SettingError("faults", "the plan", f"no fault {fault.kind!r}; there are {known}")
    fault = msgspec.structs.replace(fault, argument=fault.argument or kind.argument)
    if not 1 <= fault.times <= _TIMES_MAX:
        raise SettingError("faults", "the plan", f"{fault} fires {fault.times} times")
    if kind.argument[:1].isdigit():
        try:
            number = fault.number
        except ValueError:
            raise SettingError("faults", "the plan", f"{fault} needs a number") from None
        if fault.kind == "close" and number not in CLOSE_CODES:
            raise SettingError("faults", "the plan", f"{fault}: codes are {CLOSE_CODES}")
    return fault
