"""The hot columns of a record: what stands in columns of its own beside `record_json`. A core.

A record may be anything, whatever its lexicon says. One that fits is read by a typed decoder, which
passes over what nobody asked for. One that does not fit is decoded whole and read leniently: what
is of the wrong type counts as missing, an odd item of a list is left out. Both give the same form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Hot: TypeAlias = "Post | About | Follow | Other"


class Ref(msgspec.Struct, gc=False):
    """A reference to a record."""

    uri: str | None = None
    cid: str | None = None


class Reply(msgspec.Struct, gc=False):
    """What a post answers."""

    parent: Ref | None = None
    root: Ref | None = None


class Feature(msgspec.Struct, gc=False):
    """What a part of a text is: a tag, a link or a mention."""

    type: str | None = msgspec.field(name="$type", default=None)
    tag: str | None = None
    uri: str | None = None
    did: str | None = None


class Facet(msgspec.Struct, gc=False):
    """The features of a part of a text."""

    features: list[Feature] | None = None


class External(msgspec.Struct, gc=False):
    """A card of a web page."""

    uri: str | None = None


class Media(msgspec.Struct, gc=False):
    """What is beside a quoted record."""

    external: External | None = None


class Quoted(msgspec.Struct, gc=False):
    """A quoted record: the reference itself, or what holds it beside media."""

    uri: str | None = None
    record: Ref | None = None


class Embed(msgspec.Struct, gc=False):
    """What is embedded in a post."""

    type: str | None = msgspec.field(name="$type", default=None)
    external: External | None = None
    record: Quoted | None = None
    media: Media | None = None


class Post(msgspec.Struct, gc=False):
    """Of `app.bsky.feed.post`."""

    created: str | None = msgspec.field(name="createdAt", default=None)
    text: str | None = None
    langs: list[str] | None = None
    reply: Reply | None = None
    facets: list[Facet] | None = None
    tags: list[str] | None = None
    embed: Embed | None = None

    def hashtags(self) -> list[str]:
        """Return the hashtags of the text and the further ones, each once."""
        if self.facets is None and self.tags is None:
            return []
        found = [one.tag for one in self._features() if one.type == _TAG and one.tag is not None]
        return list(dict.fromkeys([*found, *(self.tags or ())]))

    def links(self) -> list[str]:
        """Return the addresses in the text and of the card, each once."""
        if self.facets is None and self.embed is None:
            return []
        found = [one.uri for one in self._features() if one.type == _LINK and one.uri is not None]
        if self.embed is not None:
            media = self.embed.media or _NO_MEDIA
            for card in (self.embed.external, media.external):
                found += [card.uri] if card is not None and card.uri is not None else []
        return list(dict.fromkeys(found))

    def mentions(self) -> list[str]:
        """Return the DIDs that the text mentions, each once."""
        if self.facets is None:
            return []
        found = [one.did for one in self._features() if one.type == _MENTION]
        return [did for did in dict.fromkeys(found) if did is not None]

    def quote(self) -> str | None:
        """Return the AT URI of the quoted record."""
        if self.embed is None or self.embed.record is None:
            return None
        quoted = self.embed.record
        if quoted.uri is None and quoted.record is not None:
            return quoted.record.uri
        return quoted.uri

    def _features(self) -> Iterator[Feature]:
        for facet in self.facets or ():
            yield from facet.features or ()


class About(msgspec.Struct, gc=False):
    """Of `app.bsky.feed.like` and `app.bsky.feed.repost`."""

    created: str | None = msgspec.field(name="createdAt", default=None)
    subject: Ref | None = None
    via: Ref | None = None


class Follow(msgspec.Struct, gc=False):
    """Of `app.bsky.graph.follow`."""

    created: str | None = msgspec.field(name="createdAt", default=None)
    subject: str | None = None


class Other(msgspec.Struct, gc=False):
    """Of any other collection."""

    created: str | None = msgspec.field(name="createdAt", default=None)


_NO_MEDIA: Final = Media()
_TAG: Final = "app.bsky.richtext.facet#tag"
_LINK: Final = "app.bsky.richtext.facet#link"
_MENTION: Final = "app.bsky.richtext.facet#mention"

_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)


def reader(form: type[Hot], empty: Hot) -> Callable[[Sequence[bytes]], list[Hot]]:
    """Return what reads the JSON of records, objects, in one of the forms; it never fails.

    Args:
        form: all records are read as.
        empty: what stands for an empty text.
    """
    strict, lenient = msgspec.json.Decoder(form).decode, _LENIENT[form]

    def read(records: Sequence[bytes]) -> list[Hot]:
        try:
            return [strict(record) if record else empty for record in records]
        except _UNREADABLE:
            return [read_one(record) if record else empty for record in records]

    def read_one(record: bytes) -> Hot:
        try:
            return strict(record)
        except _UNREADABLE:
            return lenient(_whole(record))

    return read


def _whole(record: bytes) -> Any:
    try:
        return msgspec.json.decode(record)
    except _UNREADABLE:
        return None  # such as a number beyond all floats: JSON, and nothing to read from


def _post(record: Any) -> Post:
    found = _object(record)
    reply = _object(found.get("reply"))
    return Post(
        _text(found.get("createdAt")),
        _text(found.get("text")),
        _texts(found.get("langs")),
        Reply(_ref(reply.get("parent")), _ref(reply.get("root"))),
        [_facet(one) for one in _list(found.get("facets"))],
        _texts(found.get("tags")),
        _embed(_object(found.get("embed"))),
    )


def _about(record: Any) -> About:
    found = _object(record)
    return About(_text(found.get("createdAt")), _ref(found.get("subject")), _ref(found.get("via")))


def _follow(record: Any) -> Follow:
    found = _object(record)
    return Follow(_text(found.get("createdAt")), _text(found.get("subject")))


def _other(record: Any) -> Other:
    return Other(_text(_object(record).get("createdAt")))


_LENIENT: Final[dict[type[Hot], Callable[[Any], Hot]]] = {
    Post: _post,
    About: _about,
    Follow: _follow,
    Other: _other,
}


def _embed(found: dict[str, Any]) -> Embed:
    quoted = _object(found.get("record"))
    return Embed(
        _text(found.get("$type")),
        _external(found.get("external")),
        Quoted(_text(quoted.get("uri")), _ref(quoted.get("record"))),
        Media(_external(_object(found.get("media")).get("external"))),
    )


def _external(value: Any) -> External:
    return External(_text(_object(value).get("uri")))


def _facet(value: Any) -> Facet:
    features: Iterable[dict[str, Any]] = map(_object, _list(_object(value).get("features")))
    return Facet(
        [
            Feature(*(_text(one.get(name)) for name in ("$type", "tag", "uri", "did")))
            for one in features
        ]
    )


def _ref(value: Any) -> Ref:
    found = _object(value)
    return Ref(_text(found.get("uri")), _text(found.get("cid")))


def _object(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}


def _list(value: Any) -> list[Any]:
    return value if type(value) is list else []


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


def _texts(value: Any) -> list[str] | None:
    return [one for one in value if type(one) is str] if type(value) is list else None
