"""Proves that the logs, the files and the markers of a lake agree. It changes nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from blueflow.errors import CommitLogError
from blueflow.lake.evidence import gather
from blueflow.lake.findings import Finding, by_severity, findings
from blueflow.lake.hours import Limits, plan
from blueflow.lake.layout import DESCRIPTION, hour_name
from blueflow.lake.logrecord import Description, decode
from blueflow.lake.shardlogs import last_records
from blueflow.lake.survey import Survey

if TYPE_CHECKING:
    from blueflow.lake.store import Store

__all__ = ["Finding", "verify"]

LATENESS_S: Final = 300.0  # as the setting's default
_LATER: Final = "Nothing, if the keeper runs; else `blueflow lake compact`."


async def verify(
    store: Store,
    *,
    deep: bool = False,
    lateness_s: float = LATENESS_S,
    now_s: float | None = None,
) -> list[Finding]:
    """Return what does not fit together, errors first; none at all is a lake without a fault.

    It may run while writers and the keeper work: what they do meanwhile is no finding.

    Args:
        store: an open one that holds the lake.
        deep: read every file whole and compare its checksum.
        lateness_s: how long the keeper waits after the end of an hour.
        now_s: seconds since 1970; the clock when not given.

    Raises:
        BlueflowError: what the store raises.
    """
    now_s = time.time() if now_s is None else now_s
    found = findings(await gather(store, deep=deep), now_s=now_s)
    found += await _description(store)
    found += await _waiting(store, lateness_s, now_s)
    return by_severity(found)


async def _description(store: Store) -> list[Finding]:
    data = await store.get(DESCRIPTION)
    problem = "it is missing"
    if data is not None:
        try:
            decode(DESCRIPTION, Description, data)
        except CommitLogError as error:
            problem = error.problem
        else:
            return []
    return [Finding("error", DESCRIPTION, problem, "Start a writer, or put it back from a copy.")]


async def _waiting(store: Store, lateness_s: float, now_s: float) -> list[Finding]:
    """Return the hours that are closed and not compacted yet."""
    try:
        last = await last_records(store)
        todo = plan(last, await Survey(store).look(), Limits(round(lateness_s * 1e6)), now_s=now_s)
    except CommitLogError:
        return []  # damage is told by what it is
    due: dict[int, list[str]] = {}
    for hour in todo.due:
        due.setdefault(hour.hour, []).append(hour.dataset)
    return [
        Finding(
            "note",
            hour_name(hour),
            f"this hour is closed and not compacted yet: {', '.join(datasets)}",
            _LATER,
        )
        for hour, datasets in sorted(due.items())
    ]
