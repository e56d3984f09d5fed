"""The watermark is never ahead of what is read, and comes when all is read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blueflow.kafka.watermark import Watermark


def test_it_waits_for_every_partition_to_pass_its_end() -> None:
    mark: Watermark[str] = Watermark()
    assert mark.step(500, {"a": 3, "b": 0}, {"a": (3, 90), "b": (2, 90)}, 100) == 0
    assert mark.step(700, {"a": 5, "b": 1}, {"a": (5, 101), "b": (2, 101)}, 110) == 0
    assert mark.step(900, {"a": 5, "b": 2}, {"a": (5, 111), "b": (9, 111)}, 120) == 500


def test_an_end_that_was_asked_before_the_event_was_seen_does_not_count() -> None:
    mark: Watermark[str] = Watermark()
    mark.step(500, {"a": 3}, {"a": (3, 100)}, 100)
    assert mark.step(500, {"a": 3}, {"a": (3, 100)}, 200) == 0
    assert mark.step(500, {"a": 3}, {"a": (3, 201)}, 300) == 500


def test_a_broker_that_never_answered_holds_it() -> None:
    mark: Watermark[str] = Watermark()
    mark.step(500, {"a": 3, "b": 0}, {"a": (3, 1), "b": (None, None)}, 100)
    assert mark.step(500, {"a": 3, "b": 0}, {"a": (3, 200), "b": (None, None)}, 300) == 0


@given(st.data())
def test_what_is_older_than_it_was_read(data: st.DataObject) -> None:
    """A producer writes events in order to some partitions; a reader takes them at its own pace."""
    partitions = ["a", "b", "c"]
    logs: dict[str, list[int]] = {name: [] for name in partitions}
    positions = dict.fromkeys(partitions, 0)
    mark: Watermark[str] = Watermark()
    now_ms = event_ms = newest_ms = 0
    for _ in range(data.draw(st.integers(1, 40))):
        now_ms += data.draw(st.integers(1, 5))
        for name in data.draw(st.lists(st.sampled_from(partitions), max_size=4)):
            event_ms += data.draw(st.integers(0, 3))
            logs[name].append(event_ms)
        for name in partitions:
            end = data.draw(st.integers(positions[name], len(logs[name])))
            newest_ms = max([newest_ms, *logs[name][positions[name] : end]])
            positions[name] = end
        ends = {name: (len(logs[name]), now_ms) for name in partitions}
        reached_ms = mark.step(newest_ms, positions, ends, now_ms)
        unread = [one for name in partitions for one in logs[name][positions[name] :]]
        assert all(one >= reached_ms for one in unread)
