from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libipld import decode_car, decode_cid, decode_dag_cbor, encode_dag_cbor

from blueflow.wire.cid import cid_text, dag_cbor_cid
from blueflow.wire.mst import Tree, build, build_tree, common_prefix, key_height

if TYPE_CHECKING:
    from pathlib import Path

VALUE = dag_cbor_cid(b"a record")
OTHER = dag_cbor_cid(b"another record")
paths = st.from_regex(r"[a-d]{1,2}/[a-f0-9]{1,3}", fullmatch=True)
contents = st.dictionaries(paths, st.sampled_from([VALUE, OTHER]), max_size=40)


def test_key_heights_are_those_of_the_interop_vectors(data_folder: Path) -> None:
    vectors = read(data_folder / "interop/mst/key_heights.json")
    assert {v["key"]: key_height(v["key"].encode()) for v in vectors} == {
        v["key"]: v["height"] for v in vectors
    }


def test_example_keys_stand_at_the_height_in_their_name(data_folder: Path) -> None:
    keys = (data_folder / "interop/mst/example_keys.txt").read_text().split()
    assert len(keys) == 156
    assert [key_height(key.encode()) for key in keys] == [int(key[1]) for key in keys]


def test_common_prefixes_are_those_of_the_interop_vectors(data_folder: Path) -> None:
    for vector in read(data_folder / "interop/mst/common_prefix.json"):
        left, right = vector["left"].encode(), vector["right"].encode()
        assert common_prefix(left, right) == vector["len"], vector


@given(st.binary(max_size=12), st.binary(max_size=4), st.binary(max_size=4))
def test_a_common_prefix_ends_at_the_first_difference(
    start: bytes, left: bytes, right: bytes
) -> None:
    one, other = start + left, start + right
    size = common_prefix(one, other)
    assert one[:size] == other[:size]
    assert one[size : size + 1] != other[size : size + 1] or one[size:] == other[size:] == b""


def test_commit_proofs_are_those_of_the_interop_vectors(data_folder: Path) -> None:
    vectors = read(data_folder / "interop/firehose/commit-proof-fixtures.json")
    for vector in vectors:
        value = decode_link(vector["leafValue"])
        before = build_tree(dict.fromkeys(vector["keys"], value))
        after = before
        for key in vector["adds"]:
            after = after.put(key.encode(), value)
        for key in vector["dels"]:
            after = after.delete(key.encode())
        assert cid_text(before.cid) == vector["rootBeforeCommit"], vector["comment"]
        assert cid_text(after.cid) == vector["rootAfterCommit"], vector["comment"]
        proof = after.proof([key.encode() for key in vector["adds"] + vector["dels"]])
        assert set(vector["blocksInProof"]) <= set(map(cid_text, proof)), vector["comment"]
    assert len(vectors) == 6


@pytest.mark.parametrize("name", ["jimcalabro", "greenground.repo", "tiny", "empty"])
def test_trees_of_real_repositories_are_rebuilt_from_their_records(
    data_folder: Path, name: str
) -> None:
    header, blocks = decode_car((data_folder / f"cars/{name}.car").read_bytes())
    data = blocks[header["roots"][0]]["data"]
    content = dict(walk(blocks, data, b""))
    root, nodes = build(content)
    assert root == data
    assert set(nodes) <= set(blocks)


def test_the_empty_tree_is_one_empty_node() -> None:
    root, blocks = build({})
    assert [decode_dag_cbor(block) for block in blocks.values()] == [{"e": [], "l": None}]
    assert cid_text(root) == "bafyreie5737gdxlw5i64vzichcalba3z2v5n6icifvx5xytvske7mr3hpm"


@given(contents, st.lists(st.tuples(paths, st.sampled_from([VALUE, OTHER, None])), max_size=12))
def test_a_changed_tree_equals_one_built_anew(
    content: dict[str, bytes], changes: list[tuple[str, bytes | None]]
) -> None:
    tree = build_tree(content)
    for path, value in changes:
        if value is not None:
            tree, content[path] = tree.put(path.encode(), value), value
        elif path in content:
            tree = tree.delete(path.encode())
            del content[path]
        else:
            with pytest.raises(KeyError):
                tree.delete(path.encode())
    anew = build_tree(content)
    assert tree.cid == anew.cid
    assert tree.blocks() == anew.blocks()
    assert dict(tree.items()) == {path.encode(): cid for path, cid in content.items()}


@given(contents, st.dictionaries(paths, st.sampled_from([VALUE, OTHER]), min_size=1, max_size=5))
def test_a_proof_holds_every_new_node_and_reaches_every_key(
    content: dict[str, bytes], changes: dict[str, bytes]
) -> None:
    before = after = build_tree(content)
    for path, value in changes.items():
        key = path.encode()
        after = after.delete(key) if before.get(key) == value else after.put(key, value)
    proof = after.proof([path.encode() for path in changes])
    new = after.blocks().keys() - before.blocks().keys()
    assert new <= proof.keys() <= after.blocks().keys()
    reached = dict(walk({cid: decode_dag_cbor(block) for cid, block in proof.items()}, after.cid))
    for path in changes:
        assert reached.get(path) == after.get(path.encode())


def test_long_keys_and_wide_nodes_are_encoded_as_dag_cbor_wants() -> None:
    paths = [f"a.b/{'x' * 500}{number:05d}" for number in range(500)]
    content = {path: VALUE for path in paths if key_height(path.encode()) == 0}
    root, blocks = build(content)
    nodes = {cid: decode_dag_cbor(block) for cid, block in blocks.items()}
    assert {cid: encode_dag_cbor(node) for cid, node in nodes.items()} == blocks
    assert dict(walk(nodes, root)) == content
    assert [len(node["e"]) for node in nodes.values()] == [len(content)]
    assert len(content) > 255


def test_an_empty_tree_has_nothing() -> None:
    assert Tree().get(b"a/b") is None
    assert list(Tree().items()) == []


def walk(
    blocks: dict[bytes, Any], cid: bytes | None, previous: bytes = b""
) -> list[tuple[str, bytes]]:
    """Read a tree as the specification words it, without the code under test."""
    if cid is None or cid not in blocks:
        return []
    node, found = blocks[cid], []
    found += walk(blocks, node["l"])
    for entry in node["e"]:
        previous = previous[: entry["p"]] + entry["k"]
        found.append((previous.decode(), entry["v"]))
        found += walk(blocks, entry["t"])
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def decode_link(text: str) -> bytes:
    return decode_dag_cbor(b"\xd8\x2a\x58\x25\x00" + bytes_of(text))


def bytes_of(text: str) -> bytes:
    decoded = decode_cid(text)
    return bytes.fromhex("01711220") + decoded["hash"]["digest"]
