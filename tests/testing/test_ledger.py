from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from blueflow.events import Account, Event, Identity, RepoOp, Sync, encode_event
from blueflow.testing.ledger import Entry, Fired, Ledger

if TYPE_CHECKING:
    from pathlib import Path

DIDS = ("did:plc:aa", "did:plc:bb")


def op(seq: int, at: int = 0, **changes: Any) -> RepoOp:
    did = DIDS[seq % 2]
    fields = {"rev": f"rev{seq}", "operation": "create", "collection": "a.b.c", "rkey": f"k{at}"}
    return RepoOp("sim", seq, at, did, 7, **(fields | {"cid": f"cid{seq}"} | changes))


EVENTS: list[Event] = [
    op(10), op(11, 0), op(11, 1), Identity("sim", 12, DIDS[0], 7, "t", "me.example"), op(13),
    Account("sim", 14, DIDS[0], 7, "t", active=True), Sync("sim", 15, DIDS[1], 7, "t", "r", b""),
    op(16, operation="delete", cid=None), op(17),
]  # fmt: skip


def entry_of(index: int, event: Event) -> Entry:
    wire = json.loads(encode_event(event))
    body = wire[wire["kind"]]
    picked = {name: body.get(name) for name in ("rev", "operation", "collection", "rkey", "cid")}
    return Entry(index, event.seq, event.op_index, 7, wire["kind"], event.did, **picked)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.add(entry_of(event.seq, event) for event in EVENTS)
    return ledger


@pytest.mark.parametrize(
    "form",
    [lambda e: e, encode_event, lambda e: json.loads(encode_event(e))],
    ids=["events", "lines", "dicts"],
)
def test_what_was_issued_is_delivered(ledger: Ledger, form: Any) -> None:
    verdict = ledger.compare(map(form, EVENTS))
    assert verdict.ok
    assert str(verdict) == "delivered = issued: 9 events, 9 demanded"


def test_each_kind_of_wrong_is_found(ledger: Ledger) -> None:
    wrong = [*EVENTS[:3], EVENTS[4], EVENTS[1], op(99), op(16, cid="cid16"), op(17), EVENTS[6]]
    verdict = ledger.compare(wrong)
    assert not verdict.ok
    assert verdict.missing == ["seq 12 op 0", "seq 14 op 0"]
    assert verdict.duplicated == ["seq 11 op 0"]
    assert verdict.unexpected == ["seq 99 op 0 was not issued to this consumer"]
    assert [text[:11] for text in verdict.altered] == ["seq 16 op 0"]
    assert verdict.reordered == ["seq 15 op 0 of did:plc:bb came after a later one"]
    assert "missing (2): seq 12 op 0; seq 14 op 0" in str(verdict)


def test_order_matters_within_a_did_only(ledger: Ledger) -> None:
    across = [EVENTS[1], EVENTS[2], EVENTS[0], *EVENTS[3:]]
    assert ledger.compare(across).ok
    within = [EVENTS[0], EVENTS[2], EVENTS[1], *EVENTS[3:]]
    assert ledger.compare(within).reordered == ["seq 11 op 0 of did:plc:bb came after a later one"]


def test_a_consumer_is_judged_by_what_it_asked_for(ledger: Ledger) -> None:
    assert ledger.compare(EVENTS[3:], after=11).ok
    assert ledger.compare(EVENTS, after=10).unexpected
    assert ledger.compare(EVENTS[:4], through=12).ok
    assert ledger.compare(EVENTS[:3], through=12).missing == ["seq 12 op 0"]
    posts = [event for event in EVENTS if isinstance(event, RepoOp)]
    assert ledger.compare(posts, wanted=lambda entry: entry.kind == "commit").ok
    assert ledger.compare(EVENTS, wanted=lambda entry: entry.kind == "commit").unexpected


def test_spoilt_events_must_not_come_and_their_neighbours_may() -> None:
    ledger = Ledger()
    lost, near = entry_of(0, op(11, 0)), entry_of(0, op(11, 1))
    ledger.add([replace(lost, delivery="forbidden", spoilt="bomb@0")])
    ledger.add([replace(near, delivery="allowed", spoilt="bomb@0")])
    assert ledger.compare([]).ok
    assert ledger.compare([op(11, 1)]).ok
    assert ledger.compare([op(11, 0)]).unexpected == ["seq 11 op 0 was spoilt by bomb@0"]


def test_samples_are_bounded_and_counts_are_not() -> None:
    ledger = Ledger()
    ledger.add(entry_of(seq, op(seq)) for seq in range(1000))
    verdict = ledger.compare([])
    assert verdict.counts["missing"] == 1000
    assert len(verdict.missing) == 10
    assert "and 990 more" in str(verdict)


def test_a_ledger_on_disk_survives_a_kill(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "ledger.jsonl"
    with path.open("ab") as file:
        written = Ledger(file)
        written.add(ledger.entries)
        written.add_fired(Fired("close:1001@3", 3))
        assert path.read_bytes().count(b"\n") == len(ledger) + 1  # flushed, not only written
    with path.open("ab") as file:
        file.write(b'{"line":"event","index":')  # the relay was killed here
    loaded = Ledger.load(path)
    assert loaded.entries == ledger.entries
    assert loaded.fired == [Fired("close:1001@3", 3)]
