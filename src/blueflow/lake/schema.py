"""The columns of the lake: one declaration per dataset, and the page that describes them.

`python -m blueflow.lake.schema` prints `docs/lake-schema.md`.

A reader may rely on what stands here. Columns are only ever added, and a column that is added may
be null, so that older and newer files are read together by name.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from blueflow.records import DATASETS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION: Final = 1  # of the columns; it rises when one is added
VERSION_KEY: Final = b"blueflow.lake.schema"
DATASET_KEY: Final = b"blueflow.lake.dataset"
ORDER: Final = ("time", "source", "seq", "op_index")  # how the rows of a file are sorted

TEXT: Final = pa.string()
TEXTS: Final = pa.list_(
    pa.field("element", TEXT)
)  # as Parquet calls it, so reading changes nothing
TIME: Final = pa.timestamp("us", tz="UTC")
INT64: Final = pa.int64()
INT32: Final = pa.int32()
BOOL: Final = pa.bool_()
BINARY: Final = pa.binary()

_TYPE_NAMES: Final = {
    TEXT: "string",
    TEXTS: "list of string",
    TIME: "timestamp, µs, UTC",
    INT64: "int64",
    INT32: "int32",
    BOOL: "bool",
    BINARY: "binary",
}


class Column(NamedTuple):
    """One column.

    Attributes:
        name: in every file.
        type: the Arrow type.
        meaning: one sentence for readers.
        origin: where in wire JSON the value stands; `record` is short for `commit.record`.
        nullable: False where every row has a value. A column that is added later is nullable.
    """

    name: str
    type: Any
    meaning: str
    origin: str
    nullable: bool = True


_IDENTITY: Final = (
    Column(
        "source",
        TEXT,
        "The relay's name; `host#2` is the same relay after it began to count anew.",
        "`source`",
        nullable=False,
    ),
    Column("seq", INT64, "The relay's number of the frame.", "`seq`", nullable=False),
    Column(
        "op_index",
        INT32,
        "Place of the operation in its commit, from 0; (source, seq, op_index) is unique.",
        "`op_index`",
        nullable=False,
    ),
    Column("did", TEXT, "The account: who wrote it.", "`did`", nullable=False),
    Column("time", TIME, "The relay's time of the event.", "`time_us`", nullable=False),
)

_OPERATION: Final = (
    *_IDENTITY,
    Column("rev", TEXT, "The repository's revision, a TID.", "`commit.rev`", nullable=False),
    Column("operation", TEXT, "create, update or delete.", "`commit.operation`", nullable=False),
    Column(
        "collection",
        TEXT,
        "NSID of the collection, such as `app.bsky.feed.post`.",
        "`commit.collection`",
        nullable=False,
    ),
    Column("rkey", TEXT, "Key of the record in its collection.", "`commit.rkey`", nullable=False),
    Column("cid", TEXT, "CID of the record; null for a delete.", "`commit.cid`"),
    Column(
        "created_at",
        TIME,
        "When the author says it was written; null where that is no time from year 1 to 9999.",
        "`record.createdAt`",
    ),
    Column("created_at_text", TEXT, "The author's words for it.", "`record.createdAt`"),
)

_RECORD: Final = Column(
    "record_json", TEXT, "The whole record as JSON text; null for a delete.", "`commit.record`"
)

_SUBJECT: Final = (
    Column("subject_uri", TEXT, "AT URI of what it is about.", "`record.subject.uri`"),
    Column("subject_cid", TEXT, "CID of what it is about.", "`record.subject.cid`"),
    Column(
        "subject_did",
        TEXT,
        "The account of what it is about.",
        "`record.subject.uri`, the part behind `at://`",
    ),
    Column("via_uri", TEXT, "AT URI of the repost that led to it.", "`record.via.uri`"),
)

COLUMNS: Final[Mapping[str, tuple[Column, ...]]] = {
    "posts": (
        *_OPERATION,
        Column("text", TEXT, "What is written.", "`record.text`"),
        Column("langs", TEXTS, "The languages that the author names.", "`record.langs`"),
        Column(
            "reply_parent", TEXT, "AT URI of the post that it answers.", "`record.reply.parent.uri`"
        ),
        Column(
            "reply_root",
            TEXT,
            "AT URI of the post that began the thread.",
            "`record.reply.root.uri`",
        ),
        Column(
            "hashtags",
            TEXTS,
            "Hashtags without `#`, as written, each once; null for a delete.",
            "`record.facets` of tags, then `record.tags`",
        ),
        Column(
            "links",
            TEXTS,
            "Addresses of web pages, each once; null for a delete.",
            "`record.facets` of links, then `record.embed.external.uri`",
        ),
        Column(
            "mentions",
            TEXTS,
            "DIDs of accounts that are mentioned, each once; null for a delete.",
            "`record.facets` of mentions",
        ),
        Column(
            "embed_type",
            TEXT,
            "What is embedded, such as `app.bsky.embed.images`.",
            "`record.embed.$type`",
        ),
        Column(
            "quote_uri",
            TEXT,
            "AT URI of the record that is quoted.",
            "`record.embed.record.uri`, or `record.embed.record.record.uri` beside media",
        ),
        _RECORD,
    ),
    "likes": (*_OPERATION, *_SUBJECT, _RECORD),
    "reposts": (*_OPERATION, *_SUBJECT, _RECORD),
    "follows": (
        *_OPERATION,
        Column("subject", TEXT, "DID of the account that is followed.", "`record.subject`"),
        _RECORD,
    ),
    "other": (*_OPERATION, _RECORD),
    "accounts": (
        *_IDENTITY,
        Column("kind", TEXT, "identity, account or sync.", "`kind`", nullable=False),
        Column("time_text", TEXT, "`time` as it was sent.", "`time` of the body", nullable=False),
        Column("handle", TEXT, "identity: the handle, where it was sent.", "`identity.handle`"),
        Column("active", BOOL, "account: whether it is active.", "`account.active`"),
        Column(
            "status",
            TEXT,
            "account: takendown, suspended, deleted, deactivated, desynchronized, throttled, or a "
            "newer word.",
            "`account.status`",
        ),
        Column("rev", TEXT, "sync: the repository's revision.", "`sync.rev`"),
        Column("blocks", BINARY, "sync: a CAR with the signed commit.", "`sync.blocks`"),
    ),
}

_ABOUT: Final = {
    "posts": "Operations on `app.bsky.feed.post`.",
    "likes": "Operations on `app.bsky.feed.like`.",
    "reposts": "Operations on `app.bsky.feed.repost`.",
    "follows": "Operations on `app.bsky.graph.follow`.",
    "other": "Operations on every other collection.",
    "accounts": "Changes of accounts: identity, hosting status, and jumps of a repository.",
}

_HEAD: Final = """# Columns of the lake

Made by `python -m blueflow.lake.schema`; do not edit.

The lake has a folder per dataset, and in it files by the hour of the event, UTC:
`<root>/<dataset>/year=YYYY/month=MM/day=DD/hour=HH/*.parquet`. The hour's four numbers are columns
too for readers that know Hive partitions. The rows of a file are sorted by time, source, seq and
op_index.

- `time` is the relay's and says in which hour a row lies. `created_at` is what the author claims:
  it may lie years off, so filter by `time` first. An odd `time` before 1970 or after 9999 lies in
  the first or last hour there is.
- A record may be anything, whatever its lexicon says. Where a value is of the wrong type, its
  column is null, and an item of the wrong type is left out of a list; `record_json` always has the
  record as its author wrote it.
- Columns are only ever added, and those that are added may be null. Read older and newer files
  together by name: `union_by_name = true` in DuckDB, `missing_columns = "insert"` in Polars,
  `blueflow.lake.schema.SCHEMAS[dataset]` for an Arrow dataset.
"""


def _schema(dataset: str) -> Any:
    fields = [pa.field(one.name, one.type, nullable=one.nullable) for one in COLUMNS[dataset]]
    return pa.schema(
        fields, metadata={VERSION_KEY: str(VERSION).encode(), DATASET_KEY: dataset.encode()}
    )


# The Arrow schema of each dataset; the metadata has its name and VERSION.
SCHEMAS: Final[Mapping[str, Any]] = {dataset: _schema(dataset) for dataset in DATASETS}


def render() -> str:
    """Return the page that describes the columns."""
    return "\n".join([_HEAD, *map(_section, DATASETS)])


def _section(dataset: str) -> str:
    return "\n".join(
        [
            f"## {dataset}",
            "",
            _ABOUT[dataset],
            "",
            "| column | type | null | meaning | from |",
            "|---|---|---|---|---|",
            *map(_row, COLUMNS[dataset]),
            "",
        ]
    )


def _row(one: Column) -> str:
    null = "yes" if one.nullable else "no"
    return f"| `{one.name}` | {_TYPE_NAMES[one.type]} | {null} | {one.meaning} | {one.origin} |"


def main(arguments: Sequence[str]) -> int:
    """Print the page; return the exit code."""
    if arguments:
        sys.stderr.write("usage: python -m blueflow.lake.schema\n")
        return 2
    sys.stdout.write(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
