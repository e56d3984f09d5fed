"""The schemas in docs/schema are what the code makes, and what is written fits them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from blueflow.events import Account, Identity, RepoOp, Sync, decode_line, encode_event
from blueflow.kafka.cursorrecord import CursorValue, cursor_record
from blueflow.kafka.transaction import Partition, dead_letter
from blueflow.metrics import DLQ_REASONS
from blueflow.schema import NAMES, encode, schema
from blueflow.testing.samples import contract_events, odd_events

if TYPE_CHECKING:
    from blueflow.events import Event

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "schema"
EVENT, CURSOR, DEAD_LETTER = (Draft202012Validator(schema(name)) for name in NAMES)
CREATE, DELETE, IDENTITY, ACCOUNT, SYNC = (
    RepoOp("relay", 7, 0, "did:plc:a", 1, "3l", "create", "app.bsky.feed.post", "r", "bafy", {}),
    RepoOp("relay", 7, 1, "did:plc:a", 1, "3l", "delete", "app.bsky.feed.post", "r"),
    Identity("relay", 8, "did:plc:a", 1, "2026-07-04T16:00:00Z", "a.example"),
    Account("relay", 9, "did:plc:a", 1, "2026-07-04T16:00:00Z", active=False, status="deleted"),
    Sync("relay", 10, "did:plc:a", 1, "2026-07-04T16:00:00Z", "3l", b"car"),
)


def line(event: Event) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(encode_event(event))
    return decoded


def closed(node: Any) -> Any:
    """Return a schema that takes no field beyond those it describes."""
    if isinstance(node, list):
        return [closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    extra = {"additionalProperties": False} if "properties" in node and "type" in node else {}
    return {name: closed(value) for name, value in node.items()} | extra


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_the_code_makes(name: str) -> None:
    told = f"python -m blueflow.schema {name} > docs/schema/{name}.schema.json"
    assert (FOLDER / f"{name}.schema.json").read_bytes() == encode(name), told
    Draft202012Validator.check_schema(schema(name))


def test_there_is_no_other_file() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        f"{name}.schema.json" for name in NAMES
    )


def test_the_command_prints_one() -> None:
    command = [sys.executable, "-m", "blueflow.schema"]
    assert subprocess.check_output(command) == encode("event")
    assert subprocess.check_output([*command, "cursor"]) == encode("cursor")
    wrong = subprocess.run([*command, "no"], capture_output=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert b"usage" in wrong.stderr


def test_it_needs_no_library_of_kafka() -> None:
    code = "import sys, blueflow.schema; sys.exit('aiokafka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "event",
    [CREATE, DELETE, IDENTITY, ACCOUNT, SYNC],
    ids=["create", "delete", "identity", "account", "sync"],
)
def test_an_event_fits_with_every_field_described(event: Event) -> None:
    EVENT.validate(line(event))
    Draft202012Validator(closed(schema("event"))).validate(line(event))


def test_sample_events_fit() -> None:
    events = [*contract_events("relay", 110), *odd_events("relay", 1)]
    strict = Draft202012Validator(closed(schema("event")))
    for event in events:
        strict.validate(line(event))
    assert {line(event)["kind"] for event in events} == {"commit", "identity", "account", "sync"}


def test_golden_jetstream_lines_fit_once_they_have_our_fields(data_folder: Path) -> None:
    lines = [
        one
        for name in ("jetstream/golden_v1.jsonl", "firehose/jetstream_v1.jsonl")
        for one in (data_folder / name).read_bytes().splitlines()
    ]
    assert len(lines) > 20
    for one in lines:
        golden = json.loads(one)
        assert not EVENT.is_valid(golden)
        EVENT.validate(golden | {"source": "relay", "seq": 31_527_015_322, "op_index": 0})
        EVENT.validate(line(decode_line(one, "relay", 31_527_015_322)))


text = st.text(max_size=12)
sizes = st.integers(0, 2**63 - 1)
head = (text, sizes, st.integers(0, 199), text, st.integers(-(2**63), 2**63 - 1), text)
level = (text, sizes, text, sizes, text)
values = st.recursive(
    st.none() | st.booleans() | sizes | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
events = st.one_of(
    st.builds(
        RepoOp,
        *(*head, st.sampled_from(["create", "update"]), text, text, text),
        st.dictionaries(text, values, max_size=3),
    ),
    st.builds(RepoOp, *head, st.just("delete"), text, text),
    st.builds(Identity, *level, st.none() | text),
    st.builds(Account, *level, st.booleans(), st.none() | text),
    st.builds(Sync, *level, text, st.binary(max_size=40)),
)


@given(events)
def test_every_event_fits(event: Event) -> None:
    EVENT.validate(line(event))


def without(value: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: one for key, one in value.items() if key != name}


@pytest.mark.parametrize("field", ["did", "time_us", "kind", "source", "seq", "op_index", "commit"])
def test_a_line_without_one_of_its_fields_does_not_fit(field: str) -> None:
    assert not EVENT.is_valid(without(line(CREATE), field))


@pytest.mark.parametrize(
    ("event", "change"),
    [
        (CREATE, {"kind": "identity"}),
        (CREATE, {"kind": "info"}),
        (CREATE, {"seq": "7"}),
        (CREATE, {"seq": 7.5}),
        (CREATE, {"seq": -1}),
        (CREATE, {"seq": 2**63}),
        (CREATE, {"op_index": None}),
        (CREATE, {"commit": without(line(CREATE)["commit"], "cid")}),
        (CREATE, {"commit": without(line(CREATE)["commit"], "record")}),
        (CREATE, {"commit": line(CREATE)["commit"] | {"record": "text"}}),
        (CREATE, {"commit": line(CREATE)["commit"] | {"operation": "replace"}}),
        (DELETE, {"commit": line(DELETE)["commit"] | {"record": {}}}),
        (DELETE, {"commit": line(DELETE)["commit"] | {"cid": "bafy"}}),
        (ACCOUNT, {"account": without(line(ACCOUNT)["account"], "active")}),
        (SYNC, {"sync": line(SYNC)["sync"] | {"blocks": "Y2Fy"}}),
    ],
)
def test_a_wrong_line_does_not_fit(event: Event, change: dict[str, Any]) -> None:
    assert EVENT.is_valid(line(event))
    assert not EVENT.is_valid(line(event) | change)


def test_a_field_that_is_newer_than_the_schema_fits() -> None:
    assert EVENT.is_valid(line(CREATE) | {"later": 1})


@pytest.mark.parametrize(
    "value",
    [
        CursorValue("relay", None, 0, "host-1-ab.1"),
        CursorValue("relay#2", 7, 1, "host-1-ab.1", commit=3, simulated=True),
    ],
    ids=["claim", "commit"],
)
def test_a_cursor_fits(value: CursorValue) -> None:
    record = json.loads(cursor_record("default", value)[1])
    Draft202012Validator(closed(schema("cursor"))).validate(record)
    assert not CURSOR.is_valid(record | {"seq": "7"})
    assert not CURSOR.is_valid(without(record, "instance"))


@pytest.mark.parametrize("reason", DLQ_REASONS)
@pytest.mark.parametrize(
    "event", [CREATE, IDENTITY, odd_events("relay", 1)[3]], ids=["create", "identity", "large"]
)
def test_a_dead_letter_fits(reason: str, event: Event) -> None:
    record = (1, b"did:plc:a", encode_event(event))
    letter = json.loads(dead_letter(Partition("t", 0), record, reason, "why", 1)[2])
    Draft202012Validator(closed(schema("dead-letter"))).validate(letter)
    assert (letter["event"] is None) == (len(record[2]) > 256 * 1024)
    assert not DEAD_LETTER.is_valid(letter | {"reason": "odd"})
    assert not DEAD_LETTER.is_valid(without(letter, "uri"))
