"""The simulated network: an endless, repeatable stream of frames shaped like the public relay's.

Kinds, sizes, languages and rates follow frames recorded from bsky.network in July 2026 (mean
5.4 kB, 10 blocks). CARs, CIDs, trees and the chain of revs and `prevData` are sound; signatures are
whatever the signer gives. No clock: the caller says when simulated time begins and how fast it
passes.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from blueflow.testing.corpus import Corpus
from blueflow.testing.frames import Description, NetworkFrame, encode_frame, time_text
from blueflow.testing.records import RecordWriter
from blueflow.testing.repositories import Archive, Change, Repository, car
from blueflow.wire.cid import cid_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blueflow.testing.corpus import PostWriter

START_US = 1_783_175_888_000_000  # 2026-07-04T14:38:08Z, where the recorded frames end
FIRST_SEQ = 31_600_000_000  # above the recorded frames, and far above 32 bits
EVENTS_PER_SECOND = 500.0  # what the public network sends on a usual day
_LATENESS_US = 900_000  # recorded neighbours go back in time by up to 0.9 s
_MIX: tuple[tuple[str, float], ...] = (  # what a frame holds, in percent
    ("like", 62.0), ("like delete", 1.6),
    ("repost", 10.5), ("repost delete", 0.5),
    ("post", 12.0), ("post delete", 1.0), ("post update", 0.2),
    ("thread", 0.5), ("gated post", 0.7),
    ("follow", 4.5), ("follow delete", 1.5), ("unfollow many", 0.2),
    ("block", 0.9), ("block delete", 0.2), ("profile update", 0.6), ("list item", 0.5),
    ("status update", 0.5), ("play", 0.6), ("chat", 0.3), ("blog", 0.1),
    ("identity", 0.3), ("account", 0.3), ("sync", 0.1),
)  # fmt: skip
_SHORT = {
    "like": "app.bsky.feed.like",
    "repost": "app.bsky.feed.repost",
    "post": "app.bsky.feed.post",
    "follow": "app.bsky.graph.follow",
    "block": "app.bsky.graph.block",
    "list item": "app.bsky.graph.listitem",
    "play": "fm.teal.alpha.feed.play",
    "chat": "place.stream.chat.message",
    "blog": "com.whtwnd.blog.entry",
}


def unsigned(commit: bytes) -> bytes:
    """Stand in for a signature: 64 bytes, always the same. The default signer."""
    del commit
    return b"\x5a" * 64


class SimulatedNetwork:
    """Iterating gives the frames from the first on; every iteration gives the same ones.

    Args:
        seed: the same seed and arguments give the same frames, byte for byte.
        first_seq: seq of the first frame.
        start_us: simulated time of the first frame, microseconds since 1970.
        rate: events per second of simulated time.
        accounts: how many accounts there are; some are much more active than others.
        records: how many records most accounts have in the beginning. More make deeper trees and
            larger frames; 30,000 (0.3 s to build) gives the recorded size.
        gap_share: part of the frames before which the relay skipped one to three seqs.
        signer: called with each unsigned commit.
        writer: writes the posts: the seam for planted trends.
    """

    def __init__(  # noqa: PLR0913 - each has a default, and none belongs to another
        self,
        seed: int = 1,
        *,
        first_seq: int = FIRST_SEQ,
        start_us: int = START_US,
        rate: float = EVENTS_PER_SECOND,
        accounts: int = 10_000,
        records: int = 30_000,
        gap_share: float = 0.0,
        signer: Callable[[bytes], bytes] = unsigned,
        writer: PostWriter | None = None,
    ) -> None:
        self.seed, self.first_seq, self.start_us, self.rate = seed, first_seq, start_us, rate
        self.accounts, self.records, self.gap_share = accounts, records, gap_share
        self.signer, self.writer = signer, writer or Corpus()

    def __iter__(self) -> Iterator[NetworkFrame]:
        return _Traffic(self).frames()


class _Traffic:
    """The state of one run through the network."""

    def __init__(self, network: SimulatedNetwork) -> None:
        self._network = network
        self._random = Random(f"blueflow network {network.seed}")
        self._records = RecordWriter(self._random, network.writer, network.seed, network.accounts)
        large = _archive(network.records, network.start_us)
        self._archives = (large, large, large, _archive(network.records // 10, network.start_us))
        self._repositories: dict[int, Repository] = {}
        self._names = [name for name, _ in _MIX]
        self._weights = list(accumulate(share for _, share in _MIX))

    def frames(self) -> Iterator[NetworkFrame]:
        network, random = self._network, self._random
        seq, index = network.first_seq, 0
        while True:
            if network.gap_share and random.random() < network.gap_share:
                seq += random.randint(1, 3)
            late_us = min(int(random.expovariate(1 / 60_000)), _LATENESS_US)
            time_us = network.start_us + int(index * 1_000_000 / network.rate) - late_us
            time_us -= time_us % 1000  # what the frame's text can say
            data, events = self._frame(seq, time_us)
            yield NetworkFrame(seq, time_us, data, events)
            seq += 1
            index += 1

    def _frame(self, seq: int, time_us: int) -> tuple[bytes, tuple[Description, ...]]:
        repository = self._repository()
        (what,) = self._random.choices(self._names, cum_weights=self._weights)
        if not repository.active:
            what = "account"  # nobody commits while deactivated: it comes back
        body: dict[str, Any] = {"seq": seq, "time": time_text(time_us)}
        if what == "identity":
            body |= {"did": repository.did, "handle": f"account{repository.number}.example"}
            return encode_frame("#identity", body), (Description("identity", repository.did),)
        if what == "account":
            repository.active = not repository.active
            body |= {"did": repository.did, "active": repository.active}
            if not repository.active:
                body["status"] = self._random.choice(("deactivated", "takendown", "suspended"))
            return encode_frame("#account", body), (Description("account", repository.did),)
        if what == "sync":
            return self._sync(repository, body, time_us)
        return self._commit(repository, what, body, time_us)

    def _repository(self) -> Repository:
        # A cube: the busiest percent of the accounts sends a fifth of the events.
        number = int(self._network.accounts * self._random.random() ** 3)
        repository = self._repositories.get(number)
        if repository is None:
            repository = self._repositories[number] = Repository(
                number,
                self._network.seed,
                self._archives[number % len(self._archives)],
                self._network.signer,
                self._network.start_us - 3_600_000_000,
            )
        return repository

    def _sync(
        self, repository: Repository, body: dict[str, Any], time_us: int
    ) -> tuple[bytes, tuple[Description, ...]]:
        # The repository changed off the stream, e.g. while its PDS was restored.
        repository.commit(self._changes(repository, "post", time_us), time_us)
        cid, block = repository.head()
        blocks = car(cid, [(cid, block)])
        body |= {"did": repository.did, "rev": repository.rev, "blocks": blocks}
        description = Description("sync", repository.did, repository.rev)
        return encode_frame("#sync", body), (description,)

    def _commit(
        self, repository: Repository, what: str, body: dict[str, Any], time_us: int
    ) -> tuple[bytes, tuple[Description, ...]]:
        changes = self._changes(repository, what, time_us)
        commit = repository.commit(changes, time_us)
        body |= {
            "repo": repository.did, "rev": commit.rev, "since": commit.since, "ops": commit.ops,
            "commit": commit.cid, "prevData": commit.previous_data, "blocks": commit.blocks,
            "blobs": [], "rebase": False, "tooBig": False,
        }  # fmt: skip
        events = []
        for change, op in zip(changes, commit.ops, strict=True):
            cid = op["cid"] and cid_text(op["cid"])
            if change.operation == "create":
                self._records.remember(repository.did, change.collection, change.rkey, cid)
            where = (change.operation, change.collection, change.rkey)
            events.append(Description("commit", repository.did, commit.rev, *where, cid))
        return encode_frame("#commit", body), tuple(events)

    def _changes(self, repository: Repository, what: str, time_us: int) -> list[Change]:
        short, _, rest = what.partition(" ")
        if rest == "delete":
            return self._deletes(repository, short, 1, time_us)
        if what == "unfollow many":
            return self._deletes(repository, "follow", 4, time_us)
        if rest == "update":
            return [self._update(repository, short, time_us)]
        if what == "thread":
            return [self._create(repository, "post", time_us) for _ in range(3)]
        if what == "gated post":
            post = self._create(repository, "post", time_us)
            gate = self._records.threadgate(repository.did, post.rkey, time_us)
            return [post, Change("create", "app.bsky.feed.threadgate", post.rkey, gate)]
        return [self._create(repository, what, time_us)]

    def _create(self, repository: Repository, short: str, time_us: int) -> Change:
        collection = _SHORT[short]
        written_us = time_us - self._random.randint(200_000, 2_000_000)
        record = self._records.record(collection, repository, written_us)
        return Change("create", collection, repository.next_tid(written_us), record)

    def _update(self, repository: Repository, short: str, time_us: int) -> Change:
        if short == "post":
            collection, rkey = _SHORT[short], self._archived_rkey(repository, short)
            if rkey is None:
                return self._create(repository, short, time_us)
        else:
            collection, rkey = f"app.bsky.actor.{short}", "self"
        exists = repository.tree.get(f"{collection}/{rkey}".encode()) is not None
        record = self._records.record(collection, repository, time_us)
        return Change("update" if exists else "create", collection, rkey, record)

    def _deletes(
        self, repository: Repository, short: str, count: int, time_us: int
    ) -> list[Change]:
        rkeys = {self._archived_rkey(repository, short): None for _ in range(count)}
        deletes = [Change("delete", _SHORT[short], rkey) for rkey in rkeys if rkey]
        return deletes or [self._create(repository, short, time_us)]

    def _archived_rkey(self, repository: Repository, short: str) -> str | None:
        keys = repository.archive.keys[_SHORT[short]]
        for _ in range(8 if keys else 0):
            key = self._random.choice(keys)
            if repository.tree.get(key) is not None:
                return key.decode().partition("/")[2]
        return None


@lru_cache(maxsize=4)
def _archive(records: int, until_us: int) -> Archive:
    return Archive(records, until_us - 7_200_000_000)
