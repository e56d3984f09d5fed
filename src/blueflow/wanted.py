"""Which events the user asked for. A core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blueflow.events import RepoOp

if TYPE_CHECKING:
    from collections.abc import Collection

    from blueflow.events import Event

_VERDICTS_MAX = 4096  # collections are named by strangers
_NSID_LENGTH_MAX = 317  # https://atproto.com/specs/nsid


class Wanted:
    """A filter by collection and by account."""

    def __init__(self, collections: Collection[str] = (), dids: Collection[str] = ()) -> None:
        """Take NSIDs (a trailing `.*` stands for all below) and DIDs; empty means all.

        With `collections`, only repository operations are wanted: identity, account and sync events
        belong to no collection.
        """
        self.everything = not collections and not dids
        self.account_events = not collections
        self._dids = frozenset(dids)
        self._dids_in_frames = frozenset(did.encode() for did in dids)
        self._exact = frozenset(name for name in collections if not name.endswith(".*"))
        self._prefixes = tuple(name[:-1] for name in collections if name.endswith(".*"))
        self._verdicts: dict[str, bool] = {}
        self._verdicts_in_frames: dict[bytes, bool] = {}

    def event(self, event: Event) -> bool:
        """Tell whether this event is wanted."""
        if self.everything:
            return True
        if isinstance(event, RepoOp):
            return self.collection(event.collection) and self.did(event.did)
        return self.account_events and self.did(event.did)

    def did(self, did: str) -> bool:
        """Tell whether events of this account are wanted."""
        return not self._dids or did in self._dids

    def collection(self, name: str) -> bool:
        """Tell whether operations in this collection are wanted."""
        verdict = self._verdicts.get(name)
        if verdict is None:
            verdict = self.account_events or name in self._exact or name.startswith(self._prefixes)
            if len(name) <= _NSID_LENGTH_MAX:  # a longer one is no collection, and fills the memory
                if len(self._verdicts) >= _VERDICTS_MAX:
                    self._verdicts.clear()
                self._verdicts[name] = verdict
        return verdict

    def path(self, path: bytes, repo: bytes) -> bool:
        """Tell the same for a path of at most 255 bytes and an account, both as in a frame."""
        name = path.partition(b"/")[0]
        verdict = self._verdicts_in_frames.get(name)
        if verdict is None:
            if len(self._verdicts_in_frames) >= _VERDICTS_MAX:
                self._verdicts_in_frames.clear()
            verdict = self.collection(name.decode(errors="replace"))
            self._verdicts_in_frames[name] = verdict
        return verdict and (not self._dids or repo in self._dids_in_frames)

    def none_of(self, body: dict[str, Any]) -> bool:
        """Tell whether a #commit, not yet checked, certainly holds nothing wanted."""
        if self._dids and body.get("repo") not in self._dids:
            return True
        collection = self.collection
        try:
            for op in body["ops"]:
                if collection(op["path"].partition("/")[0]):
                    return False
        except (KeyError, TypeError, AttributeError):
            return False  # let the strict way say what is wrong
        return not body.get("tooBig")
