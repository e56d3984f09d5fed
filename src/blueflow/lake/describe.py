"""Whose lake it is: made up or live, said once, when it is new."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from blueflow.errors import CommitLogError, OtherSourceError
from blueflow.files.layout import SIMULATED_MARK, SIMULATED_TEXT, data_kind
from blueflow.lake.layout import DESCRIPTION, FRESH, RAW
from blueflow.lake.logrecord import Description, decode, encode

if TYPE_CHECKING:
    from blueflow.lake.store import Store


async def describe(store: Store, *, simulated: bool) -> None:
    """Make sure that the lake is of our kind; describe it when it is new.

    Raises:
        OtherSourceError: it holds the other kind of data, simulated or live.
        CommitLogError: there are files of a lake, and nothing that says whose.
    """
    data = await store.get(DESCRIPTION)
    if data is None:
        for root in (FRESH, RAW):
            if found := await store.list(f"{root}/", limit=1):
                problem = "it is there, and no _blueflow/lake.json says what it belongs to"
                raise CommitLogError(f"{store.url}/{found[0].key}", problem)
        mine = Description(simulated, time.time())
        if await store.put_new(DESCRIPTION, encode(mine)):
            data = encode(mine)
        else:  # another writer was first
            data = await store.get(DESCRIPTION) or b""
    found_kind = decode(f"{store.url}/{DESCRIPTION}", Description, data).simulated
    if found_kind != simulated:
        there, ours = data_kind(simulated=found_kind), data_kind(simulated=simulated)
        raise OtherSourceError(store.url, there, ours)
    if simulated:
        await store.put_new(SIMULATED_MARK, SIMULATED_TEXT.encode())
