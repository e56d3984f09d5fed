"""How frames are spoilt. Pure: the same frame and event give the same damage."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
from libipld import decode_dag_cbor_multi, encode_dag_cbor

from blueflow.testing.frames import TEXT, encode_frame, time_text, websocket_message
from blueflow.testing.repositories import car
from blueflow.wire.car import read_varint
from blueflow.wire.cid import CID_BYTES, dag_cbor_cid

if TYPE_CHECKING:
    from collections.abc import Callable

    from blueflow.testing.faultplan import Fault
    from blueflow.testing.frames import NetworkFrame
    from blueflow.testing.ledger import Delivery, Entry

_NOISE_BYTES = 200
_BREAK = b"\xff"  # CBOR's "break", which no frame can begin with
_LINK = b"\xd8\x2a\x58\x25\x00"


def spoil_event(
    fault: Fault, frame: NetworkFrame, event: int, entries: list[Entry]
) -> tuple[bytes, list[Entry]] | None:
    """Return the message instead of a frame and the ledger entries; None when it cannot be spoilt.

    `fault` is one of scope "stream".
    """
    if fault.kind.endswith("-stays"):
        number = fault.number if fault.kind == "oversize-stays" else 0
        message = spoil_message(fault.kind.removesuffix("-stays"), frame, event, number)
        return message, [_spoilt(entry, fault, entry.op_index) for entry in entries]
    spoilt: tuple[bytes, int] | None = None
    match fault.kind:
        case "corrupt-node":
            spoilt = corrupt_node(frame.data)
        case "corrupt-record":
            spoilt = corrupt_record(frame.data)
        case "missing-record":
            spoilt = missing_record(frame.data)
        case "bomb":
            spoilt = bomb(frame.data, int(fault.number))
    if spoilt is None:
        return None
    data, operation = spoilt
    return websocket_message(data), [_spoilt(entry, fault, operation) for entry in entries]


def spoil_message(kind: str, frame: NetworkFrame, event: int, number: float) -> bytes:
    """Return the message instead of a frame: `kind` is garbage, truncated, oversize or text."""
    match kind:
        case "garbage":
            return websocket_message(noise(event))
        case "truncated":
            return websocket_message(frame.data[: len(frame.data) // 2])
        case "oversize":
            return websocket_message(oversize(frame.seq, frame.time_us, int(number)))
    return websocket_message(f'{{"text instead of": {frame.seq}}}'.encode(), TEXT)


def noise(event: int) -> bytes:
    """Return bytes that are no CBOR."""
    return _BREAK + Random(f"blueflow noise {event}").randbytes(_NOISE_BYTES)


def oversize(seq: int, time_us: int, size: int) -> bytes:
    """Return a frame of at least `size` bytes that is well-formed but for its size."""
    body = {
        "seq": seq,
        "time": time_text(time_us),
        "did": "did:plc:oversize",
        "blocks": bytes(size),
    }
    return encode_frame("#sync", body | {"rev": "2222222222222"})


def unknown_type(t: str, seq: int, time_us: int) -> bytes:
    """Return a frame of a type that is newer than its reader."""
    return encode_frame(t, {"seq": seq, "time": time_text(time_us), "news": ["of", "tomorrow"]})


def unknown_op(op: int) -> bytes:
    """Return a frame of another op than 1 and -1."""
    return encode_dag_cbor({"op": op}) + encode_dag_cbor({"news": "of tomorrow"})


def corrupt_record(frame: bytes) -> tuple[bytes, int] | None:
    """Flip a bit that only the record's hash can tell; return the frame and the operation.

    None: the frame has no record, so another one has to suffer.
    """
    return _with_record(frame, lambda cid, block: (cid, block[:-1] + bytes((block[-1] ^ 1,))))


def missing_record(frame: bytes) -> tuple[bytes, int] | None:
    """Leave a record's block out; return the frame and the operation."""
    return _with_record(frame, lambda _cid, _block: None)


def bomb(frame: bytes, depth: int) -> tuple[bytes, int] | None:
    """Put a record of `depth` nested lists into the commit; return the frame and the operation.

    Its block, CID and operation agree, but the tree still names the record it replaced.
    """
    block = b"\xa1\x61x" + b"\x81" * depth + b"\x80"
    return _with_record(frame, lambda _cid, _block: (dag_cbor_cid(block), block))


def corrupt_node(frame: bytes) -> tuple[bytes, int] | None:
    """Flip a bit in a link of a tree node, such that only the node's hash can tell.

    No operation is lost (-1), as the records themselves are whole.
    """
    header, body = decode_dag_cbor_multi(frame)
    if header["t"] != "#commit":
        return None
    root, sections = _sections(body["blocks"])
    records = {op["cid"] for op in body["ops"]} | {root}
    for at, (cid, block) in enumerate(sections):
        if cid not in records and _LINK in block:
            bit = block.index(_LINK) + len(_LINK) + 10  # within the digest
            sections[at] = cid, block[:bit] + bytes((block[bit] ^ 1,)) + block[bit + 1 :]
            return encode_frame("#commit", body | {"blocks": car(root, sections)}), -1
    return None


def _with_record(
    frame: bytes, change: Callable[[bytes, bytes], tuple[bytes, bytes] | None]
) -> tuple[bytes, int] | None:
    header, body = decode_dag_cbor_multi(frame)
    if header["t"] != "#commit":
        return None
    ops: list[dict[str, Any]] = body["ops"]
    place = next((at for at, op in enumerate(ops) if op["cid"]), None)
    if place is None:
        return None
    root, sections = _sections(body["blocks"])
    kept = []
    for section in sections:
        changed = change(*section) if section[0] == ops[place]["cid"] else section
        if changed is not None:
            kept.append(changed)
            if changed[0] != section[0]:
                ops[place]["cid"] = changed[0]
    return encode_frame("#commit", body | {"ops": ops, "blocks": car(root, kept)}), place


def _spoilt(entry: Entry, fault: Fault, operation: int) -> Entry:
    delivery: Delivery = "forbidden" if operation == entry.op_index else "allowed"
    return msgspec.structs.replace(entry, delivery=delivery, spoilt=str(fault))


def _sections(blocks: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    size, position = read_varint(blocks, 0)
    root_at = blocks.index(_LINK) + len(_LINK)
    root, position = blocks[root_at : root_at + CID_BYTES], position + size
    sections = []
    while position < len(blocks):
        size, start = read_varint(blocks, position)
        position = start + size
        sections.append((blocks[start : start + CID_BYTES], blocks[start + CID_BYTES : position]))
    return root, sections
