"""Frames as a relay makes them: encoded, described, stamped anew, and put into messages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from libipld import decode_dag_cbor_multi, encode_dag_cbor

from blueflow.errors import RecordingError
from blueflow.testing.ledger import Entry
from blueflow.wire.cid import cid_text
from blueflow.wire.recording import Unpacker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BINARY, TEXT = 0x82, 0x81  # final frames of RFC 6455
_SEQ_MARK = b"\x63seq\x1b"  # a seq of 8 bytes: every seq from 2**32 on
_TIME_MARK = b"\x64time\x78\x18"  # a time of 24 characters: 2026-07-04T14:38:07.517Z
_WIDE = 2**32
_TIME_CHARACTERS = 24
_READ_BYTES = 1 << 20


class Description(msgspec.Struct, frozen=True):
    """What one event of a frame is, whatever its seq: the rest of a ledger entry."""

    kind: str
    did: str
    rev: str | None = None
    operation: str | None = None
    collection: str | None = None
    rkey: str | None = None
    cid: str | None = None

    def entry(self, index: int, seq: int, op_index: int, time_us: int) -> Entry:
        """Return the ledger entry of this event at one place in the stream."""
        return Entry(
            index, seq, op_index, time_us, self.kind, self.did, self.rev, self.operation,
            self.collection, self.rkey, self.cid,
        )  # fmt: skip


class NetworkFrame(msgspec.Struct, frozen=True):
    """A frame of the network with what the relay has to know of it."""

    seq: int
    time_us: int
    data: bytes
    events: tuple[Description, ...]


def encode_frame(t: str, body: dict[str, Any]) -> bytes:
    """Return a frame of op 1."""
    return _header(t) + encode_dag_cbor(body)


def encode_error(name: str, message: str) -> bytes:
    """Return an error frame."""
    return encode_dag_cbor({"op": -1}) + encode_dag_cbor({"error": name, "message": message})


def encode_info(name: str, message: str) -> bytes:
    """Return an #info frame; it has no seq."""
    return encode_frame("#info", {"name": name, "message": message})


def time_text(time_us: int) -> str:
    """Return a time as relays write it: milliseconds, UTC."""
    moment = datetime.fromtimestamp(time_us // 1_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_us // 1000 % 1000:03d}Z"


def time_of(text: str) -> int:
    """Return microseconds since 1970 for a time with an offset or `Z`."""
    moment = datetime.fromisoformat(text)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def read_network_frame(data: bytes) -> NetworkFrame:
    """Describe a recorded frame that has a seq."""
    header, body = decode_dag_cbor_multi(data)
    t = header["t"]
    if t == "#commit":
        events: tuple[Description, ...] = tuple(
            Description(
                "commit", body["repo"], body["rev"], op["action"], op["path"].partition("/")[0],
                op["path"].partition("/")[2], cid_text(op["cid"]) if op["cid"] else None,
            )
            for op in body["ops"]
        )  # fmt: skip
    elif t in ("#identity", "#account", "#sync"):
        events = (Description(t[1:], body["did"], body.get("rev")),)
    else:
        events = ()
    return NetworkFrame(body["seq"], time_of(body["time"]), data, events)


def read_recording(path: Path) -> Iterator[NetworkFrame]:
    """Iterate over the frames of a recording; a last one that is cut off is left out.

    Raises:
        RecordingError: the file is no recording, or holds what has no place in a stream.
    """
    unpacker = Unpacker(str(path))
    number = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            for frame in unpacker.feed(data):
                try:
                    described = read_network_frame(frame)
                except (AttributeError, LookupError, TypeError, ValueError) as error:  # any CBOR
                    begin = f"go on behind frame {number}" if number else "begin"
                    problem = f"it does not {begin} with a frame that has a place in the stream"
                    raise RecordingError(str(path), -1, problem) from error
                number += 1
                yield described


def stamp_places(data: bytes) -> tuple[int, int]:
    """Return where the 8 bytes of the seq and the 24 characters of the time begin."""
    seq_at = data.index(_SEQ_MARK) + len(_SEQ_MARK)
    # Only the fields `repo` or `did` lie between the two, so the first match is the field.
    return seq_at, data.index(_TIME_MARK, seq_at) + len(_TIME_MARK)


def restamp(data: bytes, seq: int, time_us: int) -> bytes:
    """Return the frame with another seq and time."""
    if seq < _WIDE:  # shorter in CBOR; only a restarted sequence is that low
        header, body = decode_dag_cbor_multi(data)
        return encode_frame(header["t"], body | {"seq": seq, "time": time_text(time_us)})
    seq_at, time_at = stamp_places(data)
    stamped = bytearray(data)
    stamped[seq_at : seq_at + 8] = seq.to_bytes(8, "big")
    stamped[time_at : time_at + _TIME_CHARACTERS] = time_text(time_us).encode()
    return bytes(stamped)


def websocket_message(payload: bytes, opcode: int = BINARY) -> bytes:
    """Return a websocket message of a server: unmasked, in one frame, not compressed.

    Source: https://www.rfc-editor.org/rfc/rfc6455#section-5.2
    """
    size = len(payload)
    if size < 126:  # noqa: PLR2004 - the three forms of a length
        return bytes((opcode, size)) + payload
    if size < 0x10000:  # noqa: PLR2004
        return bytes((opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((opcode, 127)) + size.to_bytes(8, "big") + payload


def _header(t: str) -> bytes:
    return encode_dag_cbor({"op": 1, "t": t})
