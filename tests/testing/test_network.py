from __future__ import annotations

import statistics
from hashlib import sha256
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from libipld import decode_car, decode_dag_cbor, decode_dag_cbor_multi, encode_dag_cbor

from blueflow.decode import Decoder, Wanted
from blueflow.events import Position, RepoOp
from blueflow.testing.corpus import Writing
from blueflow.testing.frames import NetworkFrame, read_network_frame, restamp, time_of, time_text
from blueflow.testing.ledger import Ledger
from blueflow.testing.network import FIRST_SEQ, START_US, SimulatedNetwork
from blueflow.testing.repositories import Archive, Change, Repository, did_of, tid
from blueflow.wire.cid import cid_text
from blueflow.wire.mst import build_tree

if TYPE_CHECKING:
    from random import Random

NOW_US = START_US + 3_600_000_000
FRAMES = 1_500


@pytest.fixture(scope="module")
def frames() -> list[NetworkFrame]:
    """The beginning of a network of the usual size."""
    return list(islice(SimulatedNetwork(7), FRAMES))


def test_the_same_seed_gives_the_same_bytes_whoever_asks(frames: list[NetworkFrame]) -> None:
    again = list(islice(SimulatedNetwork(7), 200))
    assert [f.data for f in again] == [f.data for f in frames[:200]]
    other = list(islice(SimulatedNetwork(8), 5))
    assert [f.data for f in other] != [f.data for f in frames[:5]]


def test_one_network_can_be_iterated_twice() -> None:
    network = SimulatedNetwork(3, records=50, accounts=5)
    first, second = iter(network), iter(network)
    assert [next(first).data for _ in range(40)] == [next(second).data for _ in range(40)]


def test_every_block_has_the_hash_in_its_cid_and_the_root_is_the_commit(
    frames: list[NetworkFrame],
) -> None:
    for body in commits(frames):
        header, blocks = decode_car(body["blocks"])
        assert header == {"roots": [body["commit"]], "version": 1}
        for cid, block in raw_blocks(body["blocks"]):
            assert cid == b"\x01\x71\x12\x20" + sha256(block).digest()
        commit = blocks[body["commit"]]
        assert commit["did"] == body["repo"]
        assert commit["rev"] == body["rev"] > body["since"]
        assert (commit["version"], commit["prev"], len(commit["sig"])) == (3, None, 64)
        assert len(body["blocks"]) < 2_000_000


def test_the_tree_in_a_commit_leads_to_its_records_and_no_longer_to_deleted_ones(
    frames: list[NetworkFrame],
) -> None:
    for body in commits(frames):
        _, blocks = decode_car(body["blocks"])
        found = tree_paths(blocks, blocks[body["commit"]]["data"])
        for op in body["ops"]:
            assert found.get(op["path"]) == op["cid"], op
            if op["cid"]:
                assert blocks[op["cid"]]["$type"] == op["path"].partition("/")[0]
            assert ("prev" in op) == (op["action"] != "create")


def test_revs_rise_and_each_commit_goes_on_from_the_one_before(
    frames: list[NetworkFrame],
) -> None:
    heads: dict[str, tuple[str, bytes]] = {}
    linked = 0
    for frame in frames:
        header, body = decode_dag_cbor_multi(frame.data)
        if header["t"] == "#commit":
            _, blocks = decode_car(body["blocks"])
            if body["repo"] in heads:
                assert (body["since"], body["prevData"]) == heads[body["repo"]]
                assert body["rev"] > body["since"]
                linked += 1
            heads[body["repo"]] = body["rev"], blocks[body["commit"]]["data"]
        elif header["t"] == "#sync":
            _, blocks = decode_car(body["blocks"])
            (commit,) = blocks.values()
            assert commit["rev"] == body["rev"]
            heads[body["did"]] = body["rev"], commit["data"]
    assert linked > 20


def test_the_root_of_a_commit_is_that_of_a_tree_built_anew() -> None:
    signed: list[bytes] = []

    def signer(unsigned: bytes) -> bytes:
        signed.append(unsigned)
        return sha256(unsigned).digest() * 2

    archive = Archive(500, START_US)
    repository = Repository(4, 1, archive, signer, START_US)
    content = {key.decode(): value for key, value in archive.tree.items()}
    gone = archive.keys["app.bsky.feed.like"][17].decode()
    record = {"$type": "app.bsky.feed.post", "text": "hello"}
    changes = [
        Change("create", "app.bsky.feed.post", tid(START_US, 4), record),
        Change("delete", "app.bsky.feed.like", gone.partition("/")[2]),
    ]
    commit = repository.commit(changes, START_US)
    content[changes[0].key.decode()] = commit.ops[0]["cid"]
    del content[gone]
    _, blocks = decode_car(commit.blocks)
    assert blocks[commit.cid]["data"] == build_tree(content).cid
    assert commit.previous_data == archive.tree.cid
    # What was signed is the commit without its signature, and the signature is in the block.
    (unsigned,) = signed
    block = blocks[commit.cid]
    assert block.pop("sig") == sha256(unsigned).digest() * 2
    assert decode_dag_cbor(unsigned) == block
    assert encode_dag_cbor(block) == unsigned


def test_frames_look_like_the_recorded_ones(
    frames: list[NetworkFrame], recorded_frames: list[bytes]
) -> None:
    ours, real = (list(map(shape, group)) for group in ([f.data for f in frames], recorded_frames))
    sizes, real_sizes = [s["bytes"] for s in ours], [s["bytes"] for s in real]
    assert statistics.mean(sizes) == pytest.approx(statistics.mean(real_sizes), rel=0.15)
    blocks = [s["blocks"] for s in ours if s["blocks"]]
    assert statistics.mean(blocks) == pytest.approx(
        statistics.mean(s["blocks"] for s in real), rel=0.15
    )
    for kind in ("app.bsky.feed.like", "app.bsky.feed.repost", "app.bsky.feed.post"):
        share = sum(kind in s["kinds"] for s in ours) / len(ours)
        assert share == pytest.approx(sum(kind in s["kinds"] for s in real) / len(real), abs=0.08)
    back = sum(a.time_us > b.time_us for a, b in pairwise(frames)) / len(frames)
    assert 0.3 < back < 0.6  # 45 of 99 in the recorded frames
    assert max(a.time_us - b.time_us for a, b in pairwise(frames)) < 1_000_000


def test_all_kinds_of_events_and_operations_occur(frames: list[NetworkFrame]) -> None:
    events = [event for frame in frames for event in frame.events]
    assert {event.kind for event in events} == {"commit", "identity", "account", "sync"}
    assert {event.operation for event in events} == {"create", "update", "delete", None}
    assert len({event.collection for event in events}) > 9
    assert max(len(frame.events) for frame in frames) > 2
    assert len({frame.events[0].did for frame in frames[:100]}) > 80


def test_posts_are_in_many_languages_with_features_that_point_into_the_text(
    frames: list[NetworkFrame],
) -> None:
    posts = [
        record
        for body in commits(frames)
        for record in decode_car(body["blocks"])[1].values()
        if record.get("$type") == "app.bsky.feed.post"
    ]
    languages = {lang for post in posts for lang in post.get("langs", ())}
    assert {"en", "ja", "pt", "de", "es", "ko", "fr"} <= languages
    assert all(0 < len(post["text"]) <= 300 for post in posts)
    features = [(post, facet) for post in posts for facet in post.get("facets", ())]
    assert features
    for post, facet in features:
        start, end = facet["index"]["byteStart"], facet["index"]["byteEnd"]
        shown = post["text"].encode()[start:end].decode()
        (feature,) = facet["features"]
        assert shown in ("#" + feature.get("tag", ""), feature.get("uri", "")[len("https://") :])
    assert any("reply" in post for post in posts)
    blobs = [post["embed"]["images"] for post in posts if "images" in post.get("embed", ())]
    assert all(len(images[0]["image"]["ref"]) == 36 for images in blobs)
    assert blobs


def test_blueflow_decodes_what_the_network_issues(frames: list[NetworkFrame]) -> None:
    decoder = Decoder("sim", after=Position("sim", FIRST_SEQ - 1), wanted=Wanted(), check="all")
    ledger = Ledger()
    for index, frame in enumerate(frames):
        ledger.add(
            event.entry(index, frame.seq, at, frame.time_us)
            for at, event in enumerate(frame.events)
        )
        assert decoder.feed(frame.data, NOW_US) is None
    batch = decoder.take()
    assert batch.rejected == ()
    verdict = ledger.compare(batch.events)
    assert verdict.ok, str(verdict)
    assert verdict.delivered == len(ledger) > FRAMES
    times = {entry.seq: entry.time_us for entry in ledger}
    assert all(event.time_us == times[event.seq] for event in batch.events)
    assert all(event.cid for event in batch.events if type(event) is RepoOp and event.record)


def test_seqs_begin_where_asked_and_may_have_gaps() -> None:
    network = SimulatedNetwork(1, first_seq=40_000_000_000, records=20, accounts=9, gap_share=0.2)
    seqs = [frame.seq for frame in islice(network, 100)]
    assert seqs[0] >= 40_000_000_000
    assert {1, 2} < {b - a for a, b in pairwise(seqs)} <= {1, 2, 3, 4}


def test_simulated_time_passes_at_the_rate_asked_for() -> None:
    start_us = START_US + 86_400_000_000
    network = SimulatedNetwork(1, start_us=start_us, rate=10.0, records=20, accounts=9)
    frame = next(islice(network, 600, None))
    assert abs(frame.time_us - start_us - 60_000_000) < 1_000_000
    assert read_network_frame(frame.data).time_us == frame.time_us


def test_posts_come_from_the_writer_that_was_given() -> None:
    class Loud:
        def write(self, random: Random, *, author: int, language: str, time_us: int) -> Writing:
            return Writing("EXTRA", [language], [])

    frames = list(islice(SimulatedNetwork(1, records=20, accounts=9, writer=Loud()), 120))
    texts = {
        record["text"]
        for body in commits(frames)
        for record in decode_car(body["blocks"])[1].values()
        if record.get("$type") == "app.bsky.feed.post"
    }
    assert texts == {"EXTRA"}


def test_a_frame_stamped_anew_differs_in_nothing_else(frames: list[NetworkFrame]) -> None:
    for frame in frames[:300]:
        header, body = decode_dag_cbor_multi(frame.data)
        for seq in (5, 2**32, 2**53):
            stamped = restamp(frame.data, seq, START_US + 123_000)
            body |= {"seq": seq, "time": "2026-07-04T14:38:08.123Z"}
            assert stamped == encode_dag_cbor(header) + encode_dag_cbor(body)


def test_recorded_frames_are_described_as_jetstream_did(recorded_frames: list[bytes]) -> None:
    described = [read_network_frame(data) for data in recorded_frames]
    assert sum(len(frame.events) for frame in described) == 102
    assert described[0].seq == 31_527_015_322
    assert time_text(described[0].time_us) == "2026-07-04T14:38:07.517Z"
    assert time_of("2026-07-04T16:38:07.517+02:00") == described[0].time_us


def test_tids_sort_by_time_and_fit_the_recorded_form() -> None:
    tids = [tid(START_US + number, number % 1024) for number in range(3)]
    assert tids == sorted(tids)
    assert tids[0].startswith("3mptby")  # as the recorded ones of the same second
    assert all(len(text) == 13 for text in tids)
    assert did_of(1, 2) != did_of(2, 1)


def commits(frames: list[NetworkFrame]) -> list[dict[str, Any]]:
    parts = [decode_dag_cbor_multi(frame.data) for frame in frames]
    return [body for header, body in parts if header["t"] == "#commit"]


def raw_blocks(car: bytes) -> list[tuple[bytes, bytes]]:
    """Read the sections of a CAR without the code under test."""
    position, blocks = 1 + car[0], []
    while position < len(car):
        size = shift = 0
        while True:
            byte = car[position]
            position += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        blocks.append((car[position : position + 36], car[position + 36 : position + size]))
        position += size
    return blocks


def tree_paths(blocks: dict[bytes, Any], cid: bytes | None) -> dict[str, bytes]:
    """Read what of a tree is there, as the specification words it."""
    if cid is None or cid not in blocks:
        return {}
    node, previous = blocks[cid], b""
    found = tree_paths(blocks, node["l"])
    for entry in node["e"]:
        previous = previous[: entry["p"]] + entry["k"]
        found[previous.decode()] = entry["v"]
        found |= tree_paths(blocks, entry["t"])
    return found


def shape(frame: bytes) -> dict[str, Any]:
    header, body = decode_dag_cbor_multi(frame)
    ops = body.get("ops", ())
    return {
        "bytes": len(frame),
        "blocks": len(decode_car(body["blocks"])[1]) if header["t"] == "#commit" else 0,
        "kinds": {op["path"].partition("/")[0] for op in ops if op["action"] == "create"},
        "cids": [cid_text(op["cid"]) for op in ops if op["cid"]],
    }
