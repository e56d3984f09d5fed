"""Simulated repositories: a signed commit for each change, with the blocks that prove it."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec
from libipld import encode_cid, encode_dag_cbor

from blueflow.wire.cid import RAW_PREFIX, dag_cbor_cid
from blueflow.wire.mst import build_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_BASE32 = "234567abcdefghijklmnopqrstuvwxyz"
_PAIRS = tuple(a + b for a in _BASE32 for b in _BASE32)  # 10 bits each
_CAR_START = b"\x3a\xa2\x65roots\x81\xd8\x2a\x58\x25\x00"
_CAR_END = b"\x67version\x01"
_YEAR_US = 365 * 86_400 * 1_000_000
_ARCHIVE_MIX = (  # collection, share of an account's records
    ("app.bsky.feed.like", 0.56),
    ("app.bsky.feed.post", 0.15),
    ("app.bsky.graph.follow", 0.13),
    ("app.bsky.feed.repost", 0.13),
    ("app.bsky.feed.threadgate", 0.02),
    ("app.bsky.graph.block", 0.01),
)


class Change(msgspec.Struct, frozen=True):
    """One operation to commit; `record` is None for a delete."""

    operation: str
    collection: str
    rkey: str
    record: dict[str, Any] | None = None

    @property
    def key(self) -> bytes:
        """The path as the tree has it."""
        return f"{self.collection}/{self.rkey}".encode()


class Commit(msgspec.Struct, frozen=True):
    """A commit as it goes into #commit: CIDs as bytes, `blocks` a CAR."""

    rev: str
    since: str
    cid: bytes
    previous_data: bytes
    ops: list[dict[str, Any]]
    blocks: bytes


class Archive:
    """What accounts wrote before the simulation begins; trees are immutable, so many share one.

    Args:
        records: how many; the depth of the tree and so the size of a commit depend on it.
        until_us: the newest record is from before this time, the oldest up to a year older.
    """

    def __init__(self, records: int, until_us: int) -> None:
        self.keys: dict[str, list[bytes]] = {}
        content: dict[str, bytes] = {"app.bsky.actor.profile/self": _archived_cid("profile", 0)}
        for collection, share in _ARCHIVE_MIX:
            count = int(records * share)
            step = _YEAR_US // (count + 1)
            paths = [
                f"{collection}/{tid(until_us - _YEAR_US + number * step, number * 37)}"
                for number in range(1, count + 1)
            ]
            content |= {path: _archived_cid(collection, at) for at, path in enumerate(paths)}
            self.keys[collection] = [path.encode() for path in paths]
        self.tree = build_tree(content)


class Repository:
    """One account's records as a tree, and the chain of its commits.

    Args:
        number: of the account; decides the DID and the clock id in its TIDs.
        seed: two networks have the same accounts only with the same seed.
        archive: what it holds in the beginning.
        signer: gives the 64 bytes of the signature over the unsigned commit.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        archive: Archive,
        signer: Callable[[bytes], bytes],
        started_us: int,
    ) -> None:
        self.number = number
        self.did = did_of(seed, number)
        self.archive = archive
        self.active = True
        self.tree = archive.tree
        self._signer = signer
        self._clock_id = number * 7919 % 1024
        self._clock_us = started_us
        self.rev = tid(started_us - 1 - number * 61, self._clock_id)

    def next_tid(self, time_us: int) -> str:
        """Return a TID above every one before: at `time_us`, or just after the newest."""
        self._clock_us = max(self._clock_us + 1, time_us)
        return tid(self._clock_us, self._clock_id)

    def commit(self, changes: Sequence[Change], time_us: int) -> Commit:
        """Apply the changes and sign the result."""
        before, since = self.tree, self.rev
        tree, ops, records = before, [], []
        for change in changes:
            key = change.key
            op: dict[str, Any] = {"action": change.operation, "path": key.decode(), "cid": None}
            previous = tree.get(key)
            if previous is not None:
                op["prev"] = previous
            if change.record is None:
                tree = tree.delete(key)
            else:
                block = encode_dag_cbor(change.record)
                op["cid"] = cid = dag_cbor_cid(block)
                records.append((cid, block))
                tree = tree.put(key, cid)
            ops.append(op)
        self.tree, self.rev = tree, self.next_tid(time_us)
        cid, block = self.head()
        proof = tree.proof([change.key for change in changes])
        blocks = car(cid, [*proof.items(), *records, (cid, block)])
        return Commit(self.rev, since, cid, before.cid, ops, blocks)

    def head(self) -> tuple[bytes, bytes]:
        """Return the newest commit's CID and block."""
        unsigned = self._commit_block(b"")
        block = self._commit_block(self._signer(unsigned))
        return dag_cbor_cid(block), block

    def _commit_block(self, signature: bytes) -> bytes:
        # By hand, because libipld's encoder takes a signature that looks like a CID for a link.
        fields = [b"\x63did", encode_dag_cbor(self.did), b"\x63rev", encode_dag_cbor(self.rev)]
        if signature:
            fields += [b"\x63sig\x58", bytes((len(signature),)), signature]
        link = b"\xd8\x2a\x58\x25\x00" + self.tree.cid
        count = 0xA6 if signature else 0xA5
        rest = b"\x64data" + link + b"\x64prev\xf6\x67version\x03"
        return bytes((count,)) + b"".join(fields) + rest


def did_of(seed: int, number: int) -> str:
    """Return the DID of an account: 24 base32 characters that depend on both numbers."""
    digest = sha256(f"blueflow account {seed} {number}".encode()).digest()
    bits = int.from_bytes(digest[:15], "big")
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    return "did:plc:" + "".join(alphabet[bits >> shift & 31] for shift in range(0, 120, 5))


def tid(time_us: int, clock_id: int) -> str:
    """Return a TID: 53 bits of microseconds and 10 bits of clock id, sortable as text.

    Source: https://atproto.com/specs/tid
    """
    bits = time_us << 10 | clock_id & 1023
    return _BASE32[bits >> 60] + "".join(
        _PAIRS[bits >> at & 1023] for at in (50, 40, 30, 20, 10, 0)
    )


def car(root: bytes, blocks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a CAR v1 with one root."""
    parts = [_CAR_START, root, _CAR_END]
    for cid, block in blocks:
        parts += (_varint(len(cid) + len(block)), cid, block)
    return b"".join(parts)


def made_up_cid(*values: object) -> str:
    """Return the CID, as text, of a record that exists only by name."""
    return encode_cid(dag_cbor_cid(repr(values).encode()))


def blob(*values: object, mime_type: str = "image/jpeg", size: int = 120_000) -> dict[str, Any]:
    """Return a reference to a blob that exists only by name."""
    ref = RAW_PREFIX + sha256(repr(values).encode()).digest()
    return {"$type": "blob", "ref": ref, "mimeType": mime_type, "size": size}


def _archived_cid(collection: str, number: int) -> bytes:
    return dag_cbor_cid(f"{collection} {number} of the archive".encode())


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
