"""Topic ids, asked of a real broker."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from blueflow.kafka.connection import Connection
from blueflow.kafka.topicids import topic_ids

if TYPE_CHECKING:
    from blueflow.testing.services.kafka import KafkaBroker

TOOL = "org.apache.kafka.tools.TopicCommand"


async def test_a_topic_that_is_made_anew_has_another_id(kafka: KafkaBroker) -> None:
    connection = Connection(kafka.bootstrap)
    name = f"ids-{secrets.token_hex(4)}"
    assert await topic_ids(connection, [name]) == {}
    await kafka.tool(TOOL, "--create", "--topic", name)
    first = await topic_ids(connection, [name, "missing"])
    assert set(first) == {name}
    assert len(first[name]) == 36
    assert await topic_ids(connection, [name]) == first
    await kafka.tool(TOOL, "--delete", "--topic", name)
    await kafka.tool(TOOL, "--create", "--topic", name)
    again = await topic_ids(connection, [name])
    assert set(again) == {name}
    assert again != first
