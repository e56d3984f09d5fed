"""Frames and CARs for tests, sound by default, each part open to be spoilt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.corpus.dagcbor import Link, cid_of, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DID = "did:plc:44ybard66vv44zksje25o7dz"
REV = "3lcdwt2zvvc2g"
TIME = "2026-07-04T14:38:07.517Z"
TIME_US = 1_783_175_887_517_000
NOW_US = TIME_US + 1_000_000
POST = "app.bsky.feed.post"
LIKE = "app.bsky.feed.like"


def varint(number: int) -> bytes:
    """Return an unsigned LEB128 number."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def section(cid: bytes, block: bytes) -> bytes:
    """Return one section of a CAR."""
    return varint(len(cid) + len(block)) + cid + block


def car(roots: Sequence[bytes], blocks: Iterable[bytes | tuple[bytes, bytes]]) -> bytes:
    """Return a CAR; a block may come with a CID that is not its own."""
    header = encode({"roots": [Link(root) for root in roots], "version": 1})
    pairs = [(cid_of(one), one) if isinstance(one, bytes) else one for one in blocks]
    return varint(len(header)) + header + b"".join(section(*pair) for pair in pairs)


def frame(t: str, body: Any, *, op: int = 1) -> bytes:
    """Return a frame."""
    return encode({"t": t, "op": op}) + encode(body)


def error_frame(body: Any) -> bytes:
    """Return an error frame."""
    return encode({"op": -1}) + encode(body)


def post(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """Return a post's record."""
    return {"$type": POST, "text": text, "createdAt": TIME, "langs": ["en"]} | fields


def commit_body(
    seq: int = 1,
    records: Mapping[str, Any] | None = None,
    *,
    deletes: Sequence[str] = (),
    time: Any = TIME,
    did: str = DID,
    action: str = "create",
    extra_blocks: Sequence[bytes | tuple[bytes, bytes]] = (),
    **fields: Any,
) -> dict[str, Any]:
    """Return the body of a #commit.

    Args:
        seq: its place in the stream.
        records: by path; a value, or the bytes of a block.
        deletes: paths.
        time: the relay's.
        did: the repository.
        action: of the records.
        extra_blocks: for the CAR, in front of the records.
        **fields: replace what is there.
    """
    records = {f"{POST}/3lcdwt2zvvc2h": post()} if records is None else records
    blocks = {
        path: value if isinstance(value, bytes) else encode(value)
        for path, value in records.items()
    }
    # Not a real tree, but it has the links in front of the blocks as a real one does.
    node = encode({"e": [{"v": Link(cid_of(block))} for block in blocks.values()], "l": None})
    root = encode({"did": did, "rev": REV, "data": Link(cid_of(node)), "version": 3, "prev": None})
    ops: list[dict[str, Any]] = [
        {"action": action, "path": path, "cid": Link(cid_of(block))}
        for path, block in blocks.items()
    ]
    ops += [{"action": "delete", "path": path, "cid": None} for path in deletes]
    return {
        "seq": seq,
        "repo": did,
        "commit": Link(cid_of(root)),
        "rev": REV,
        "since": "3lcdwt2zvvc2f",
        "blocks": car([cid_of(root)], [root, node, *extra_blocks, *blocks.values()]),
        "ops": ops,
        "blobs": [],
        "time": time,
        "tooBig": False,
        "rebase": False,
        "prevData": Link(cid_of(node)),
    } | fields


def commit(seq: int = 1, records: Mapping[str, Any] | None = None, **fields: Any) -> bytes:
    """Return a #commit frame; see `commit_body`."""
    return frame("#commit", commit_body(seq, records, **fields))


def identity(seq: int = 1, **fields: Any) -> bytes:
    """Return an #identity frame."""
    return frame("#identity", {"seq": seq, "did": DID, "time": TIME} | fields)


def account(seq: int = 1, **fields: Any) -> bytes:
    """Return an #account frame."""
    return frame("#account", {"seq": seq, "did": DID, "time": TIME, "active": True} | fields)
