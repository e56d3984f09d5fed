"""What a person sees of a run: a line that is kept up to date, and a summary at the end."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import anyio

from blueflow.factory import JSONL, KAFKA, LAKE, SIM, folder_of
from blueflow.logs import CLEAR_LINE, tell
from blueflow.settings import SETTINGS
from blueflow.source.firehose import FirehoseSource

if TYPE_CHECKING:
    from blueflow.interfaces import Source
    from blueflow.pipeline import Flow
    from blueflow.settings import Settings

_TERMINAL_S, _LINES_S, _LOG_S = 1.0, 5.0, 10.0
_SUMMARY_WAIT_S = 2.0  # for a terminal that is stopped
_UNITS = ("B", "kB", "MB", "GB", "TB")
_THOUSAND = 1000.0
_COLUMNS = 80  # of a terminal that does not say
_SEGMENTS_MAX = 10_000  # months of segments would hold the end of a run up

_logger = logging.getLogger(__name__)


class Progress:
    """Shows how a run gets on: in place on a terminal, else in lines of text or log records."""

    def __init__(self, flow: Flow, source: Source, settings: Settings) -> None:
        self._flow, self._source = flow, source
        self._text = for_people(settings)
        self._in_place = self._text and sys.stderr.isatty()
        self._began_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began_s

    async def show(self) -> None:
        """Show progress until cancelled."""
        events, then_s = self._flow.events, time.monotonic()
        while True:
            await anyio.sleep(_TERMINAL_S if self._in_place else _LINES_S if self._text else _LOG_S)
            now_s = time.monotonic()
            rate = (self._flow.events - events) / (now_s - then_s)
            events, then_s = self._flow.events, now_s
            if self._in_place:
                tell(CLEAR_LINE + self._line(rate)[: _columns() - 1])
            elif self._text:
                tell(self._line(rate) + "\n")
            else:
                _logger.info("progress", extra=self._numbers(rate))

    def end(self) -> None:
        """Leave the last line as it is."""
        if self._in_place:
            tell("\n")

    def _line(self, rate: float) -> str:
        flow, numbers = self._flow, self._numbers(rate)
        parts = [
            f"{flow.events:,} events",
            f"{rate:,.0f}/s",
            f"seq {numbers['seq']:,}" if flow.position else "no seq yet",
            f"behind {numbers['behind_s']:,.1f} s" if numbers["behind_s"] is not None else "",
            f"{_size(flow.frame_bytes)} read",
            f"{numbers['reconnects']} reconnects",
        ]
        if flow.rejected:
            parts.append(f"{flow.rejected} in quarantine")
        return "  ".join(filter(None, parts))

    def _numbers(self, rate: float) -> dict[str, object]:
        flow, source = self._flow, self._source
        latest_us = source.latest_time_us if isinstance(source, FirehoseSource) else 0
        return {
            "events": flow.events,
            "events_per_s": round(rate, 1),
            "seq": flow.position.seq if flow.position else None,
            "durable_seq": flow.durable.seq if flow.durable else None,
            "behind_s": round(time.time() - latest_us / 1e6, 1) if latest_us else None,
            "frame_bytes": flow.frame_bytes,
            "reconnects": source.reconnects if isinstance(source, FirehoseSource) else 0,
            "quarantined": flow.rejected,
        }


def for_people(settings: Settings) -> bool:
    """Tell whether stderr is read by a person and not by a program."""
    return settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())


def command_name() -> str:
    """Return how a person starts blueflow here: its command, or with the interpreter."""
    if shutil.which("blueflow"):
        return "blueflow"
    python = Path(sys.executable)
    with suppress(FileNotFoundError):  # somebody removed the folder that we were started in
        if python.is_relative_to(Path.cwd()):
            python = python.relative_to(Path.cwd())
    return f"{python} -m blueflow"


def summary(flow: Flow, settings: Settings, source: Source, elapsed_s: float) -> None:
    """Say what a run did and how to go on: to a person in lines, to a log as a record."""
    reconnects = source.reconnects if isinstance(source, FirehoseSource) else 0
    if not for_people(settings):
        extra = {
            "events": flow.events,
            **{f"events_{name}": number for name, number in flow.by_dataset.most_common()},
            "elapsed_s": round(elapsed_s, 1),
            "frame_bytes": flow.frame_bytes,
            "seq": flow.position.seq if flow.position else None,
            "durable_seq": flow.durable.seq if flow.durable else None,
            "reconnects": reconnects,
            "quarantined": flow.rejected,
        }
        _logger.info("finished", extra=extra)
        return
    kinds = ", ".join(f"{number:,} {name}" for name, number in flow.by_dataset.most_common())
    made_up = " from the simulated network" if source.simulated else f" from {source.name}"
    rate = flow.events / elapsed_s if elapsed_s else 0.0
    wrote = f"{flow.events:,} events{made_up} in {elapsed_s:.1f} s ({rate:,.0f}/s)"
    read = f"{flow.frames:,} frames, {_size(flow.frame_bytes)} read, {reconnects} reconnects"
    lines = [f"{wrote}: {kinds}" if kinds else wrote, f"{read}, {flow.rejected} in quarantine"]
    if settings.sink is not None and settings.sink.startswith(JSONL):
        lines += _about_folder(folder_of(settings, settings.sink), flow)
    if settings.sink is not None and settings.sink.startswith(KAFKA):
        lines += _about_topics(settings, flow)
    if settings.sink is not None and settings.sink.startswith(LAKE):
        lines += _about_lake(settings.sink.removeprefix(LAKE), flow)
    if settings.source == SIM:
        live = "--sink jsonl:live-data"
        if settings.sink is not None and settings.sink.startswith(LAKE):
            live = "--sink lake:live-lake"
        if settings.sink is not None and settings.sink.startswith(KAFKA):
            live = f"--sink {settings.shown('sink')} --topic-prefix live."
        lines.append(f"all of it is simulated; go live:\n  {command_name()} produce {live}")
    tell("\n".join(lines) + "\n", wait_s=_SUMMARY_WAIT_S)


def _about_folder(folder: Path, flow: Flow) -> list[str]:
    segments = sorted(islice(folder.glob("*/hour=*/*.jsonl.zst"), _SEGMENTS_MAX))
    size = sum(map(_size_of, segments))
    more = "at least " if len(segments) == _SEGMENTS_MAX else ""
    lines = [f"{more}{len(segments)} segments, {_size(size)}, in {folder}/<dataset>/hour=…/"]
    if flow.durable is not None:
        lines.append(f"durable to seq {flow.durable.seq:,}; the same command goes on from there")
    posts = [path for path in segments if path.parent.parent.name == "posts"]
    if posts:
        source = quote(f"replay:{posts[-1]}")
        look = f"{command_name()} produce --source {source} --sink stdout --limit 3"
        lines.append(f"look:\n  {look}")
    return lines


def _about_topics(settings: Settings, flow: Flow) -> list[str]:
    lines = [f"in the topics {settings.topic_prefix}* at {settings.shown('sink')}"]
    if flow.durable is not None:
        lines.append(f"durable to seq {flow.durable.seq:,}; the same command goes on from there")
    lines.append("look, in Python (docs/guides/consume.md has other clients):")
    servers = (settings.sink or "").removeprefix(KAFKA)
    given = f'"posts", connection="{servers}", until_end=True'
    if settings.topic_prefix != SETTINGS["topic_prefix"].default:
        given += f', topic_prefix="{settings.topic_prefix}"'
    lines.append("  import blueflow.kafka")
    lines.append(f"  async for batch in blueflow.kafka.read({given}): print(len(batch.events))")
    return lines


def _about_lake(url: str, flow: Flow) -> list[str]:
    lines = [f"in the lake {url}, as Parquet"]
    if flow.durable is not None:
        lines.append(f"durable to seq {flow.durable.seq:,}; the same command goes on from there")
    lines.append(f"look:\n  {command_name()} lake stats {quote(url)}")
    lines.append("in Python:\n  import blueflow")
    lines.append(f'  blueflow.lake.open("{url}").scan("posts").head(5)')
    return lines


def _size_of(segment: Path) -> int:
    try:
        return segment.stat().st_size
    except OSError:  # a reader may take it away at any moment
        return 0


def _columns() -> int:
    """Return the width of the terminal behind stderr; stdout may go elsewhere."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < _THOUSAND:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _THOUSAND
    return f"{count:.1f} {_UNITS[-1]}"
