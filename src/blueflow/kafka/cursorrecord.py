"""The records of the topic `cursor`: where each pipeline is, and who writes for it. A core.

Key `<pipeline>|<source>`, value `{"source", "seq", "time_us", "instance", "commit"}`. `seq` is null
while a pipeline has no position yet; `simulated` is there, and true, when the data is made up. The
topic is compacted, so the newest record of each key stays.

`instance` is the process and the number of its claim, `commit` the number of its transactions so
far. After an outage they tell whether a transaction whose commit was never answered took place; the
position would not, since an event that comes late does not move it.
"""

from __future__ import annotations

import msgspec

from blueflow.events import Position


class CursorValue(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a cursor record."""

    source: str
    seq: int | None
    time_us: int
    instance: str
    commit: int = 0
    simulated: bool = False


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(CursorValue).decode


def cursor_record(pipeline: str, value: CursorValue) -> tuple[bytes, bytes]:
    """Return key and value of the record that makes a position durable."""
    return f"{pipeline}|{value.source}".encode(), _encode(value)


class CursorTable:
    """What the topic says, read from its beginning.

    Attributes:
        positions: of this pipeline, by source.
        newest: the newest record of this pipeline; None when there is none.
        kinds: whether the data of each pipeline that wrote to the topics is made up.
    """

    def __init__(self, pipeline: str) -> None:
        self.positions: dict[str, Position] = {}
        self.newest: CursorValue | None = None
        self.kinds: set[bool] = set()
        self._prefix = f"{pipeline}|".encode()

    def take(self, key: bytes | None, value: bytes | None) -> None:
        """Take the next record; a value of None removes the key.

        Raises:
            msgspec.MsgspecError: it is no cursor record.
        """
        if key is None or b"|" not in key:
            raise msgspec.ValidationError("a record without the key <pipeline>|<source>")
        ours = key.startswith(self._prefix)
        if value is None:
            if ours:
                self.positions.pop(key[len(self._prefix) :].decode(), None)
            return
        cursor = _decode(value)
        self.kinds.add(cursor.simulated)
        if not ours:
            return
        self.newest = cursor
        if cursor.seq is not None:
            self.positions[cursor.source] = Position(cursor.source, cursor.seq, cursor.time_us)

    @property
    def instance(self) -> str | None:
        """Who wrote the newest record of this pipeline; None when there is none."""
        return self.newest.instance if self.newest else None

    @property
    def source(self) -> str | None:
        """The source of the newest record of this pipeline."""
        return self.newest.source if self.newest else None


class Instance:
    """The name under which a process writes for a pipeline: new with every claim it makes.

    Whoever is fenced reads the newest record: one that it has neither written itself nor seen when
    it claimed means that another process took over.

    Args:
        name: unique to the process, and telling to an operator.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._claims = 0
        self._seen: tuple[str, int] | None = None
        self._knows = False

    @property
    def current(self) -> str:
        """The name of the last claim."""
        return f"{self._name}.{self._claims}"

    def claim(self, seen: CursorValue | None) -> str:
        """Return the name for a new claim, made over the newest record in the topic."""
        self._claims += 1
        self._seen, self._knows = (seen.instance, seen.commit) if seen else None, True
        return self.current

    def commits_in(self, newest: CursorValue | None) -> int:
        """Return how many transactions of this process the topic has; 0 where it has none.

        A claim repeats the number that it found: it takes the place of the record that had it.
        """
        return newest.commit if newest is not None and self.wrote(newest) else 0

    def wrote(self, cursor: CursorValue) -> bool:
        """Tell whether a record is of this process, under any of its claims."""
        return cursor.instance.rpartition(".")[0] == self._name

    def superseded_by(self, newest: CursorValue | None) -> bool:
        """Tell whether the newest record is of a process that took over from us.

        One that only goes on under the name that we saw has done so too: it got its producer id
        after ours, else it could not write.
        """
        if not self._knows or newest is None or self.wrote(newest):
            return False
        return (newest.instance, newest.commit) != self._seen
