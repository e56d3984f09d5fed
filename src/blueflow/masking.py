"""Secrets in text that is about to be shown. Pure, quick to import.

Text is masked when it is shown, so it may be a whole sentence with an address in it, and nobody can
say for certain where a secret ends. Where that is open, more is masked rather than less. Every
pattern is linear in the text: what cannot match is never looked at again from each of its places.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MASKED = "***"

# The patterns stay text until one is needed: to compile them costs --help 3 ms.
_MARKS = frozenset("@='\"")  # without one of them there is nothing to mask
# The first :// begins a URL, others only behind a space: it may be a part of the password.
_URL = r"(?<![^\s'\"(\[<])[A-Za-z][A-Za-z0-9+.-]*+://"
# No password, though an @ follows: a host with a dot and no colon up to the @, as in
# "https://example.com/@alice", or a port and another word, as in "ws://host:80/path for me@host".
_HOST_AND_PATH = (
    r"(?:(?:[\w-]+\.)+(?:[A-Za-z]{2,}|\d{1,3})[/?#\s]|[\w.-]+:\d{2,5}(?:[/?#]\S*)?\s)[^:]*"
)
# A value ends at white space; a quote before that, with the sentence's stop, is not the value's.
_END = r"(?=['\"][:,.;)\]}'\"]{0,4}(?:\s|\Z)|\s|\Z)"
_SHOWN_PARAMETERS = (  # https://github.com/bluesky-social/jetstream#consuming-jetstream
    "cursor|wantedCollections|wantedDids|maxMessageSizeBytes|compress|requireHello"
)
_PARAMETER = (
    rf"[?&#;](?!(?:{_SHOWN_PARAMETERS})=)[^\s=&?#;]++="
    rf"(?P<value>\S*?)(?:{_END}|(?=&[^\s=&?#;]{{1,64}}=))"
)
_SENSITIVE = (
    "passw(?:or)?d|passphrase|pwd|secret|token|credential|jwt|signature"
    "|(?:api|access|account|private|shared)[_-]?(?:access)?[_-]?key"
)
_NAMED_SECRET = (
    rf"(?i)(?<![\w.?&#;-])(?=[\w.-]*?(?:{_SENSITIVE}))[\w.-]++(?:\s*+=|['\"]\s*+:)\s*+"
    rf"(?P<value>(?:\\?'[^']*'|\\?\"[^\"]*\")?\S*?){_END}"
)


def mask_credentials(text: str) -> str:
    """Return `text` without its secrets.

    Masked are user and password in URLs, the password of `user:password@host` without a scheme,
    the value of every parameter of a URL except those of Jetstream and relays, and what follows
    `password=`, `token=` and the like.
    """
    if _MARKS.isdisjoint(text):
        return text
    spans = [*_user_infos(text), *_bare_passwords(text)]
    for pattern in (_PARAMETER, _NAMED_SECRET):
        spans += [found.span("value") for found in re.finditer(pattern, text)]
    shown: list[str] = []
    end = 0
    for start, stop in sorted(spans):
        if start > end or not shown:
            shown += [text[end:start], MASKED]
        end = max(end, stop)
    return "".join(shown) + text[end:]


def _user_infos(text: str) -> Iterator[tuple[int, int]]:
    """Find what stands between :// and the last @ that can belong to it."""
    first = text.find("://")
    if first < 0:
        return
    starts = sorted({first + 3, *(found.end() for found in re.finditer(_URL, text))})
    for start, end in pairwise([*starts, len(text)]):
        at = text.rfind("@", start, end)
        if text.endswith("at://", 0, start):
            continue  # the authority of an at-URI is a DID or a handle
        if at >= 0 and not re.fullmatch(_HOST_AND_PATH, text[start:at]):
            yield start, at


def _bare_passwords(text: str) -> Iterator[tuple[int, int]]:
    """Find the password of an address whose scheme was forgotten, a proxy's for example."""
    for word in re.finditer(r"\S+", text):
        user_info, at, _ = word[0].rpartition("@")
        user, colon, password = user_info.partition(":")
        if at and colon and not password.startswith("//"):
            start = word.start() + len(user) + 1
            yield start, start + len(password)
