"""What is left of deleted, changed and removed things, against an oracle that tries every pair."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lake.folderstore import FolderStore
from tests.lake.lakes import H16, WrittenLake, account, at, post

from blueflow.lake import duck
from blueflow.lake.live import living, outdated, removed_accounts
from blueflow.lake.reading import Lake
from blueflow.lake.scan import between
from blueflow.lake.schema import SCHEMAS
from blueflow.lake.span import Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DIDS = ("did:plc:a", "did:plc:b")
OPERATIONS = ("create", "update", "delete")
STATUSES = ("takendown", "suspended", "deleted", "deactivated", "desynchronized", "newer", None)
REMOVED = {"takendown", "suspended", "deleted", "deactivated", "newer", None}

minutes = st.integers(0, 239)
operations = st.tuples(
    minutes,
    st.sampled_from(DIDS),
    st.sampled_from(("1", "2")),
    st.sampled_from(OPERATIONS),
    st.integers(0, 20),  # rev: the same one where two relays tell the same commit
    st.sampled_from(("relay", "other")),
)
statuses = st.tuples(minutes, st.sampled_from(DIDS), st.booleans(), st.sampled_from(STATUSES))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    posts = [
        post(
            at(0, minute), seq, did=did, rkey=rkey, operation=operation, rev=f"{rev:013d}",
            source=source,
        )
        for seq, (minute, did, rkey, operation, rev, source) in enumerate(
            draw(st.lists(operations, min_size=1, max_size=25))
        )
    ]  # fmt: skip
    accounts = [
        account(at(0, minute), 100 + seq, active=active, status=None if active else status, did=did)
        for seq, (minute, did, active, status) in enumerate(draw(st.lists(statuses, max_size=6)))
    ]
    return posts, accounts


def oracle(
    posts: Sequence[dict[str, Any]], accounts: Sequence[dict[str, Any]], start: int, end: int
) -> list[tuple[str, int]]:
    """Return what is left of the posts in [start, end), by looking at every pair."""

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["rev"], row["op_index"], row["time"], row["source"], row["seq"]

    def newer(a: dict[str, Any], b: dict[str, Any]) -> bool:
        same = (a["did"], a["rkey"]) == (b["did"], b["rkey"])
        return same and a["time"] >= start and order(a) > order(b)

    def removed(row: dict[str, Any]) -> bool:
        mine = [one for one in accounts if one["did"] == row["did"] and one["time"] >= start]
        if not mine:
            return False
        last = max(mine, key=lambda one: (one["time"], one["source"], one["seq"]))
        gone = not last["active"] and last["status"] in REMOVED
        return gone and last["time"] >= row["time"]

    return sorted(
        (row["source"], row["seq"])
        for row in posts
        if start <= row["time"] < end
        and row["operation"] != "delete"
        and not any(newer(other, row) for other in posts)
        and not removed(row)
    )


@settings(max_examples=100)  # each compiles SQL
@given(histories(), minutes, minutes, st.lists(st.integers(0, 24), max_size=5))
def test_arrow_and_sql_leave_what_the_oracle_leaves(
    history: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    first: int,
    second: int,
    twice: list[int],
) -> None:
    """Some events are there twice or more often, as when two pipelines wrote the same source."""
    posts, accounts = history
    start, end = sorted((at(0, first), at(0, second)))
    expected = oracle(posts, accounts, start, end)
    posts = [*posts, *(posts[at] for at in twice if at < len(posts))]
    since = pads.dataset(table("posts", [row for row in posts if row["time"] >= start]))
    of_accounts = table("accounts", [row for row in accounts if row["time"] >= start])
    rows = since.filter(between(Span(start, end)))
    removed = removed_accounts(pads.dataset(of_accounts))
    left = living(rows, outdated(since), removed, SCHEMAS["posts"])
    assert left.schema == SCHEMAS["posts"]
    assert sorted(zip(left["source"].to_pylist(), left["seq"].to_pylist(), strict=True)) == expected
    with duck.connect() as connection:
        connection.register("posts since", since)
        connection.register("accounts since", of_accounts)
        duck.add_removed(connection, "accounts since")
        duck.add_living(connection, "posts", "posts since", Span(start, end))
        sql = "SELECT source, seq FROM posts ORDER BY ALL"
        assert connection.execute(sql).fetchall() == expected


@pytest.mark.parametrize("compacted", [False, True])
def test_a_lake_gives_the_same_by_every_way(tmp_path: Path, *, compacted: bool) -> None:
    written = WrittenLake(tmp_path)
    random = Random(1)
    posts = [
        post(
            at(0, random.randrange(240)), seq, did=random.choice(DIDS),
            rkey=str(random.randrange(30)), operation=random.choice(OPERATIONS),
            rev=f"{random.randrange(90):013d}",
        )
        for seq in range(120)
    ]  # fmt: skip
    accounts = [account(at(1), 500, active=False, status="deleted", did="did:plc:b")]
    written.publish("posts", posts)
    written.publish("accounts", accounts)
    if compacted:
        for hour in range(H16, H16 + 4):
            written.compact("posts", hour)
    expected = oracle(posts, accounts, at(0, 30), at(3, 10))
    assert len(expected) > 5
    with Lake(FolderStore(tmp_path)) as lake:
        span = ("2026-07-04T16:30", "2026-07-04T19:10")
        found = lake.scan("posts", *span, live=True).to_table()
        assert sorted(zip(found["source"].to_pylist(), found["seq"].to_pylist(), strict=True)) == (
            expected
        )
        assert found.schema == SCHEMAS["posts"]
        sql = "SELECT source, seq FROM posts ORDER BY ALL"
        assert lake.duckdb(sql, *span, live=True).fetchall() == expected
        assert lake.duckdb_connection(*span, live=True).execute(sql).fetchall() == expected
        frame = lake.polars("posts", *span, live=True).select("source", "seq").collect()
        assert sorted(frame.rows()) == expected


def test_everything_is_the_default_and_columns_may_be_chosen(tmp_path: Path) -> None:
    written = WrittenLake(tmp_path)
    written.publish(
        "posts",
        [
            post(at(0), 1, rkey="kept"),
            post(at(0), 2, rkey="changed"),
            post(at(1), 3, rkey="changed", operation="update"),
            post(at(0), 4, rkey="deleted"),
            post(at(2), 5, rkey="deleted", operation="delete"),
        ],
    )
    with Lake(FolderStore(tmp_path)) as lake:
        rows = lake.scan("posts", columns=["text", "langs"], live=True)
        assert rows.schema.names == ["text", "langs", "time"]
        assert rows.to_table()["text"].to_pylist() == ["post 1", "post 3"]
        assert rows.to_table()["langs"].to_pylist() == [["en"], ["en"]]
        # The update comes behind the end, and still the older version is not the newest one.
        before = lake.scan("posts", None, "2026-07-04T17", columns=["text"], live=True)
        assert before.to_table()["text"].to_pylist() == ["post 1"]


def test_accounts_are_events_and_stay_as_they_are(tmp_path: Path) -> None:
    written = WrittenLake(tmp_path)
    written.publish("accounts", [account(at(0), 1, active=False, status="deleted")])
    with Lake(FolderStore(tmp_path)) as lake:
        assert lake.scan("accounts", live=True).count_rows() == 1
        assert lake.duckdb("SELECT count(*) FROM accounts", live=True).fetchall() == [(1,)]
        assert lake.polars("accounts", live=True).collect().height == 1
        assert lake.scan("posts", live=True).count_rows() == 0


def test_other_collections_have_rkeys_of_their_own(tmp_path: Path) -> None:
    written = WrittenLake(tmp_path)
    profile, list_ = "app.bsky.actor.profile", "app.bsky.graph.list"
    rows = [
        post(at(0), 1, rkey="self", collection=profile),
        post(at(0), 2, rkey="self", collection=list_),
        post(at(1), 3, rkey="self", collection=list_, operation="delete"),
    ]
    written.publish("other", [{k: v for k, v in row.items() if k != "text"} for row in rows])
    with Lake(FolderStore(tmp_path)) as lake:
        assert lake.scan("other", live=True).to_table()["seq"].to_pylist() == [1]
        sql = "SELECT seq FROM other"
        assert lake.duckdb(sql, live=True).fetchall() == [(1,)]


def table(dataset: str, rows: Sequence[dict[str, Any]]) -> Any:
    schema = SCHEMAS[dataset]
    return pa.table({one.name: [row.get(one.name) for row in rows] for one in schema}, schema)
