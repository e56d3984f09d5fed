"""Records as the SDK's models: real ones typed, odd ones as they are, a clear error without it."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from blueflow.errors import MissingExtraError
from blueflow.events import RepoOp, decode_line

if TYPE_CHECKING:
    from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from atproto_client.models.dot_dict import DotDict
    from atproto_client.models.utils import get_model_as_dict


def op(record: dict[str, Any] | None) -> RepoOp:
    return RepoOp("relay", 1, 0, "did:plc:a", 1, "3lc", "create", "a.b.c", "3ld", "bafy", record)


def test_recorded_records_become_models_that_say_the_same(data_folder: Path) -> None:
    typed = untyped = 0
    for line in (data_folder / "firehose" / "jetstream_v1.jsonl").read_bytes().splitlines():
        event = decode_line(line, "relay", 1)
        assert isinstance(event, RepoOp)
        model = event.model()
        if event.record is None:
            assert model is None
        elif isinstance(model, DotDict):
            assert model.to_dict() == event.record
            untyped += 1
        else:
            assert model.py_type == event.record["$type"]
            assert model.created_at == event.record["createdAt"]
            typed += 1
    assert (typed, untyped) == (98, 1)


@pytest.mark.parametrize(
    "record",
    [
        {"$type": "com.example.own", "a": [1]},
        {"$type": "app.bsky.feed.post", "text": 5},
        {"$type": 5},
        {"no": "type"},
    ],
    ids=str,
)
def test_a_record_without_or_against_a_lexicon_comes_as_it_is(record: dict[str, Any]) -> None:
    model = op(record).model()
    assert isinstance(model, DotDict)
    assert get_model_as_dict(model) == record


def test_the_record_itself_is_not_touched() -> None:
    record = {"$type": "app.bsky.feed.post", "text": "a", "createdAt": "2026-07-04T14:38:07.517Z"}
    before = msgspec.json.encode(record)
    op(record).model()
    assert msgspec.json.encode(record) == before


def test_without_the_sdk_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "atproto", None)
    with pytest.raises(
        MissingExtraError, match=r'BF-003: typed models need "blueflow\[identity\]"'
    ):
        op({"$type": "a"}).model()
