"""From decoded rows to Arrow columns, a few thousand rows at a time. A core.

Every column is built by itself from a plain list: that is twice as fast as a row at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pyarrow as pa

from blueflow.events import Account, Identity, Sync, kind_of
from blueflow.lake.createdat import parse_all
from blueflow.lake.hot import About, Follow, Other, Post, Ref, Reply, reader
from blueflow.lake.schema import BINARY, SCHEMAS, TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from blueflow.lake.hot import Hot
    from blueflow.lake.lines import AccountEvent, Envelope

    Columns: TypeAlias = dict[str, Iterable[Any]]

_REF: Final = Ref()
_REPLY: Final = Reply()


def operation_batch(dataset: str, rows: Sequence[Envelope], records: Sequence[bytes]) -> Any:
    """Return a record batch of operations.

    Args:
        dataset: all rows are of.
        rows: in any order.
        records: the JSON text of the record of each, an object; empty where there is none.
    """
    commits: list[Any] = [row.commit for row in rows]
    hots = _READERS[dataset](records)
    columns: Columns = {
        "source": [row.source for row in rows],
        "seq": [row.seq for row in rows],
        "op_index": [row.op_index for row in rows],
        "did": [row.did for row in rows],
        "time": [row.time_us for row in rows],
        "rev": [one.rev for one in commits],
        "operation": [one.operation for one in commits],
        "collection": [one.collection for one in commits],
        "rkey": [one.rkey for one in commits],
        "cid": [one.cid for one in commits],
        "created_at_text": [one.created for one in hots],
    }
    columns |= _OF_HOT[dataset](hots)
    arrays = _arrays(dataset, columns)
    arrays["created_at"] = parse_all(arrays["created_at_text"])
    arrays["record_json"] = pa.array([record or None for record in records], BINARY).view(
        TEXT
    )  # known to be UTF-8
    return _batch(dataset, arrays)


def account_batch(events: Sequence[AccountEvent]) -> Any:
    """Return a record batch of account-level events, in any order."""
    columns: Columns = {
        "source": [event.source for event in events],
        "seq": [event.seq for event in events],
        "op_index": [event.op_index for event in events],
        "did": [event.did for event in events],
        "time": [event.time_us for event in events],
        "kind": [kind_of(event) for event in events],
        "time_text": [event.time for event in events],
        "handle": [event.handle if type(event) is Identity else None for event in events],
        "active": [event.active if type(event) is Account else None for event in events],
        "status": [event.status if type(event) is Account else None for event in events],
        "rev": [event.rev if type(event) is Sync else None for event in events],
        "blocks": [event.blocks if type(event) is Sync else None for event in events],
    }
    return _batch("accounts", _arrays("accounts", columns))


def _arrays(dataset: str, columns: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    schema = SCHEMAS[dataset]
    return {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}


def _batch(dataset: str, arrays: Mapping[str, Any]) -> Any:
    schema = SCHEMAS[dataset]
    return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)


def _of_posts(posts: Sequence[Post]) -> Columns:
    replies = [one.reply or _REPLY for one in posts]
    return {
        "text": [one.text for one in posts],
        "langs": [one.langs for one in posts],
        "reply_parent": [(one.parent or _REF).uri for one in replies],
        "reply_root": [(one.root or _REF).uri for one in replies],
        "hashtags": [None if one is EMPTY["posts"] else one.hashtags() for one in posts],
        "links": [None if one is EMPTY["posts"] else one.links() for one in posts],
        "mentions": [None if one is EMPTY["posts"] else one.mentions() for one in posts],
        "embed_type": [one.embed and one.embed.type for one in posts],
        "quote_uri": [one.embed and one.quote() for one in posts],
    }


def _of_abouts(abouts: Sequence[About]) -> Columns:
    subjects = [one.subject or _REF for one in abouts]
    return {
        "subject_uri": [one.uri for one in subjects],
        "subject_cid": [one.cid for one in subjects],
        "subject_did": [
            one.uri.split("/", 3)[2] if one.uri and one.uri[:9] == "at://did:" else None
            for one in subjects
        ],
        "via_uri": [(one.via or _REF).uri for one in abouts],
    }


def _of_follows(follows: Sequence[Follow]) -> Columns:
    return {"subject": [one.subject for one in follows]}


def _of_others(others: Sequence[Other]) -> Columns:
    del others
    return {}


# What a record of each dataset is read as, and what stands where there is none.
FORMS: Final[Mapping[str, type[Hot]]] = {
    "posts": Post,
    "likes": About,
    "reposts": About,
    "follows": Follow,
    "other": Other,
}
EMPTY: Final[Mapping[str, Hot]] = {dataset: form() for dataset, form in FORMS.items()}

_READERS: Final = {dataset: reader(form, EMPTY[dataset]) for dataset, form in FORMS.items()}
_OF_HOT: Final[Mapping[str, Callable[[Any], Columns]]] = {
    "posts": _of_posts,
    "likes": _of_abouts,
    "reposts": _of_abouts,
    "follows": _of_follows,
    "other": _of_others,
}
