"""Whatever a writer and a keeper do between two answers of the store: each row is there once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lake.folderstore import FolderStore
from tests.lake.lakes import H16, HOUR_US, WrittenLake, at, post

from blueflow.lake.joined import Joined, each
from blueflow.lake.scan import dataset_of
from blueflow.lake.schema import SCHEMAS
from blueflow.lake.span import Span

if TYPE_CHECKING:
    from collections.abc import Callable

HOURS = 3
steps = st.lists(
    st.tuples(st.sampled_from(("publish", "compact", "sweep")), st.integers(0, HOURS - 1)),
    max_size=12,
)
spans = st.sampled_from(
    [Span(), Span(at(0)), Span(at(0), at(3)), Span(at(1), at(2)), Span(at(-900), at(900))]
)


class Busy:
    """A lake on which one step is done before each list."""

    def __init__(self, folder: Any, todo: list[tuple[str, int]]) -> None:
        self.lake = WrittenLake(folder)
        self.store = FolderStore(folder, lambda _prefix: self.step())
        self.published: set[int] = set()
        self.turn = 0
        self._marked: dict[int, int] = {}  # by hour: in which turn
        self._todo = iter(todo)
        self.done = False

    def step(self) -> None:
        what, hour = next(self._todo, ("", 0))
        self.done = not what
        if what == "publish":
            seq = len(self.published) + 1
            self.lake.publish("posts", [post(at(hour, seq / 100), seq, rkey=str(seq))])
            self.published.add(seq)
        elif what == "compact":
            self.lake.compact("posts", H16 + hour)
            self._marked[hour] = self.turn
        elif what == "sweep" and self._marked.get(hour, self.turn) < self.turn:
            # The keeper waits 26 h: no reader that lists is so slow.
            self.lake.sweep("posts", H16 + hour)

    def visible(self, span: Span) -> set[int]:
        return {
            row
            for file in self.lake.published
            if span.touches(file.hour)
            for row in range(self._first(file.key), self._first(file.key) + file.rows)
        }

    def _first(self, key: str) -> int:
        keys = [file.key for file in self.lake.published]
        return keys.index(key) + 1


@settings(max_examples=50)  # each writes a lake
@given(steps, spans)
def test_a_list_has_each_row_once_whatever_happens_meanwhile(
    tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[str, int]], span: Span
) -> None:
    busy = Busy(tmp_path_factory.mktemp("lake"), todo)

    async def read() -> None:
        joined = Joined(busy.store)
        while not busy.done:
            busy.turn += 1
            before = busy.visible(span)
            hours = await joined.hours("posts", span)
            rows = dataset_of(hours, SCHEMAS["posts"], busy.store.filesystem(), Span())
            seqs = rows.to_table(columns=["seq"])["seq"].to_pylist()
            assert len(seqs) == len(set(seqs))
            assert before <= set(seqs) <= busy.visible(span)
            assert [one.hour for one in hours] == sorted({one.hour for one in hours})

    anyio.run(read)


async def test_each_keeps_the_order_and_the_limit() -> None:
    running = most = 0

    async def call(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10 - number):
            await anyio.lowlevel.checkpoint()
        running -= 1
        return number * 2

    assert await each(call, list(range(10)), 3) == [number * 2 for number in range(10)]
    assert most == 3
    assert await each(call, []) == []


@pytest.mark.parametrize(
    ("span", "lists"),
    [
        (Span(), 2),  # everything in one go, per root
        (Span(at(0)), 2),
        (Span(at(0), at(2)), 4),  # hour by hour
        (Span(at(0), at(0) + 20 * HOUR_US), 4),  # two days
        (Span(at(0), at(0) + 900 * HOUR_US), 2),
        (Span(at(0), at(0)), 0),
    ],
)
async def test_only_what_is_asked_for_is_listed(tmp_path: Any, span: Span, lists: int) -> None:
    prefixes: list[str] = []
    lake = WrittenLake(tmp_path)
    lake.publish("posts", [post(at(0), 1)])
    note: Callable[[str], None] = prefixes.append
    found = await Joined(FolderStore(tmp_path, note)).hours("posts", span)
    assert len(prefixes) == lists
    assert len(found) == (1 if lists else 0)
