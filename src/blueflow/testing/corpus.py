"""The texts of simulated posts: multilingual, with word frequencies as in real language.

`PostWriter` is the seam for other texts: planted trends, a real sample, an attack.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from random import Random

TEXT_CHARACTERS_MAX = 300  # lexicon app.bsky.feed.post: 300 graphemes
_TAG = "app.bsky.richtext.facet#tag"
_LINK = "app.bsky.richtext.facet#link"
_BODY_CHARACTERS_MAX = 200  # leaves room for hashtags and a link
_NAMES = 3_000
_WITHOUT_SPACES = frozenset({"ja"})


class Writing(msgspec.Struct, frozen=True):
    """What a post says: `langs` may be empty, `facets` point into the UTF-8 bytes of `text`."""

    text: str
    langs: list[str]
    facets: list[dict[str, object]]


class PostWriter(Protocol):
    """Writes the posts of a simulated network. The same calls have to give the same texts."""

    def write(self, random: Random, *, author: int, language: str, time_us: int) -> Writing:
        """Write one post.

        Args:
            random: the only source of chance that may be used.
            author: number of the account, from 0.
            language: what the account writes in, e.g. "en".
            time_us: simulated time, microseconds since 1970.
        """


class Corpus:
    """Words drawn by Zipf's law, hashtags, links, emoji, and a long tail of made-up names."""

    def __init__(self) -> None:
        lists = _lists()
        self._words = {language: text.split() for language, text in lists.words.items()}
        self._weights = {
            language: _zipf(len(words), 2.7) for language, words in self._words.items()
        }
        self._hashtags, self._emoji = lists.hashtags.split(), lists.emoji.split()
        self._tag_weights = _zipf(len(self._hashtags), 2)
        self._name_weights = _zipf(_NAMES, 10)

    def write(self, random: Random, *, author: int, language: str, time_us: int) -> Writing:
        """Write one post; `author` and `time_us` do not matter here."""
        del author, time_us
        text = self._sentence(random, language)
        text, facets = _with_features(random, text, self._features(random))
        return Writing(text, _langs(random, language), facets)

    def _sentence(self, random: Random, language: str) -> str:
        spaced = language not in _WITHOUT_SPACES
        count = min(int(random.lognormvariate(2.4, 0.8)) + 1, 45)
        words = random.choices(self._words[language], cum_weights=self._weights[language], k=count)
        if _chance(random, 0.2):
            (number,) = random.choices(range(_NAMES), cum_weights=self._name_weights)
            words.insert(random.randrange(len(words) + 1), made_up_name(number))
        text = (" " if spaced else "").join(words)
        if spaced and _chance(random, 0.6):
            text = text[0].upper() + text[1:]
        if _chance(random, 0.7):
            text += random.choice(".!?…" if spaced else "。!?…")
        if _chance(random, 0.18):
            text += " " + random.choice(self._emoji) * random.randint(1, 3)
        return text[:_BODY_CHARACTERS_MAX]

    def _features(self, random: Random) -> list[tuple[str, str, str]]:
        features = []
        if _chance(random, 0.09):
            count = random.randint(1, 3)
            tags = random.choices(self._hashtags, cum_weights=self._tag_weights, k=count)
            features += [(_TAG, "tag", tag) for tag in dict.fromkeys(tags)]
        if _chance(random, 0.08):
            page = f"https://{made_up_name(random.randrange(200)).lower()}.example/"
            features.append((_LINK, "uri", page + str(random.randrange(10**6))))
        return features


class _Lists(msgspec.Struct, frozen=True):
    words: dict[str, str]
    shares: dict[str, float]
    hashtags: str
    emoji: str


@cache
def _lists() -> _Lists:
    text = files("blueflow.testing").joinpath("words.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Lists)


def _zipf(count: int, offset: float) -> list[float]:
    return list(accumulate(1 / (rank + offset) for rank in range(count)))


def made_up_name(number: int) -> str:
    """Return the name with this number, from 0: words that no dictionary has."""
    count = len(_SYLLABLES)
    first, rest = number % count, number // count
    second = _SYLLABLES[(rest * 7 + first) % count]
    third = _SYLLABLES[rest * 3 % count] if number % 3 else ""
    return f"{_SYLLABLES[first].title()}{second}{third}{_ENDINGS[rest % len(_ENDINGS)]}"


def language_of(number: int) -> str:
    """Return what the account with this number writes in."""
    place = number * 0.6180339887498949 % 1  # spreads neighbours evenly, so shares hold early on
    for language, share in _lists().shares.items():
        place -= share
        if place < 0:
            return language
    return "en"


def _with_features(
    random: Random, text: str, features: list[tuple[str, str, str]]
) -> tuple[str, list[dict[str, object]]]:
    facets: list[dict[str, object]] = []
    for kind, name, value in features:
        shown = "#" + value if kind == _TAG else value.removeprefix("https://")
        start = len(text.encode()) + 1
        text = f"{text} {shown}"
        index = {"byteStart": start, "byteEnd": start + len(shown.encode())}
        facets.append({"index": index, "features": [{"$type": kind, name: value}]})
    if len(facets) > 1 and _chance(random, 0.2):
        facets.pop()  # some clients forget to mark the last one
    return text, facets


def _langs(random: Random, language: str) -> list[str]:
    if _chance(random, 0.03):
        return []
    if _chance(random, 0.03):
        return ["en-US", "en"] if language == "en" else ["en", language]
    return [language]


def _chance(random: Random, share: float) -> bool:
    return random.random() < share


_SYLLABLES = tuple(
    "ka re mo li tan vor sel dri bo na zu mar qui fen tha lo gri su vel ar".split()  # noqa: SIM905
)
_ENDINGS = ("", "n", "s", "x", "ia", "or", "et")
