"""Which data set an event belongs to: a topic, a folder of files, a part of the lake. A core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blueflow.events import RepoOp

if TYPE_CHECKING:
    from blueflow.events import Event

DATASETS: Final = ("posts", "likes", "reposts", "follows", "other", "accounts")

_BY_COLLECTION: Final = {
    "app.bsky.feed.post": "posts",
    "app.bsky.feed.like": "likes",
    "app.bsky.feed.repost": "reposts",
    "app.bsky.graph.follow": "follows",
}


def dataset_of(event: Event) -> str:
    """Return the event's data set, one of `DATASETS`.

    `accounts` takes identity, account and sync events, `other` every collection without a data set
    of its own.
    """
    return dataset_of_collection(event.collection) if type(event) is RepoOp else "accounts"


def dataset_of_collection(collection: str) -> str:
    """Return the data set of the operations on a collection."""
    return _BY_COLLECTION.get(collection, "other")
