"""A seal around bookkeeping: it tells a damaged record from a whole one. Pure: no disk."""

from __future__ import annotations

from hashlib import sha256

import msgspec

from blueflow.errors import CommitLogError


class _Sealed(msgspec.Struct, frozen=True):
    format: str
    sha256: str
    record: msgspec.Raw


def seal(name: str, body: bytes) -> bytes:
    """Return a line of JSON with the format's name, the checksum of `body`, and `body`.

    Args:
        name: of the format, with its version.
        body: JSON.
    """
    return msgspec.json.encode(_Sealed(name, sha256(body).hexdigest(), msgspec.Raw(body))) + b"\n"


def unseal(path: str, name: str, data: bytes) -> bytes:
    """Return the body of what `seal` wrote.

    Raises:
        CommitLogError: it is empty, cut off, changed or of another format.
    """
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        problem = f"{len(data)} bytes that are no record ({error})" if data else "it is empty"
        raise CommitLogError(path, problem) from error
    if sealed.format != name:
        raise CommitLogError(path, f"format {sealed.format!r} is not {name}")
    body = bytes(sealed.record)
    if sha256(body).hexdigest() != sealed.sha256:
        raise CommitLogError(path, "its content does not match its checksum")
    return body
