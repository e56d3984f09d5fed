"""Rows: grouped by dataset and hour, sorted, and never stopped by what an author wrote."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lake.lakeevents import EVENT, made_up_events, recorded_events, recorded_lines

from blueflow.events import Account, Identity, RepoOp, encode_event
from blueflow.files.layout import HOUR_US, hour_of
from blueflow.lake import rows as rows_module
from blueflow.lake.hot import Post, reader
from blueflow.lake.rows import RowBuffer
from blueflow.lake.schema import SCHEMAS
from blueflow.records import DATASETS, dataset_of
from blueflow.testing.samples import T0_US

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blueflow.events import Event

POST = "app.bsky.feed.post"


def operation(collection: str = POST, record: Any = None, **fields: Any) -> RepoOp:
    """Return a create with a record."""
    common = {"source": "s", "seq": 1, "op_index": 0, "did": "did:plc:a", "time_us": T0_US}
    named = {"rev": "3l", "operation": "create", "rkey": "k", "cid": "bafy"}
    return RepoOp(**(common | named | fields), collection=collection, record=record)  # type: ignore[arg-type]


def row_of(event: Event) -> dict[str, Any]:
    """Return the only row of an event."""
    buffer = RowBuffer()
    assert buffer.add_events([event]) == []
    (group,) = buffer.take().values()
    (row,) = group.table().to_pylist()
    return row


def hot(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that come from the record's content."""
    names = SCHEMAS["posts"].names
    return {name: row[name] for name in names[names.index("cid") + 1 : -1]}


@given(st.lists(EVENT, max_size=12))
def test_rows_are_grouped_by_dataset_and_hour_and_sorted(events: list[Event]) -> None:
    buffer = RowBuffer()
    buffer.add_events(events)
    groups = buffer.take()
    assert sorted(groups) == sorted({(dataset_of(one), hour_of(one.time_us)) for one in events})
    for (dataset, hour), group in groups.items():
        mine = [one for one in events if (dataset_of(one), hour_of(one.time_us)) == (dataset, hour)]
        times = [one.time_us for one in mine]
        assert (group.dataset, group.hour, group.rows) == (dataset, hour, len(mine))
        assert (group.time_min_us, group.time_max_us) == (min(times), max(times))
        table = group.table()
        assert table.schema.equals(SCHEMAS[dataset], check_metadata=True)
        table.validate(full=True)
        places = list(
            zip(
                table["time"].cast(pa.int64()).to_pylist(),
                *(table[name].to_pylist() for name in ("source", "seq", "op_index")),
                strict=True,
            )
        )
        assert places == sorted((one.time_us, one.source, one.seq, one.op_index) for one in mine)


def test_lines_and_events_give_the_same_tables() -> None:
    events: list[Event] = [*made_up_events(), *recorded_events()]
    ours, theirs = RowBuffer(), RowBuffer()
    assert ours.add_events(events) == theirs.add_lines(encode_event(one) for one in events) == []
    assert {dataset for dataset, _ in ours.groups} == set(DATASETS)
    assert (ours.rows, ours.newest_time_us) == (theirs.rows, theirs.newest_time_us)
    assert ours.newest_time_us == 2**62
    lengths = sum(len(encode_event(event)) for event in events)
    assert ours.bytes == theirs.bytes == pytest.approx(lengths, rel=0.15)
    mine, other = ours.take(), theirs.take()
    assert mine.keys() == other.keys()
    for key, group in mine.items():
        assert group.table().equals(other[key].table())
    assert (ours.rows, ours.bytes, ours.groups) == (0, 0, {})


def test_a_table_is_the_same_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = [*made_up_events(), *recorded_events()]
    whole, parts = RowBuffer(), RowBuffer()
    whole.add_events(events)
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(rows_module, "_LINES_AT_ONCE", 2)
    parts.add_lines(map(encode_event, events[::-1]))
    for key, group in whole.take().items():
        assert group.table().equals(parts.groups[key].table())


def test_only_what_is_wanted_is_held() -> None:
    events: list[Event] = [operation(seq=seq, time_us=T0_US + seq * HOUR_US) for seq in range(4)]
    events.append(operation("app.bsky.feed.like", {}))
    wanted = {("posts", hour_of(T0_US)), ("accounts", hour_of(T0_US))}
    told = [Identity("s", 9, "d", T0_US, ""), Identity("s", 10, "d", T0_US + HOUR_US, "")]
    buffer = RowBuffer()
    buffer.add_events([*events, *told], only=wanted)
    buffer.add_lines(map(encode_event, [*events, *told]), only=wanted)
    assert buffer.groups.keys() == wanted
    assert [group.rows for group in buffer.groups.values()] == [2, 2]
    assert buffer.rows == 4
    assert buffer.newest_time_us == T0_US


def test_nothing_taken_in_is_nothing_held() -> None:
    buffer = RowBuffer()
    assert buffer.add_lines([]) == buffer.add_events([]) == []
    assert buffer.take() == {}
    assert buffer.newest_time_us == 0


GOOD = encode_event(operation(record={"text": "good"}))
BAD = {
    "not JSON": b"{",
    "empty": b"",
    "not an object": b"[]",
    "not UTF-8 in the record": GOOD.replace(b"good", b"\xff"),
    "not UTF-8 elsewhere": GOOD.replace(b"did:plc:a", b"\xff"),
    "half a surrogate": GOOD.replace(b"good", b"\\ud800"),
    "no source": GOOD.replace(b'"source":"s",', b""),
    "no seq": GOOD.replace(b'"seq":1,', b""),
    "seq of 65 bits": GOOD.replace(b'"seq":1', b'"seq":18446744073709551616'),
    "seq above its column": GOOD.replace(b'"seq":1', b'"seq":9223372036854775808'),
    "op_index above its column": GOOD.replace(b'"op_index":0', b'"op_index":2147483648'),
    "time below its column": GOOD.replace(b"%d" % T0_US, b"-9223372036854775809"),
    "a record that is a list": GOOD.replace(b'{"text":"good"}', b"[]"),
    "a record that is text": GOOD.replace(b'{"text":"good"}', b'"good"'),
    "an unknown operation": GOOD.replace(b"create", b"rename"),
    "an unknown kind": GOOD.replace(b'"kind":"commit"', b'"kind":"commute"'),
    "another kind": GOOD.replace(b'"kind":"commit"', b'"kind":"identity"'),
    "no commit": b'{"did":"d","time_us":1,"kind":"commit","source":"s","seq":1}',
    "too deep": GOOD.replace(b'"good"', b"[" * 50_000 + b"]" * 50_000),
    "a sync without bytes": b'{"did":"d","time_us":1,"kind":"sync","source":"s","seq":1,'
    b'"sync":{"time":"","rev":"3l","blocks":{}}}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_lines_that_are_no_events_come_back_and_the_others_stay(line: bytes) -> None:
    account = encode_event(Account("s", 2, "d", T0_US, "", active=True))
    for others in ([GOOD], [GOOD, account, GOOD]):  # alike, as those of a topic are, and not
        buffer = RowBuffer()
        (rejected,) = buffer.add_lines([GOOD, line, *others])
        assert rejected.index == 1
        assert rejected.problem
        assert buffer.rows == 1 + len(others)


@pytest.mark.parametrize("record", [b'{"text":"\xc3\xa9"}', b"null"])
def test_lines_of_one_topic_with_and_without_a_record(record: bytes) -> None:
    buffer = RowBuffer()
    other = GOOD.replace(b'{"text":"good"}', record)
    deleted = encode_event(operation(operation="delete", cid=None))
    assert buffer.add_lines([GOOD, other, deleted]) == []
    found = [row["text"] for row in buffer.groups["posts", hour_of(T0_US)].table().to_pylist()]
    assert found == ["good", None if record == b"null" else "é", None]


def test_the_index_of_a_bad_line_counts_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_LINES_AT_ONCE", 2)
    assert [one.index for one in RowBuffer().add_lines([GOOD, GOOD, b"", GOOD, b"-"])] == [2, 4]


@pytest.mark.parametrize("fields", [{"seq": 2**63}, {"time_us": -(2**63) - 1}, {"op_index": 2**31}])
def test_events_with_numbers_beyond_their_columns_come_back(fields: dict[str, int]) -> None:
    buffer = RowBuffer()
    (rejected,) = buffer.add_events([operation(), operation(**dict[str, Any](fields))])
    assert rejected.index == 1
    if "op_index" not in fields:
        told = msgspec.structs.replace(Identity("s", 1, "d", 1, ""), **fields)
        assert len(buffer.add_events([told])) == 1
    assert buffer.rows == 1


def test_the_hot_columns_of_a_post() -> None:
    features = [
        {"$type": "app.bsky.richtext.facet#tag", "tag": "Cats"},
        {"$type": "app.bsky.richtext.facet#link", "uri": "https://a.example"},
        {"$type": "app.bsky.richtext.facet#mention", "did": "did:plc:b"},
        {"$type": "app.bsky.richtext.facet#newer", "tag": "no"},
    ]
    media = {"$type": "app.bsky.embed.external", "external": {"uri": "https://b.example"}}
    record = {
        "$type": POST,
        "text": "Hello\x00",
        "createdAt": "2026-07-04T16:00:00.123Z",
        "langs": ["en", "pt"],
        "facets": [{"features": [one], "index": {}} for one in [*features, *features]],
        "tags": ["Cats", "dogs"],
        "reply": {"parent": {"uri": "at://p", "cid": "c"}, "root": {"uri": "at://r", "cid": "c"}},
        "embed": {
            "$type": "app.bsky.embed.recordWithMedia",
            "media": media,
            "record": {"record": {"uri": "at://q", "cid": "c"}},
        },
    }
    assert hot(row_of(operation(record=record))) == {
        "created_at": datetime(2026, 7, 4, 16, 0, 0, 123_000, tzinfo=UTC),
        "created_at_text": "2026-07-04T16:00:00.123Z",
        "text": "Hello\x00",
        "langs": ["en", "pt"],
        "reply_parent": "at://p",
        "reply_root": "at://r",
        "hashtags": ["Cats", "dogs"],
        "links": ["https://a.example", "https://b.example"],
        "mentions": ["did:plc:b"],
        "embed_type": "app.bsky.embed.recordWithMedia",
        "quote_uri": "at://q",
    }
    quote = {"$type": "app.bsky.embed.record", "record": {"uri": "at://q", "cid": "c"}}
    card = {"$type": "app.bsky.embed.external", "external": {"uri": "https://b.example"}}
    assert row_of(operation(record={"embed": quote}))["quote_uri"] == "at://q"
    assert row_of(operation(record={"embed": card}))["links"] == ["https://b.example"]


def test_the_hot_columns_of_a_post_with_little_in_it_and_of_a_delete() -> None:
    little = hot(row_of(operation(record={"text": ""})))
    assert {name: value for name, value in little.items() if value is not None} == {
        "text": "", "hashtags": [], "links": [], "mentions": [],
    }  # fmt: skip
    deleted = row_of(operation(operation="delete", cid=None))
    assert set(hot(deleted).values()) == {None}
    assert deleted["record_json"] is deleted["cid"] is None


def test_the_hot_columns_of_likes_reposts_and_follows() -> None:
    record: dict[str, Any] = {
        "subject": {"uri": f"at://did:plc:b/{POST}/k", "cid": "bafy"},
        "via": {"uri": "at://did:plc:c/app.bsky.feed.repost/k", "cid": "bafy"},
    }
    for collection in ("app.bsky.feed.like", "app.bsky.feed.repost"):
        row = row_of(operation(collection, record))
        assert (row["subject_uri"], row["subject_cid"]) == (f"at://did:plc:b/{POST}/k", "bafy")
        assert row["subject_did"] == "did:plc:b"
        assert row["via_uri"] == "at://did:plc:c/app.bsky.feed.repost/k"
    for uri in ("", "at://", "at://handle.example/a/b", "https://did:plc:b/a", "did:plc:b"):
        row = row_of(operation("app.bsky.feed.like", {"subject": {"uri": uri}}))
        assert (row["subject_uri"], row["subject_did"]) == (uri, None)
    assert row_of(operation("app.bsky.feed.like", {}))["subject_did"] is None
    follow = row_of(operation("app.bsky.graph.follow", {"subject": "did:plc:b"}))
    assert follow["subject"] == "did:plc:b"


ODD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"text": 7}, {"text": None}),
    ({"langs": "en"}, {"langs": None}),
    ({"langs": ["en", 7, None, "pt"]}, {"langs": ["en", "pt"]}),
    ({"tags": [{}, "a"]}, {"hashtags": ["a"]}),
    ({"reply": "yes"}, {"reply_parent": None, "reply_root": None}),
    ({"reply": {"parent": {"uri": 7}, "root": {"uri": "at://r"}}}, {"reply_root": "at://r"}),
    ({"facets": {}}, {"hashtags": [], "links": [], "mentions": []}),
    (
        {
            "facets": [
                None,
                {"features": 7},
                {"features": [7, {"$type": "app.bsky.richtext.facet#tag", "tag": 7}]},
                {"features": [{"$type": "app.bsky.richtext.facet#tag", "tag": "a", "did": 7}]},
            ]
        },
        {"hashtags": ["a"]},
    ),
    ({"embed": []}, {"embed_type": None, "quote_uri": None}),
    ({"embed": {"$type": "x", "external": 7, "record": 7, "media": 7}}, {"embed_type": "x"}),
    ({"createdAt": 7}, {"created_at": None, "created_at_text": None}),
]


@pytest.mark.parametrize(("record", "expected"), ODD)
def test_what_is_of_the_wrong_type_is_left_out_and_the_rest_stays(
    record: dict[str, Any], expected: dict[str, Any]
) -> None:
    row = row_of(operation(record={"text": "stays"} | record))
    assert {name: row[name] for name in expected} == expected
    assert row["text"] == (None if "text" in record else "stays")
    assert msgspec.json.decode(row["record_json"]) == {"text": "stays"} | record


@pytest.mark.parametrize("collection", ["app.bsky.feed.like", "app.bsky.graph.follow", "x.y.z"])
def test_odd_records_of_other_collections(collection: str) -> None:
    row = row_of(operation(collection, {"createdAt": [], "subject": [7], "via": "x"}))
    assert row["created_at_text"] is None
    assert row["record_json"] == '{"createdAt":[],"subject":[7],"via":"x"}'


def test_a_number_beyond_all_floats_costs_the_hot_columns_and_nothing_else() -> None:
    buffer = RowBuffer()
    text = b'{"text":"stays","x":1e999,"langs":7}'
    assert buffer.add_lines([GOOD.replace(b'{"text":"good"}', text)]) == []
    (row,) = buffer.groups["posts", hour_of(T0_US)].table().to_pylist()
    assert row["record_json"].encode() == text


def test_the_strict_and_the_lenient_way_agree_on_records_that_fit() -> None:
    """One bad item sends a record the other way, and must not change what else is read."""
    strict = reader(Post, Post())
    for line in recorded_lines():
        found = msgspec.json.decode(line).get("commit", {})
        if found.get("collection") == POST and "record" in found:
            record = found["record"]
            (plain,) = strict([msgspec.json.encode(record)])
            (odd,) = strict([msgspec.json.encode(record | {"tags": [7]})])
            assert isinstance(plain, Post)
            assert isinstance(odd, Post)
            assert plain.hashtags() == odd.hashtags()
            assert (plain.links(), plain.mentions()) == (odd.links(), odd.mentions())
            assert (plain.quote(), plain.text) == (odd.quote(), odd.text)


def test_a_record_of_a_megabyte() -> None:
    text = "x" * 1_000_000
    row = row_of(operation(record={"text": text}))
    assert row["text"] == text
