"""Small made-up event streams for contracts and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from blueflow.events import Account, Identity, RepoOp, Sync

if TYPE_CHECKING:
    from blueflow.events import Event

T0_US: Final = 1_783_180_800_000_000  # 2026-07-04T16:00:00Z
HOUR_US: Final = 3_600_000_000


def contract_events(
    source: str, commits: int, *, first_seq: int = 1, step_us: int = 1_000
) -> list[Event]:
    """Return events of five accounts, of every kind, in the order of their seqs.

    Args:
        source: what they carry.
        commits: how many seqs; some have two operations.
        first_seq: of the first.
        step_us: from the time of one seq to that of the next; may be negative.
    """
    events: list[Event] = []
    for seq in range(first_seq, first_seq + commits):
        events += _commit(source, seq, T0_US + step_us * (seq - first_seq))
    return events


def _commit(source: str, seq: int, time_us: int) -> list[Event]:
    did, time = f"did:plc:account{seq % 5}", "2026-07-04T16:00:00.000Z"
    match seq % 11:
        case 7:
            return [Identity(source, seq, did, time_us, time, f"name{seq}.example")]
        case 8:
            return [Account(source, seq, did, time_us, time, seq % 2 == 0, "suspended")]
        case 9:
            return [Sync(source, seq, did, time_us, time, f"3l{seq:011d}", bytes(range(256)))]
    rev = f"3l{seq:011d}"
    collection = _COLLECTIONS[seq % len(_COLLECTIONS)]
    record = {"$type": collection, "text": f"number {seq}", "createdAt": time}
    first = RepoOp(
        source, seq, 0, did, time_us, rev, "create", collection, rev, f"bafyrei{seq}", record
    )
    if seq % 3:
        return [first]
    return [
        first,
        RepoOp(source, seq, 1, did, time_us, rev, "delete", collection, f"3k{seq:011d}"),
    ]


_COLLECTIONS = (
    "app.bsky.feed.post",
    "app.bsky.feed.like",
    "app.bsky.graph.follow",
    "app.bsky.feed.repost",
    "app.bsky.actor.profile",
)


def odd_events(source: str, seq: int) -> list[Event]:
    """Return events whose records are legal and unusual."""
    texts = [
        "",
        'nul \x00, line \n \r \u2028 \u2029, quote " \\',
        "\N{FAMILY}\u200d\N{PILE OF POO} \u05e9\u05dc\u05d5\u05dd \uffff \U0010ffff",
        "large " * 170_000,  # records have up to 1 MB
    ]
    records: list[dict[str, Any]] = [{"text": text} for text in texts]
    records += [
        {},
        {"n": [0, -1, 2**53, -(2**63), 2**63 - 1, 1.5, True, None]},
        {"": {"$bytes": ""}, "blob": {"ref": {"$link": "bafkrei"}}, "deep": [[[[{}]]]]},
    ]
    return [
        RepoOp(
            source,
            seq + index,
            0,
            "did:web:odd.example",
            (0, 1, -5, 2**62, T0_US)[index % 5],  # a relay's time is a claim, too
            "3lodd",
            "update",
            ("app.bsky.feed.post", "com.example.\u200bodd", "")[index % 3],
            "rkey:with~all._-chars",
            "bafyreiodd",
            record,
        )
        for index, record in enumerate(records)
    ]


def expect(condition: object, otherwise: str) -> None:
    """Fail with a sentence: these checks also run where nobody rewrites `assert`."""
    if not condition:
        raise AssertionError(otherwise)
