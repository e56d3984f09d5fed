"""A plain DAG-CBOR encoder for tests, independent of the engine that the package uses.

The engine guesses links from bytes; here a link is a `Link`, so that byte strings that look like a
CID can be written too. `Raw` puts bytes in as they are, for forms that no encoder would write.

Source: https://ipld.io/specs/codecs/dag-cbor/spec/ and RFC 8949
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import Any


@dataclass(frozen=True)
class Link:
    """A CID, in its binary form without the leading zero."""

    cid: bytes


@dataclass(frozen=True)
class Raw:
    """Encoded data."""

    data: bytes


def encode(value: Any) -> bytes:  # noqa: PLR0911 - one for each kind of value
    """Return the one DAG-CBOR form of a value."""
    match value:
        case Raw():
            return value.data
        case Link():
            return b"\xd8\x2a" + encode(b"\x00" + value.cid)
        case None | bool():
            return {False: b"\xf4", True: b"\xf5", None: b"\xf6"}[value]
        case int():
            return head(0, value) if value >= 0 else head(1, -1 - value)
        case float():
            return b"\xfb" + struct.pack(">d", value)
        case bytes():
            return head(2, len(value)) + value
        case str():
            return head(3, len(value.encode())) + value.encode()
        case list() | tuple():
            return head(4, len(value)) + b"".join(map(encode, value))
        case dict():
            items = sorted((len(key.encode()), key.encode(), key) for key in value)
            return head(5, len(value)) + b"".join(
                encode(key) + encode(value[key]) for _, _, key in items
            )
    raise TypeError(type(value))


def head(major: int, number: int, width: int | None = None) -> bytes:
    """Return a data item's head; a `width` (1, 2, 4 or 8 bytes) makes it longer than needed."""
    if width is None:
        if number < 24:
            return bytes([major << 5 | number])
        width = next(size for size in (1, 2, 4, 8) if number < 1 << 8 * size)
    info = {1: 24, 2: 25, 4: 26, 8: 27}[width]
    return bytes([major << 5 | info]) + number.to_bytes(width, "big")


def cid_of(block: bytes, codec: int = 0x71) -> bytes:
    """Return the CID of a block: version 1, SHA-256."""
    return bytes([1, codec, 0x12, 0x20]) + sha256(block).digest()


def from_json(value: Any) -> Any:
    """Return what `encode` takes for a value of the data model in JSON form."""
    from base64 import b32decode, b64decode  # noqa: PLC0415 - only here

    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$link": str(text)} if len(value) == 1 and text.startswith("b"):
            return Link(b32decode(text[1:].upper() + "=" * (-(len(text) - 1) % 8)))
        case {"$bytes": str(text)} if len(value) == 1:
            return b64decode(text + "=" * (-len(text) % 4))
    return {key: from_json(item) for key, item in value.items()}
