"""Wire JSON to Parquet, and reading it. Usage: lake.py [--json FILE] [--rows N] [--rounds N].

Lines of wire JSON, shaped like the public network and sorted by topic as Kafka has them, become one
sorted Parquet file per dataset and hour on the disk, fsync included: by blueflow, which commits
them to a lake with its log, and by three peers, in turn in one process, each with one thread. What
counts is CPU time.

- pyarrow: `json.loads` each line, flatten to the same columns, `Table.from_pylist`, `write_table`.
- Polars: `read_ndjson` with a schema, the same columns but no `record_json`, `write_parquet`: it
  has no way to keep a record's text, so it has less to do and to write.
- DuckDB: `COPY (… read_json …) TO parquet`, all columns.

All use zstd of the same level and row groups of the same size. The peers stop at a line that is
not as expected; ours does not.

`compacted_vs_small_files` asks DuckDB three questions, about the same posts in one file as the
compactor writes it and in 2,000 small ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from datetime import datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from time import process_time, time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

os.environ["POLARS_MAX_THREADS"] = "1"

import anyio
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from blueflow.decode import Decoder, Wanted
from blueflow.events import encode_event
from blueflow.lake.layout import Shard
from blueflow.lake.local import LocalStore
from blueflow.lake.logrecord import Input
from blueflow.lake.parquet import FRESH_LEVEL, ROW_GROUP_ROWS, ParquetFile, encode
from blueflow.lake.rows import RowBuffer
from blueflow.lake.schema import ORDER, SCHEMAS
from blueflow.lake.shard import ShardLog
from blueflow.lake.shardwriter import ShardWriter
from blueflow.metrics import Metrics
from blueflow.records import dataset_of
from blueflow.testing.network import SimulatedNetwork

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Lines: TypeAlias = Mapping[str, Sequence[bytes]]
    Side: TypeAlias = Callable[["Topics", Path], None]

ROWS: Final = 200_000
ROUNDS: Final = 5
SIMULATED_ROWS: Final = 40_000  # simulating costs more than all else here; then names are changed
SMALL_FILES: Final = 2_000
CHECKED_ROWS: Final = 10_000
SKIPPED: Final = frozenset({"accounts"})  # 1 % of the events; the peers' code would double for them
START_US: Final = 1_783_180_860_000_000  # 2026-07-04T16:01:00Z; no run passes the hour
NAMES: Final = re.compile(rb"did:plc:[a-z2-7]{24}|bafyrei[a-z2-7]{52}|\b3[a-z2-7]{12}\b")
QUESTIONS: Final = (
    """select lang, count(*) from (select unnest(langs) as lang from read_parquet($files))
    group by 1 order by all""",
    """select tag, count(*) as n from (select unnest(hashtags) as tag from read_parquet($files))
    group by 1 order by n desc, tag limit 10""",
    "select text from read_parquet($files) where did = $did order by time, seq",
)
ALPHABET: Final = b"abcdefghijklmnopqrstuvwxyz234567"


class Topics:
    """The input: lines by topic in memory, and the same in a file each for those who read files."""

    def __init__(self, lines: Lines, folder: Path) -> None:
        self.lines = lines
        self.rows = sum(map(len, lines.values()))
        self.paths = {dataset: folder / f"{dataset}.jsonl" for dataset in lines}
        for dataset, path in self.paths.items():
            path.write_bytes(b"\n".join(lines[dataset]) + b"\n")


def ours(topics: Topics, folder: Path) -> None:
    """Commit the lines to a new lake, as the archive does with what it reads: log and all."""
    shutil.rmtree(folder, ignore_errors=True)
    anyio.run(_commit, topics, folder)


async def _commit(topics: Topics, folder: Path) -> None:
    store = LocalStore(folder)
    await store.open(create=True)
    log = ShardLog(store, Shard("benchmark"), reads="kafka", instance="one", clock=time)
    writer = ShardWriter(log, Metrics().lake)
    await writer.begin()
    for dataset, lines in topics.lines.items():
        assert not writer.add_lines(f"{dataset}/0", lines, range(len(lines)), Input(len(lines)))
    await writer.flush()
    await writer.close()
    await store.close()


def by_pyarrow(topics: Topics, folder: Path) -> None:
    """Do it the plain way."""
    for dataset, lines in topics.lines.items():
        rows = [_flat(dataset, json.loads(line)) for line in lines]
        table = pa.Table.from_pylist(rows, schema=SCHEMAS[dataset])
        table = table.sort_by([(name, "ascending") for name in ORDER])
        path = folder / f"{dataset}.parquet"
        pq.write_table(
            table,
            path,
            compression="zstd",
            compression_level=FRESH_LEVEL,
            row_group_size=ROW_GROUP_ROWS,
        )
        _sync(path)


def by_polars(topics: Topics, folder: Path) -> None:
    """Do it with expressions; there is no `record_json`."""
    for dataset, lines in topics.lines.items():
        frame = pl.read_ndjson(b"\n".join(lines), schema=_polars_schema(dataset))
        path = folder / f"{dataset}.parquet"
        frame.select(_polars_columns(dataset)).sort(*ORDER).write_parquet(
            path,
            compression="zstd",
            compression_level=FRESH_LEVEL,
            row_group_size=ROW_GROUP_ROWS,
        )
        _sync(path)


def by_duckdb(topics: Topics, folder: Path) -> None:
    """Do it in SQL."""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("set timezone = 'UTC'")
        for dataset, source in topics.paths.items():
            path = folder / f"{dataset}.parquet"
            columns = ", ".join(f"{how} as {name}" for name, how in _sql_columns(dataset).items())
            query = f"""copy (
                select {columns} from (
                    select *, commit.record as r from read_json('{source}', columns = {{
                        did: 'VARCHAR', time_us: 'BIGINT', source: 'VARCHAR', seq: 'BIGINT',
                        op_index: 'INTEGER', commit: 'STRUCT(rev VARCHAR, operation VARCHAR,
                        collection VARCHAR, rkey VARCHAR, cid VARCHAR, record JSON)'
                    }}, format = 'newline_delimited')
                ) order by {", ".join(ORDER)}
            ) to '{path}' (format parquet, compression zstd, compression_level {FRESH_LEVEL},
                row_group_size {ROW_GROUP_ROWS})"""  # noqa: S608 - names of our own
            connection.execute(query)
            _sync(path)


PEERS: Final[Mapping[str, Side]] = {
    "pyarrow": by_pyarrow,
    "polars": by_polars,
    "duckdb": by_duckdb,
}


def main() -> int:
    """Run every comparison and print, or write, what it gave."""
    parser = argparse.ArgumentParser(description="Measure the lake beside its peers.")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = make_lines(chosen.rows)
        check_agreement(lines, folder)
        topics = Topics(lines, folder)
        cases = [*measure_writing(topics, folder, chosen.rounds)]
        cases.append(measure_reading(lines["posts"], folder, chosen.rounds))
    result = {
        "name": "lake",
        "cases": cases,
        "versions": {
            name: version(name) for name in ("blueflow", "pyarrow", "polars", "duckdb", "msgspec")
        },
        "machine": f"Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread",
    }
    text = json.dumps(result, indent=2)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def make_lines(rows: int) -> dict[str, list[bytes]]:
    """Return lines of wire JSON by topic, of an hour of a network shaped like the public one.

    The first are simulated; the others are the same again with other accounts, record keys, CIDs
    and seqs. The texts repeat: no page of a file is so large that it would show.
    """
    decoder = Decoder("relay.example", after=None, wanted=Wanted(()), check="none")
    first: list[tuple[str, bytes]] = []
    for frame in SimulatedNetwork(seed=1, start_us=START_US):
        decoder.feed(frame.data, frame.time_us)
        first += [(dataset_of(event), encode_event(event)) for event in decoder.take().events]
        if len(first) >= min(rows, SIMULATED_ROWS):
            break
    lines: dict[str, list[bytes]] = {name: [] for name in SCHEMAS if name not in SKIPPED}
    found = 0
    for turn in count():
        for dataset, line in first:
            if dataset in SKIPPED:
                continue
            lines[dataset].append(_renamed(line, turn) if turn else line)
            found += 1
            if found >= rows:
                return lines
    return lines


def measure_writing(topics: Topics, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Let all sides take turns; return rows per second, and the bytes of a row."""
    sides: dict[str, Side] = {"ours": ours, **PEERS}
    places = {name: folder / name for name in sides}
    for place in places.values():
        place.mkdir(exist_ok=True)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = process_time()
            side(topics, places[name])
            times[name].append(process_time() - start)
    size = {
        name: sum(path.stat().st_size for path in place.rglob("*.parquet")) / topics.rows
        for name, place in places.items()
    }
    cases = []
    for peer in PEERS:
        ratios = [theirs / mine for mine, theirs in zip(times["ours"], times[peer], strict=True)]
        rates = [topics.rows / median(times[name]) for name in ("ours", peer)]
        cases.append(_case(f"json_to_parquet_vs_{peer}", rates, "rows/s", median(ratios)))
        sizes = [size["ours"], size[peer]]
        cases.append(_case(f"bytes_vs_{peer}", sizes, "bytes/row", sizes[1] / sizes[0]))
    return cases


def measure_reading(posts: Sequence[bytes], folder: Path, rounds: int) -> dict[str, Any]:
    """Ask the same questions of one file and of many; return questions per second."""
    buffer = RowBuffer()
    buffer.add_lines(posts)
    (group,) = buffer.take().values()
    table = group.table()
    one, many = folder / "compacted", folder / "small"
    one.mkdir()
    many.mkdir()
    with ParquetFile(one / "1.parquet", table.schema) as file:
        file.write(table)
    step = -(-table.num_rows // SMALL_FILES)
    for number, start in enumerate(range(0, table.num_rows, step)):
        (many / f"{number}.parquet").write_bytes(encode(table.slice(start, step)))
    did = table["did"][table.num_rows // 2].as_py()
    times: list[tuple[float, float]] = []
    with duckdb.connect(config={"threads": 1}) as connection:
        for turn in range(rounds + 1):
            for question in QUESTIONS:
                given = {"did": did} if "$did" in question else {}
                (mine, compacted), (theirs, small) = (
                    _asked(connection, question, given | {"files": f"{place}/*.parquet"})
                    for place in (one, many)
                )
                assert compacted == small
                if turn:  # the first one warms up
                    times.append((mine, theirs))
    rates = [1 / median(mine for mine, _ in times), 1 / median(theirs for _, theirs in times)]
    ratio = median(theirs / mine for mine, theirs in times)
    return _case("compacted_vs_small_files", rates, "queries/s", ratio)


def check_agreement(lines: Lines, folder: Path) -> None:
    """Stop unless all sides write the same rows: fast but wrong scores nothing."""
    few = {dataset: some[:CHECKED_ROWS] for dataset, some in lines.items()}
    topics = Topics(few, folder)
    expected: dict[str, pa.Table] = {}
    for name, side in {"ours": ours, **PEERS}.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        side(topics, place)
        for dataset, some in few.items():
            (path,) = (*place.glob(f"{dataset}.parquet"), *place.glob(f"fresh/{dataset}/*/*/*/*/*"))
            found = pq.ParquetFile(path).read()
            assert found.num_rows == len(some)
            table = expected.setdefault(dataset, found)
            for column in table.column_names:
                if column in found.column_names:
                    theirs, mine = _plain(found, column), _plain(table, column)
                    assert theirs == mine, (name, dataset, column)
                else:
                    assert (name, column) == ("polars", "record_json")


def _plain(table: Any, column: str) -> list[Any]:
    values: list[Any] = table[column].to_pylist()
    if column == "record_json":
        return [value and json.loads(value) for value in values]
    return values


def _flat(dataset: str, line: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the peer that goes by `json.loads`; for records that are as expected."""
    commit = line["commit"]
    record = commit.get("record")
    row = {
        "source": line["source"],
        "seq": line["seq"],
        "op_index": line["op_index"],
        "did": line["did"],
        "time": line["time_us"],
        "rev": commit["rev"],
        "operation": commit["operation"],
        "collection": commit["collection"],
        "rkey": commit["rkey"],
        "cid": commit.get("cid"),
    }
    if record is None:
        return row
    created = record.get("createdAt")
    row["created_at_text"] = created
    row["created_at"] = created and datetime.fromisoformat(created)
    row["record_json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    if dataset == "posts":
        row |= _flat_post(record)
    elif dataset == "follows":
        row["subject"] = record["subject"]
    elif dataset != "other":
        subject = record["subject"]
        row["subject_uri"], row["subject_cid"] = subject["uri"], subject["cid"]
        row["subject_did"] = subject["uri"].split("/")[2]
        row["via_uri"] = record["via"]["uri"] if "via" in record else None
    return row


def _flat_post(record: dict[str, Any]) -> dict[str, Any]:
    features = [one for facet in record.get("facets", ()) for one in facet["features"]]
    tags = [one["tag"] for one in features if one["$type"] == "app.bsky.richtext.facet#tag"]
    links = [one["uri"] for one in features if one["$type"] == "app.bsky.richtext.facet#link"]
    dids = [one["did"] for one in features if one["$type"] == "app.bsky.richtext.facet#mention"]
    embed, reply = record.get("embed", {}), record.get("reply", {})
    if "external" in embed:
        links.append(embed["external"]["uri"])
    return {
        "text": record["text"],
        "langs": record.get("langs"),
        "reply_parent": reply.get("parent", {}).get("uri"),
        "reply_root": reply.get("root", {}).get("uri"),
        "hashtags": list(dict.fromkeys(tags + record.get("tags", []))),
        "links": list(dict.fromkeys(links)),
        "mentions": list(dict.fromkeys(dids)),
        "embed_type": embed.get("$type"),
        "quote_uri": embed.get("record", {}).get("uri"),
    }


def _polars_schema(dataset: str) -> dict[str, Any]:
    text, ref = pl.String(), pl.Struct({"uri": pl.String(), "cid": pl.String()})
    feature = pl.Struct({"$type": text, "tag": text, "uri": text, "did": text})
    fields: dict[str, Any] = {"createdAt": text}
    if dataset == "posts":
        fields |= {
            "text": text,
            "langs": pl.List(text),
            "tags": pl.List(text),
            "reply": pl.Struct({"parent": ref, "root": ref}),
            "facets": pl.List(pl.Struct({"features": pl.List(feature)})),
            "embed": pl.Struct(
                {"$type": text, "external": pl.Struct({"uri": text}), "record": ref}
            ),
        }
    elif dataset == "follows":
        fields["subject"] = text
    elif dataset != "other":
        fields |= {"subject": ref, "via": ref}
    names = ("rev", "operation", "collection", "rkey", "cid")
    commit = pl.Struct({**dict.fromkeys(names, text), "record": pl.Struct(fields)})
    return {
        "did": text,
        "time_us": pl.Int64(),
        "source": text,
        "seq": pl.Int64(),
        "op_index": pl.Int32(),
        "commit": commit,
    }


def _polars_columns(dataset: str) -> list[pl.Expr]:
    commit = pl.col("commit").struct.field
    record = commit("record").struct.field
    names = ("rev", "operation", "collection", "rkey", "cid")
    created = record("createdAt")
    columns = [
        *map(pl.col, ("source", "seq", "op_index", "did")),
        pl.col("time_us").cast(pl.Datetime("us", "UTC")).alias("time"),
        *map(commit, names),
        created.str.to_datetime("%+", time_unit="us", time_zone="UTC").alias("created_at"),
        created.alias("created_at_text"),
    ]
    if dataset == "posts":
        return columns + _polars_post(record)
    if dataset == "follows":
        return [*columns, record("subject")]
    if dataset == "other":
        return columns
    subject = record("subject").struct.field
    return [
        *columns,
        subject("uri").alias("subject_uri"),
        subject("cid").alias("subject_cid"),
        subject("uri").str.split("/").list.get(2).alias("subject_did"),
        record("via").struct.field("uri").alias("via_uri"),
    ]


def _polars_post(record: Callable[[str], pl.Expr]) -> list[pl.Expr]:
    embed, reply = record("embed").struct.field, record("reply").struct.field
    there = record("text").is_not_null()
    features = record("facets").list.eval(pl.element().struct.field("features").explode())

    def found(kind: str, *more: pl.Expr) -> pl.Expr:
        field = {"tag": "tag", "link": "uri", "mention": "did"}[kind]
        type_ = pl.element().struct.field("$type") == f"app.bsky.richtext.facet#{kind}"
        named = features.list.eval(pl.element().filter(type_).struct.field(field))
        parts = [part.fill_null([]) for part in (named, *more)]
        every = pl.concat_list(parts) if more else parts[0]
        return pl.when(there).then(every.list.drop_nulls().list.unique(maintain_order=True))

    card = embed("external").struct.field("uri")
    return [
        record("text"),
        record("langs"),
        reply("parent").struct.field("uri").alias("reply_parent"),
        reply("root").struct.field("uri").alias("reply_root"),
        found("tag", record("tags")).alias("hashtags"),
        found("link", pl.concat_list(card)).alias("links"),
        found("mention").alias("mentions"),
        embed("$type").alias("embed_type"),
        embed("record").struct.field("uri").alias("quote_uri"),
    ]


def _sql_columns(dataset: str) -> dict[str, str]:
    columns = {name: name for name in ("source", "seq", "op_index", "did")}
    columns["time"] = "make_timestamp(time_us) at time zone 'UTC'"
    for name in ("rev", "operation", "collection", "rkey", "cid"):
        columns[name] = f"commit.{name}"
    columns["created_at"] = "try_cast(r->>'$.createdAt' as timestamptz)"
    columns["created_at_text"] = "r->>'$.createdAt'"
    if dataset == "posts":
        feature = "'$.facets[*].features[*]"

        def found(field: str, more: str) -> str:
            every = f"list_concat(r->>{feature}.{field}', {more})"
            # list_distinct does not keep the order
            first = f"x is not null and list_position({every}, x) = i"
            once = f"list_filter({every}, lambda x, i: {first})"
            return f"case when r is not null then coalesce({once}, []) end"

        columns |= {
            "text": "r->>'$.text'",
            "langs": "cast(r->'$.langs' as varchar[])",
            "reply_parent": "r->>'$.reply.parent.uri'",
            "reply_root": "r->>'$.reply.root.uri'",
            "hashtags": found("tag", "cast(r->'$.tags' as varchar[])"),
            "links": found("uri", "[r->>'$.embed.external.uri']"),
            "mentions": found("did", "null"),
            "embed_type": """r->>'$.embed."$type"'""",
            "quote_uri": "r->>'$.embed.record.uri'",
        }
    elif dataset == "follows":
        columns["subject"] = "r->>'$.subject'"
    elif dataset != "other":
        columns |= {
            "subject_uri": "r->>'$.subject.uri'",
            "subject_cid": "r->>'$.subject.cid'",
            "subject_did": "split_part(r->>'$.subject.uri', '/', 3)",
            "via_uri": "r->>'$.via.uri'",
        }
    return columns | {"record_json": "cast(r as varchar)"}


def _renamed(line: bytes, turn: int) -> bytes:
    """Return a line with other names, and as many seqs and microseconds later."""
    letters = ALPHABET[turn:] + ALPHABET[:turn]
    table = bytes.maketrans(ALPHABET, letters)

    def rename(match: re.Match[bytes]) -> bytes:
        name = match[0]
        kept = 8 if name.startswith(b"did") else 7 if name.startswith(b"baf") else 1
        return name[:kept] + name[kept:].translate(table)

    shift = turn * 10**6
    line = re.sub(
        rb'"(time_us|seq)":(\d+)', lambda m: b'"%s":%d' % (m[1], int(m[2]) + shift), line, count=2
    )
    return NAMES.sub(rename, line)


def _asked(
    connection: duckdb.DuckDBPyConnection, question: str, given: dict[str, str]
) -> tuple[float, list[Any]]:
    start = process_time()
    found = connection.execute(question, given).fetchall()
    return process_time() - start, found


def _case(case: str, sides: Sequence[float], unit: str, ratio: float) -> dict[str, Any]:
    digits = 0 if min(sides) > 1_000 else 1  # noqa: PLR2004 - as many as mean something
    return {
        "case": case,
        "ours": round(sides[0], digits),
        "peer": round(sides[1], digits),
        "unit": unit,
        "ratio": round(ratio, 2),
    }


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
