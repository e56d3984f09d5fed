"""Which events the user asked for. A core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from blueflow.events import RepoOp

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from blueflow.events import Event

NameT = TypeVar("NameT", str, bytes)

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
        self.collections = _Verdicts(self._judge)  # by name
        self._collections_in_frames = _Verdicts(self._judge_in_frame)

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
        return self.collections[name]

    def path(self, path: bytes, repo: bytes) -> bool:
        """Tell the same for a path and an account as a frame has them."""
        wanted = self._collections_in_frames[path.partition(b"/")[0]]
        return wanted and (not self._dids or repo in self._dids_in_frames)

    def none_of(self, body: dict[str, Any]) -> bool:
        """Tell whether a #commit, not yet checked, certainly holds nothing wanted."""
        if self._dids and body.get("repo") not in self._dids:
            return True
        collections = self.collections
        try:
            for op in body["ops"]:
                if collections[op["path"].partition("/")[0]]:
                    return False
        except (KeyError, TypeError, AttributeError):
            return False  # let the strict way say what is wrong
        return not body.get("tooBig")

    def _judge(self, name: str) -> bool:
        return self.account_events or name in self._exact or name.startswith(self._prefixes)

    def _judge_in_frame(self, name: bytes) -> bool:
        return self.collections[name.decode(errors="replace")]


class _Verdicts(dict[NameT, bool]):
    """Verdicts by collection, each judged once: looking one up is no call."""

    def __init__(self, judge: Callable[[NameT], bool]) -> None:
        super().__init__()
        self._judge: Callable[[NameT], bool] = judge

    def __missing__(self, name: NameT) -> bool:
        verdict = self._judge(name)
        if len(name) <= _NSID_LENGTH_MAX:  # a longer one is no collection, and fills the memory
            if len(self) >= _VERDICTS_MAX:
                self.clear()
            self[name] = verdict
        return verdict
