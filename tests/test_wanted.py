"""The filter: what it names, and that names of strangers do not fill the memory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow import wanted
from blueflow.wanted import Wanted

DID = "did:plc:44ybard66vv44zksje25o7dz"
names = st.sampled_from(
    ["app", "app.bsky", "app.bsky.feed", "app.bsky.feed.post", "a.b.c", "", "é"]
)


@pytest.mark.parametrize(
    ("pattern", "name", "verdict"),
    [
        ("app.bsky.feed.post", "app.bsky.feed.post", True),
        ("app.bsky.feed.post", "app.bsky.feed.posts", False),
        ("app.bsky.feed.post", "app.bsky.feed", False),
        ("app.bsky.feed.*", "app.bsky.feed.post", True),
        ("app.bsky.feed.*", "app.bsky.feed", False),
        ("app.bsky.feed.*", "app.bsky.feedback.post", False),
        ("app.bsky.*", "app.bsky.feed.post", True),
    ],
)
def test_patterns(pattern: str, name: str, verdict: bool) -> None:  # noqa: FBT001
    one = Wanted([pattern])
    for _ in range(2):  # the second answer is a remembered one
        assert one.collection(name) is verdict
        assert one.path(f"{name}/rkey".encode(), DID.encode()) is verdict


def test_nothing_named_is_everything() -> None:
    one = Wanted()
    assert one.everything
    assert one.account_events
    assert one.collection("anything")
    assert one.did("did:plc:x")


@given(st.lists(names), names, st.sampled_from([(), (DID,), ("did:plc:other",)]))
def test_a_path_in_a_frame_is_judged_as_its_text(
    patterns: list[str], name: str, dids: tuple[str, ...]
) -> None:
    one = Wanted(patterns, dids)
    body = {"repo": DID, "ops": [{"path": f"{name}/rkey"}]}
    verdict = one.collection(name) and one.did(DID)
    assert one.path(f"{name}/rkey".encode(), DID.encode()) == verdict
    assert one.none_of(body) == (not verdict)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ops": None},
        {"ops": 5},
        {"ops": [None]},
        {"ops": ["text"]},
        {"ops": [{}]},
        {"ops": [{"path": 5}]},
        {"ops": [{"path": b"a/b"}]},
        {"ops": [], "tooBig": True},
    ],
    ids=str,
)
def test_a_commit_that_cannot_be_judged_is_left_to_the_reader(body: dict[str, Any]) -> None:
    assert not Wanted(["a.b.c"]).none_of(body)


def test_names_of_strangers_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "_VERDICTS_MAX", 10)
    one = Wanted(["app.bsky.*"])
    for number in range(100):
        assert not one.collection(f"x.{number}")
        assert not one.path(f"y.{number}/a".encode(), b"")
        assert one.collection("app.bsky." + "x" * (1000 + number))
    assert len(one.collections) <= 10
    assert len(one._collections_in_frames) <= 10
    assert all(len(name) <= 317 for name in one.collections)
