"""Content identifiers in the one shape that AT Protocol allows: CIDv1, SHA-256, dag-cbor or raw.

Source: https://atproto.com/specs/data-model#link-and-cid-formats
"""

from __future__ import annotations

from hashlib import sha256

from libipld import encode_cid as cid_text

CID_BYTES = 36  # 4 bytes of prefix and a digest of 32 bytes
DAG_CBOR_PREFIX = b"\x01\x71\x12\x20"  # version 1, codec dag-cbor, sha2-256, 32 bytes
RAW_PREFIX = b"\x01\x55\x12\x20"  # the same with codec raw: blobs

__all__ = ["CID_BYTES", "DAG_CBOR_PREFIX", "RAW_PREFIX", "cid_text", "dag_cbor_cid", "is_cid"]


def dag_cbor_cid(block: bytes) -> bytes:
    """Return the CID (36 bytes) of a DAG-CBOR block."""
    return DAG_CBOR_PREFIX + sha256(block).digest()


def is_cid(value: bytes) -> bool:
    """Tell whether the bytes have the shape of an AT Protocol CID."""
    return len(value) == CID_BYTES and value[:4] in (DAG_CBOR_PREFIX, RAW_PREFIX)
