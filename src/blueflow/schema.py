"""JSON Schemas of what is written: wire JSON, and in Kafka the cursors and the dead letters.

`python -m blueflow.schema` prints the schema of an event, `python -m blueflow.schema cursor` and
`… dead-letter` the others. `docs/schema/` has them all.

They say what a reader may rely on. A field may be added, so readers pass over fields that they do
not know, and the schemas allow them.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from blueflow.kafka.cursorrecord import CursorValue

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
NAMES: Final = ("event", "cursor", "dead-letter")

_USAGE = f"usage: python -m blueflow.schema [{'|'.join(NAMES)}]"

Did: TypeAlias = Annotated[str, Meta(description="The account: the key of the Kafka record.")]
TimeUs: TypeAlias = Annotated[
    int,
    Meta(
        description="The relay's time, microseconds since 1970, UTC. It does not rise with seq.",
        ge=-(2**63),
        le=2**63 - 1,
    ),
]
SourceName: TypeAlias = Annotated[
    str,
    Meta(description="The relay's name; host#2 is the same relay after it began to count anew."),
]
Seq: TypeAlias = Annotated[
    int,
    Meta(description="The relay's number of the frame; 64 bits.", ge=0, le=2**63 - 1),
]
OpIndex: TypeAlias = Annotated[
    int, Meta(description="Place in its commit, from 0. (source, seq, op_index) is unique.", ge=0)
]
Time: TypeAlias = Annotated[str, Meta(description="The relay's time as it was sent.")]
Rev: TypeAlias = Annotated[str, Meta(description="The repository's revision, a TID.")]


class Commit(Struct):
    """One operation on one record. A delete has neither record nor cid."""

    rev: Rev
    operation: Literal["create", "update", "delete"]
    collection: Annotated[str, Meta(description="NSID, such as app.bsky.feed.post.")]
    rkey: Annotated[str, Meta(description="Key of the record in its collection.")]
    record: (
        Annotated[
            dict[str, Any],
            Meta(description="The record in data-model JSON, as its author wrote it."),
        ]
        | UnsetType
    ) = UNSET
    cid: Annotated[str, Meta(description="CID of the record.")] | UnsetType = UNSET


class Identity(Struct):
    """Handle, signing key or PDS may have changed."""

    did: Did
    seq: Seq
    time: Time
    handle: str | UnsetType = UNSET


class Account(Struct):
    """The hosting status changed."""

    did: Did
    seq: Seq
    time: Time
    active: bool
    status: (
        Annotated[
            str,
            Meta(
                description="takendown, suspended, deleted, deactivated, desynchronized, "
                "throttled, or a newer word."
            ),
        ]
        | UnsetType
    ) = UNSET


class Bytes(Struct):
    """Bytes in data-model JSON: base64 without padding."""

    bytes: str = msgspec.field(name="$bytes")


class Sync(Struct):
    """The repository jumped to a new state whose records were not all on the stream."""

    did: Did
    seq: Seq
    time: Time
    rev: Rev
    blocks: Bytes


class _Line(Struct):
    did: Did
    time_us: TimeUs
    source: SourceName
    seq: Seq
    op_index: OpIndex


class CommitLine(_Line):
    """One operation of a commit."""

    kind: Literal["commit"]
    commit: Commit


class IdentityLine(_Line):
    """A change of identity."""

    kind: Literal["identity"]
    identity: Identity


class AccountLine(_Line):
    """A change of hosting status."""

    kind: Literal["account"]
    account: Account


class SyncLine(_Line):
    """A jump of a repository."""

    kind: Literal["sync"]
    sync: Sync


class DeadLetter(Struct):
    """What stands for an event that Kafka did not take."""

    reason: Annotated[
        Literal["too_large", "refused"],
        Meta(description="too_large: above 8 MiB; refused: by the broker, see detail."),
    ]
    detail: Annotated[str, Meta(description="For people.")]
    at_us: Annotated[
        int, Meta(description="When it was given up, microseconds since 1970, UTC.", ge=0)
    ]
    topic: Annotated[str, Meta(description="Where the event would be.")]
    partition: Annotated[int, Meta(ge=0)]
    source: SourceName
    seq: Seq
    op_index: OpIndex
    uri: Annotated[str, Meta(description="Where to fetch the record, or the account, from.")]
    bytes: Annotated[int, Meta(description="Of the event as wire JSON.", ge=0)]
    event: Annotated[
        dict[str, Any] | None, Meta(description="The event; null when it is above 256 KiB.")
    ]


_LINES = (CommitLine, IdentityLine, AccountLine, SyncLine)
_DELETE = {"properties": {"operation": {"const": "delete"}}}
_CURSOR_FIELDS = {
    "source": "Whose seqs these are.",
    "seq": "Everything up to it is durable; null while there is no position.",
    "time_us": "Newest relay time up to seq, microseconds since 1970, UTC; 0 is unknown.",
    "instance": "The process that wrote it: <host>-<pid>-<random>.<claim>.",
    "commit": "Number of the transaction within the process; absent: its claim of the pipeline.",
    "simulated": "Whether the data is made up; absent means false.",
}


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of one of `NAMES`."""
    described: dict[str, Any] = {"$schema": DIALECT, "$id": f"urn:blueflow:schema:{name}"}
    if name == "event":
        return described | _event()
    return described | _flat(CursorValue if name == "cursor" else DeadLetter)


def encode(name: str) -> bytes:
    """Return that schema as a file has it."""
    return msgspec.json.format(msgspec.json.encode(schema(name)), indent=2) + b"\n"


def _event() -> dict[str, Any]:
    references, definitions = msgspec.json.schema_components(_LINES, ref_template="#/$defs/{name}")
    neither = {"anyOf": [{"required": ["record"]}, {"required": ["cid"]}]}
    definitions["Commit"] |= {
        "if": _DELETE,
        "then": {"not": neither},
        "else": {"required": ["record", "cid"]},
    }
    return {
        "title": "Event",
        "description": "One event as wire JSON: Jetstream's line with source, seq and op_index.",
        "oneOf": list(references),
        "$defs": definitions,
    }


def _flat(struct: type[Struct]) -> dict[str, Any]:
    (_, definitions) = msgspec.json.schema_components([struct])
    found: dict[str, Any] = definitions[struct.__name__]
    for field, description in _CURSOR_FIELDS.items() if struct is CursorValue else ():
        found["properties"][field]["description"] = description
    return found


def main(arguments: list[str]) -> int:
    """Print one schema; return the exit code."""
    name, *more = arguments or ["event"]
    if more or name not in NAMES:
        sys.stderr.write(f"{_USAGE}\n")
        return 2
    sys.stdout.write(encode(name).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
