"""Events for the tests of the lake's rows: real ones, made-up ones, and any at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from hypothesis import strategies as st

from blueflow.decode import Decoder, Wanted
from blueflow.events import Account, Identity, RepoOp, Sync
from blueflow.testing.samples import contract_events, odd_events
from blueflow.wire.recording import Unpacker

if TYPE_CHECKING:
    from blueflow.events import Event

DATA: Final = Path(__file__).parents[1] / "data"
NOW_US: Final = 1_783_176_000_000_000

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COLLECTION = TEXT | st.sampled_from(
    [
        "app.bsky.feed.post",
        "app.bsky.feed.like",
        "app.bsky.feed.repost",
        "app.bsky.graph.follow",
        "app.bsky.actor.profile",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | INT64 | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
# The names that columns are made from, with values of any type: right and wrong ones.
NAMES = ("text", "createdAt", "langs", "reply", "facets", "tags", "embed", "subject", "via")
RECORD = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, TEXT | JSON)) | (
    st.dictionaries(TEXT, JSON, max_size=3)
)
COMMON: dict[str, Any] = {"source": TEXT, "seq": INT64, "did": TEXT, "time_us": INT64}
EVENT = (
    st.builds(
        RepoOp,
        op_index=st.integers(0, 2**31 - 1),
        rev=TEXT,
        operation=st.sampled_from(["create", "update", "delete"]),
        collection=COLLECTION,
        rkey=TEXT,
        cid=st.none() | TEXT,
        record=st.none() | RECORD,
        **COMMON,
    )
    | st.builds(Identity, time=TEXT, handle=st.none() | TEXT, **COMMON)
    | st.builds(Account, time=TEXT, active=st.booleans(), status=st.none() | TEXT, **COMMON)
    | st.builds(Sync, time=TEXT, rev=TEXT, blocks=st.binary(max_size=20), **COMMON)
)


def made_up_events() -> list[Event]:
    """Return events of every kind, and odd ones."""
    return [*contract_events("relay.example", 60), *odd_events("relay.example", 1_000)]


def recorded_events() -> list[Event]:
    """Return the events of the recorded frames."""
    decoder = Decoder("bsky.network", after=None, wanted=Wanted(()), check="none")
    path = DATA / "firehose" / "frames.bin"
    for frame in Unpacker(path.name).feed(path.read_bytes()):
        decoder.feed(frame, NOW_US)
    return list(decoder.take().events)


def recorded_lines() -> list[bytes]:
    """Return the recorded lines of Jetstream, with the identity that Kafka's lines have.

    Everything else in them is as it was sent, the records to the byte.
    """
    paths = (
        "firehose/jetstream_v1.jsonl",
        "jetstream/golden_v1.jsonl",
        "jetstream/jsonbench_head10.ndjson",
    )
    lines = [line for path in paths for line in (DATA / path).read_bytes().splitlines()]
    return [
        b'{"source":"jetstream","seq":%d,%s' % (_seq(line, number), line[1:])
        for number, line in enumerate(lines)
    ]


def _seq(line: bytes, otherwise: int) -> int:
    """Return the seq that a line of an account-level event has in its body."""
    found = msgspec.json.decode(line)
    body: dict[str, Any] = found[found["kind"]]
    return int(body.get("seq", otherwise))
