"""Raw frames to wire JSON, beside the atproto SDK and libipld. Usage: decode.py [--json FILE].

Both sides run in turn in one process on the frames recorded from the public relay. The SDK's side
is its documented path (the firehose example of its repository): frame, typed message, CAR, and for
each created record its URI, CID and typed model; then the model's JSON, because ours ends there
too. It compares no hashes. Ours also gives updates, deletes and records without a lexicon.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import warnings
from collections import deque
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any, NamedTuple

import libipld
import msgspec

from blueflow.decode import Decoder, Wanted
from blueflow.events import encode_lines
from blueflow.wire.recording import Unpacker

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the SDK's own, about its own names
    from atproto import CAR, AtUri, models, parse_subscribe_repos_message
    from atproto_client.models.utils import get_model_as_json, is_record_type
    from atproto_subscription.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from blueflow.decode import Check

FRAMES = Path(__file__).parents[1] / "tests" / "data" / "firehose" / "frames.bin"
NOW_US = 1_783_176_000_000_000  # shortly behind the recording, as a live reader's clock is
POST = "app.bsky.feed.post"
ROUNDS = 25
TURN_S = 0.03  # of each side in each round: as long, so that other load meets both alike


class Comparison(NamedTuple):
    """Two ways to do the same with all frames."""

    case: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    note: str


def main() -> int:
    """Run every comparison and print, or write, what it gave."""
    parser = argparse.ArgumentParser(description="Measure decoding beside its peers.")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    frames = Unpacker(FRAMES.name).feed(FRAMES.read_bytes())
    check_agreement(frames)
    # The SDK's models are a million objects: our dictionaries would pay for looking at them.
    gc.collect()
    gc.freeze()
    result = {
        "name": "decode",
        "cases": [measure(one, len(frames), chosen.rounds) for one in comparisons(frames)],
        "versions": {
            name: version(name)
            for name in ("blueflow", "atproto", "libipld", "msgspec", "pydantic")
        },
        "machine": f"Python {platform.python_version()}, {platform.machine()}, {cpu_count()} cores",
    }
    text = json.dumps(result, indent=2)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def comparisons(frames: Sequence[bytes]) -> list[Comparison]:
    """Return what is compared; the goals stand in `render.py`."""
    unhashed, hashed = blueflow(frames, check="none"), blueflow(frames, check="all")
    return [
        Comparison(
            "json_unhashed_vs_sdk",
            unhashed,
            lambda: deque(sdk(frames), maxlen=0),
            "no side compares hashes",
        ),
        Comparison(
            "json_hashed_vs_sdk",
            hashed,
            lambda: deque(sdk(frames), maxlen=0),
            "ours compares every block with its hash, the peer none",
        ),
        Comparison(
            "posts_only_vs_sdk",
            blueflow(frames, check="used", collections=[POST]),
            lambda: deque(sdk(frames, only=POST), maxlen=0),
            "ours compares the posts' blocks with their hashes, the peer none",
        ),
        Comparison(
            "json_unhashed_vs_libipld_car",
            unhashed,
            lambda: libipld_car(frames),
            "the peer only decodes frame and CAR: no events, no JSON",
        ),
    ]


def measure(one: Comparison, frames: int, rounds: int) -> dict[str, Any]:
    """Let both sides take turns; return frames per second and the median of the rounds' ratios."""
    sides = (one.ours, one.peer)
    passes = [max(1, round(TURN_S / _pass_s(side, 1))) for side in sides]
    times = [
        tuple(_pass_s(side, count) for side, count in zip(sides, passes, strict=True))
        for _ in range(rounds)
    ]
    return {
        "case": one.case,
        "ours": round(frames / median(ours for ours, _ in times)),
        "peer": round(frames / median(peer for _, peer in times)),
        "unit": "frames/s",
        "ratio": round(median(peer / ours for ours, peer in times), 2),
        "note": one.note,
    }


def _pass_s(run: Callable[[], object], passes: int) -> float:
    """Return the CPU seconds of one pass over all frames: what others do meanwhile is not in it."""
    start = process_time()
    for _ in range(passes):
        run()
    return (process_time() - start) / passes


def blueflow(
    frames: Sequence[bytes], *, check: Check, collections: Sequence[str] = ()
) -> Callable[[], bytes]:
    """Return what gives all frames' events as lines of wire JSON, with one decoder as in life."""
    decoder = Decoder("relay", after=None, wanted=Wanted(collections), check=check)

    def run() -> bytes:
        decoder.new_epoch("relay")  # else the same frames again would be duplicates
        for frame in frames:
            decoder.feed(frame, NOW_US)
        return encode_lines(decoder.take().events)

    return run


def sdk(frames: Iterable[bytes], *, only: str | None = None) -> Iterable[tuple[str, str, str]]:
    """Yield URI, CID and JSON of each created record that the SDK has a model of."""
    for frame in frames:
        commit = parse_subscribe_repos_message(Frame.from_bytes(frame))
        if not isinstance(commit, models.ComAtprotoSyncSubscribeRepos.Commit):
            continue
        car = CAR.from_bytes(commit.blocks)
        for op in commit.ops:
            uri = AtUri.from_str(f"at://{commit.repo}/{op.path}")
            if op.action != "create" or not op.cid:
                continue
            text, cid = str(uri), str(op.cid)
            block = car.blocks.get(op.cid)
            if not block:
                continue
            record = models.get_or_create(block, strict=False)
            if only is not None and uri.collection != only:
                continue
            if record is None or not is_record_type(record, uri.collection):
                continue
            yield text, cid, get_model_as_json(record)


def libipld_car(frames: Iterable[bytes]) -> None:
    """Decode frames and all their blocks."""
    for frame in frames:
        _, body = libipld.decode_dag_cbor_multi(frame)
        libipld.decode_car(body["blocks"])


def check_agreement(frames: Sequence[bytes]) -> None:
    """Stop unless both sides give the same records: fast but wrong scores nothing."""
    for collections in ([], [POST]):
        theirs = {
            (uri, cid): msgspec.json.decode(record)
            for uri, cid, record in sdk(frames, only=collections[0] if collections else None)
        }
        checks: tuple[Check, ...] = ("none", "used", "all")
        for check in checks:
            lines = map(
                msgspec.json.decode,
                blueflow(frames, check=check, collections=collections)().splitlines(),
            )
            mine = {
                (
                    f"at://{line['did']}/{line['commit']['collection']}/{line['commit']['rkey']}",
                    line["commit"]["cid"],
                ): line["commit"]["record"]
                for line in lines
                if line["commit"]["operation"] == "create"
            }
            assert theirs
            for key, record in theirs.items():
                assert _same(mine[key], record), (key, mine[key], record)


def _same(mine: Any, theirs: Any) -> bool:
    """Compare two JSON values; the SDK writes a `$type` into objects that come without one."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return theirs.keys() - mine.keys() <= {"$type"} and all(
            _same(value, theirs.get(key)) for key, value in mine.items()
        )
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return bool(mine == theirs)


if __name__ == "__main__":
    sys.exit(main())
