"""The records of simulated accounts: lexicon-shaped, with links among the newest ones."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from blueflow.testing.corpus import language_of, made_up_name
from blueflow.testing.frames import time_text
from blueflow.testing.repositories import blob, did_of, made_up_cid, tid

if TYPE_CHECKING:
    from random import Random

    from blueflow.testing.corpus import PostWriter
    from blueflow.testing.repositories import Repository

_RECENT = 2_000  # how many posts and reposts are remembered for likes, replies and quotes
_DAY_US = 86_400_000_000


class RecordWriter:
    """Writes records. All chance comes from the one `random` of the network."""

    def __init__(self, random: Random, writer: PostWriter, seed: int, accounts: int) -> None:
        self._random, self._writer, self._seed, self._accounts = random, writer, seed, accounts
        self._posts: deque[dict[str, str]] = deque(maxlen=_RECENT)
        self._reposts: deque[dict[str, str]] = deque(maxlen=_RECENT)

    def remember(self, did: str, collection: str, rkey: str, cid: str) -> None:
        """Let later records refer to this one."""
        kept = {"app.bsky.feed.post": self._posts, "app.bsky.feed.repost": self._reposts}
        if collection in kept:
            kept[collection].append({"cid": cid, "uri": f"at://{did}/{collection}/{rkey}"})

    def record(self, collection: str, repository: Repository, time_us: int) -> dict[str, Any]:
        """Write a record of a collection that the simulated network has."""
        made: dict[str, Any] = {"$type": collection}
        match collection.rpartition(".")[2]:
            case "post":
                return made | self._post(repository, time_us)
            case "like" | "repost":
                made["subject"] = self._post_reference(time_us)
                if self._reposts and self._chance(0.25):
                    made["via"] = self._random.choice(self._reposts)
            case "follow" | "block":
                made["subject"] = self._account()
            case "listitem":
                made |= {"subject": self._account(), "list": self._uri("app.bsky.graph.list")}
            case "profile":
                name = made_up_name(self._random.randrange(3_000))
                made |= {"displayName": name, "description": self._text(repository, time_us)}
                made["avatar"] = blob("avatar", repository.number, size=54_321)
            case "status":
                made |= {"status": "app.bsky.actor.status#live", "durationMinutes": 240}
                made["embed"] = self._external(repository, time_us)
            case "play":
                made |= self._play(time_us)
            case "message":
                made |= {"text": self._text(repository, time_us), "streamer": self._account()}
            case _:  # a blog entry
                made |= {"title": self._text(repository, time_us)[:60], "theme": "github-light"}
                paragraphs = (self._text(repository, time_us) for _ in range(20))
                made["content"] = "\n\n".join(paragraphs)
        return made | {"createdAt": time_text(time_us)}

    def threadgate(self, did: str, rkey: str, time_us: int) -> dict[str, Any]:
        """Write the rule of who may reply to a post."""
        return {
            "$type": "app.bsky.feed.threadgate",
            "post": f"at://{did}/app.bsky.feed.post/{rkey}",
            "allow": [{"$type": "app.bsky.feed.threadgate#followingRule"}],
            "hiddenReplies": [],
            "createdAt": time_text(time_us),
        }

    def _post(self, repository: Repository, time_us: int) -> dict[str, Any]:
        language = language_of(repository.number)
        writing = self._writer.write(
            self._random, author=repository.number, language=language, time_us=time_us
        )
        made: dict[str, Any] = {"text": writing.text, "createdAt": time_text(time_us)}
        if writing.langs:
            made["langs"] = writing.langs
        if writing.facets:
            made["facets"] = writing.facets
        if self._chance(0.42):  # shares as on the public network
            root, parent = self._post_reference(time_us), self._post_reference(time_us)
            made["reply"] = {"root": root if self._chance(0.5) else parent}
            made["reply"]["parent"] = parent
        embed = self._embed(repository, time_us)
        if embed:
            made["embed"] = embed
        return made

    def _embed(self, repository: Repository, time_us: int) -> dict[str, Any] | None:
        if self._chance(0.18):
            image = {
                "alt": self._text(repository, time_us) if self._chance(0.3) else "",
                "image": blob("image", repository.number, time_us, size=345_678),
                "aspectRatio": {"width": 1_200, "height": 900},
            }
            return {"$type": "app.bsky.embed.images", "images": [image]}
        if self._chance(0.12):
            return self._external(repository, time_us)
        if self._chance(0.08):
            record = self._post_reference(time_us)
            return {"$type": "app.bsky.embed.record", "record": record}
        return None

    def _external(self, repository: Repository, time_us: int) -> dict[str, Any]:
        page = made_up_name(self._random.randrange(300)).lower()
        external = {
            "uri": f"https://{page}.example/{self._random.randrange(10**8)}",
            "title": self._text(repository, time_us),
            "description": self._text(repository, time_us),
            "thumb": blob("thumb", repository.number, time_us),
        }
        return {"$type": "app.bsky.embed.external", "external": external}

    def _play(self, time_us: int) -> dict[str, Any]:
        artist, track = (made_up_name(self._random.randrange(3_000)) for _ in range(2))
        return {
            "trackName": track,
            "artists": [{"artistName": artist}],
            "duration": self._random.randint(90, 400),
            "playedTime": time_text(time_us - 200_000_000),
            "releaseName": None,
            "submissionClientAgent": "simulated/1.0",
        }

    def _text(self, repository: Repository, time_us: int) -> str:
        language, author = language_of(repository.number), repository.number
        return self._writer.write(
            self._random, author=author, language=language, time_us=time_us
        ).text

    def _post_reference(self, time_us: int) -> dict[str, str]:
        if self._posts and self._chance(0.6):
            return self._random.choice(self._posts)
        uri = self._uri("app.bsky.feed.post", time_us - self._random.randrange(3 * _DAY_US))
        return {"cid": made_up_cid(uri), "uri": uri}

    def _uri(self, collection: str, time_us: int = 1_700_000_000_000_000) -> str:
        rkey = tid(time_us + self._random.randrange(10**6), self._random.randrange(1024))
        return f"at://{self._account()}/{collection}/{rkey}"

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _account(self) -> str:
        return did_of(self._seed, self._random.randrange(self._accounts))
