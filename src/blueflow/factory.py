"""From settings to the source and the sink they name."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from blueflow import quantities
from blueflow.errors import (
    BlueflowError,
    MissingExtraError,
    RecordingError,
    SettingError,
    SimulatedRelayError,
    SinkLoadError,
    SinkUrlError,
    SourceUrlError,
)
from blueflow.interfaces import Sink
from blueflow.masking import mask_credentials
from blueflow.source.firehose import FirehoseSource

if TYPE_CHECKING:
    from blueflow.decode import Check
    from blueflow.events import Position
    from blueflow.interfaces import Source
    from blueflow.kafka.connection import Connection
    from blueflow.lake.s3client import S3Options
    from blueflow.lake.store import Store
    from blueflow.metrics import LakeMetrics, Metrics
    from blueflow.settings import Settings
    from blueflow.source.recorder import Recorder
    from blueflow.testing.relay import RelayProcess

SIM = "sim"
REPLAY = "replay:"
STDOUT = "stdout"
JSONL = "jsonl:"
KAFKA = "kafka://"
LAKE = "lake:"
_SINK_PARTS = ("resume", "write", "flush", "durable", "close")

_logger = logging.getLogger(__name__)


class _Options(TypedDict):
    collections: tuple[str, ...]
    dids: tuple[str, ...]
    check: Check
    cursor: str
    on_sequence_reset: str
    connect_wait_s: float
    stall_timeout_s: float | None
    ping_interval_s: float
    buffer_bytes_max: int
    metrics: Metrics
    recorder: Recorder | None


def source_of(settings: Settings, metrics: Metrics, recorder: Recorder | None = None) -> Source:
    """Return the source that `--source` names, not started.

    Raises:
        SourceUrlError: it names none.
        SettingError: a recording was to be recorded again.
    """
    url, check = settings.source, cast("Check", settings.check)
    if url.startswith(REPLAY):
        if recorder is not None:
            problem = "a replay is not recorded again; copy the file"
            raise SettingError("record", settings.origin("record"), problem)
        from blueflow.source.replay import ReplaySource

        path = _path(settings, "source", url.removeprefix(REPLAY) or ".")
        return ReplaySource(
            path,
            name=settings.source_name,
            simulated=_is_simulated(path),
            collections=settings.collections,
            dids=settings.dids,
            check=check,
            cursor=settings.cursor,
            on_sequence_reset=settings.on_sequence_reset,
            speed=settings.speed,
            metrics=metrics,
        )
    if url == SIM:
        return SimulatedSource(settings, metrics, recorder)
    if "://" not in url:
        problem = "it is neither an address, a recording nor sim"
        raise SourceUrlError(mask_credentials(url), problem)
    return FirehoseSource(url, name=settings.source_name, **_options(settings, metrics, recorder))


class SimulatedSource(FirehoseSource):
    """`--source sim`: the simulated relay as a child process, and a connection to it."""

    def __init__(self, settings: Settings, metrics: Metrics, recorder: Recorder | None) -> None:
        _check_frames(settings)  # before an output folder is marked as simulated
        super().__init__(
            "ws://127.0.0.1",
            name=settings.source_name or SIM,
            simulated=True,
            **_options(settings, metrics, recorder),
        )
        self._settings = settings
        self._relay: RelayProcess | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self, after: Position | None) -> None:
        """Start the relay, then begin to read behind `after`."""
        from blueflow.testing.relay import spawn

        settings = self._settings
        self._relay = spawn(
            rate=settings.sim_rate,
            seed=settings.sim_seed,
            frames=None if after else settings.sim_frames,
            first_seq=after.seq + 1 if after else None,
            start_time="now",
        )
        await self._relay.start()
        self.connect_to(self._relay.url)
        await super().start(after)
        if self._stopped:  # by another task meanwhile: it found no process to stop
            await self._relay.stop()
            return
        self._watching = asyncio.create_task(self._watch_relay(self._relay), name="sim-watch")

    async def _watch_relay(self, relay: RelayProcess) -> None:
        """End with the reason when the child ends: nobody else will ever listen at its port."""
        self._fail(SimulatedRelayError(f"has ended ({await relay.ended()})"))

    async def stop(self) -> None:
        """Close the connection and stop the relay."""
        if self._watching is not None:
            self._watching.cancel()
        try:
            await super().stop()
        finally:
            if self._relay is not None:
                await self._relay.stop()


def _check_frames(settings: Settings) -> None:
    if settings.sim_frames is None:
        return
    from blueflow.testing.frames import read_recording

    try:
        next(read_recording(Path(settings.sim_frames)), None)
    except OSError as error:
        raise _unusable_frames(settings, error.strerror or str(error)) from error
    except RecordingError as error:
        problem = f"it is no recording of plain frames ({error.problem})"
        raise _unusable_frames(settings, problem) from error


def _unusable_frames(settings: Settings, problem: str) -> SettingError:
    origin = settings.origin("sim_frames")
    return SettingError("sim_frames", origin, f"{settings.sim_frames}: {problem}")


def sink_of(settings: Settings, source: Source, metrics: Metrics) -> Sink:
    """Return the sink that `--sink` names, not resumed.

    Raises:
        SinkUrlError: it names none.
        MissingExtraError: its libraries are not installed.
        SinkLoadError: a class of the user's cannot be loaded or is no sink.
    """
    url = settings.sink
    if url is None:
        raise SinkUrlError("", "none was given")
    if url == STDOUT:
        from blueflow.files.stdout import StdoutSink

        return StdoutSink()
    if url.startswith(JSONL):
        from blueflow.files.jsonl import JsonlSink

        return JsonlSink(
            folder_of(settings, url),
            origin_source=source.name,
            simulated=source.simulated,
            pipeline=settings.pipeline,
            **_commit_options(settings),
        )
    if url.startswith(LAKE):
        return _lake_sink(settings, url.removeprefix(LAKE), source, metrics)
    if url.startswith(KAFKA):
        return _kafka_sink(settings, url.removeprefix(KAFKA).rstrip("/"), source, metrics)
    if url.startswith(KAFKA.rstrip("/")):
        raise SinkUrlError(settings.shown("sink"), f"Kafka's address begins with {KAFKA}")
    module, _, rest = url.partition(":")
    name, _, argument = rest.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise SinkUrlError(settings.shown("sink"), "there is no such sink")
    return _load(settings.shown("sink"), module, name, argument)


class _CommitOptions(TypedDict, total=False):
    commit_interval_s: float
    commit_bytes_max: int


def _commit_options(settings: Settings) -> _CommitOptions:
    """Return what is set of how often a sink commits; each has defaults of its own."""
    options: _CommitOptions = {}
    if settings.commit_interval_s is not None:
        options["commit_interval_s"] = settings.commit_interval_s
    if settings.commit_bytes_max is not None:
        options["commit_bytes_max"] = settings.commit_bytes_max
    return options


def _kafka_sink(settings: Settings, servers: str, source: Source, metrics: Metrics) -> Sink:
    servers = servers or settings.kafka_bootstrap_servers or ""
    shown = settings.shown("sink")
    if not servers:
        raise SinkUrlError(shown, "there is no HOST:PORT in it")
    if "@" in servers:
        problem = "credentials do not belong in it; use --kafka-username and its password"
        raise SinkUrlError(shown, problem)
    try:
        servers = quantities.servers(servers)
    except ValueError as error:
        raise SinkUrlError(shown, "it is not kafka://HOST:PORT[,HOST:PORT]") from error
    try:
        from blueflow.kafka.sink import KafkaSink
        from blueflow.kafka.topics import TopicWishes
    except ModuleNotFoundError as error:
        raise MissingExtraError("kafka", "the Kafka sink and reader") from error
    return KafkaSink(
        connection_of(settings, servers),
        origin_source=source.name,
        simulated=source.simulated,
        pipeline=settings.pipeline,
        topic_prefix=settings.topic_prefix,
        route=settings.route,
        delivery=settings.delivery,
        topics=TopicWishes(
            settings.partitions, settings.kafka_replication, settings.kafka_retention_s
        ),
        compression=None if settings.kafka_compression == "none" else settings.kafka_compression,
        transaction_timeout_s=settings.transaction_timeout_s,
        connect_wait_s=settings.connect_wait_s,
        metrics=metrics,
        **_commit_options(settings),
    )


def connection_of(settings: Settings, servers: str) -> Connection:
    """Return how to reach brokers and to log in there.

    Raises:
        MissingExtraError: the extra `kafka` is not installed.
    """
    try:
        from blueflow.kafka.connection import Connection
    except ModuleNotFoundError as error:
        raise MissingExtraError("kafka", "the Kafka sink and reader") from error
    protocol = settings.kafka_security_protocol or (
        "sasl_ssl" if settings.kafka_username else "plaintext"
    )
    return Connection(
        servers,
        security_protocol=protocol.upper(),
        sasl_mechanism=settings.kafka_sasl_mechanism.upper(),
        username=settings.kafka_username,
        password=settings.kafka_password,
        ca_file=_file(settings.kafka_ca_file),
        cert_file=_file(settings.kafka_cert_file),
        key_file=_file(settings.kafka_key_file),
    )


def _lake_sink(settings: Settings, url: str, source: Source, metrics: Metrics) -> Sink:
    if not url:
        raise SinkUrlError(settings.shown("sink"), "there is no folder and no s3://BUCKET in it")
    try:
        from blueflow.lake.writer import LakeWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError("lake", "lakes") from error
    return LakeWriter(
        url,
        origin_source=source.name,
        simulated=source.simulated,
        pipeline=settings.pipeline,
        s3=s3_of(settings),
        lateness_s=settings.lateness_s,
        keep_fresh_s=settings.keep_fresh_s,
        compaction=settings.compaction == "on",
        accept_loss=settings.accept_loss == "yes",
        metrics=metrics,
        **_commit_options(settings),
    )


def lake_store_of(settings: Settings, metrics: LakeMetrics) -> Store:
    """Return the store of the lake that `--lake` names, not open.

    Raises:
        MissingExtraError: the extra `lake` is not installed.
    """
    s3 = s3_of(settings)
    from blueflow.lake.address import store_of

    return store_of(settings.lake, s3, metrics)


def s3_of(settings: Settings) -> S3Options:
    """Return where the S3 server is and how to log in there.

    Raises:
        MissingExtraError: the extra `lake` is not installed.
    """
    try:
        from blueflow.lake.s3client import S3Options
    except ModuleNotFoundError as error:
        raise MissingExtraError("lake", "lakes") from error
    return S3Options(
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key,
        region=settings.s3_region,
    )


def _file(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser())


def quarantine_of(settings: Settings) -> Path:
    """Return the folder of the quarantine: as set, beside the output, or in the user's state."""
    if settings.quarantine_dir is not None:
        return settings.quarantine_dir.expanduser()
    if settings.sink is not None and settings.sink.startswith(JSONL):
        return folder_of(settings, settings.sink) / "_blueflow" / "quarantine"
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(state).expanduser() / "blueflow" / "quarantine"
    except RuntimeError:  # a user without a home, as containers have
        return _temporary_folder(f"blueflow-quarantine-{os.getuid()}")


def _temporary_folder(name: str) -> Path:
    """Return a folder that is ours alone: others may take a name that can be guessed."""
    try:
        folder = Path(tempfile.gettempdir(), name)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if folder.lstat().st_uid == os.getuid():
            return folder
        return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    except OSError:  # nothing can be written anywhere: told when there is something to write
        return Path(name).absolute()


def folder_of(settings: Settings, url: str) -> Path:
    """Return the folder that a `jsonl:` sink writes to."""
    text = url.removeprefix(JSONL)
    if not text:
        raise SinkUrlError(settings.shown("sink"), "there is no folder in it")
    return _path(settings, "sink", text)


def _path(settings: Settings, name: str, text: str) -> Path:
    try:
        return quantities.path(text)
    except ValueError as error:
        raise SettingError(name, settings.origin(name), f"{text!r} {error}") from error


def _is_simulated(path: Path) -> bool:
    """Tell whether a recording, or the output folder that a segment lies in, is marked so."""
    from blueflow.files.layout import SIMULATED_MARK
    from blueflow.source.recorder import SIMULATED_SUFFIX

    marks = [Path(f"{path}{SIMULATED_SUFFIX}")]
    marks += [folder / SIMULATED_MARK for folder in path.absolute().parents[:3]]
    return any(map(os.path.exists, marks))  # pathlib's raises for a name that is too long


def _load(url: str, module: str, name: str, argument: str) -> Sink:
    with suppress(FileNotFoundError):  # somebody removed the folder that we were started in
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # as `python -m` would: a sink beside the notebook is found
    try:
        make = getattr(import_module(module), name, None)
    except Exception as error:
        raise _unloadable(url, f"{module} cannot be imported", error) from error
    if not callable(make):
        raise SinkLoadError(url, f"{module} has no class {name}")
    try:
        made = make(argument)
    except BlueflowError:
        raise
    except Exception as error:
        raise _unloadable(url, f"{name}({argument!r}) failed", error) from error
    missing = [part for part in _SINK_PARTS if _lacks(made, part)]
    if missing:
        raise SinkLoadError(url, f"{name} has no {', '.join(missing)}")
    return cast("Sink", made)


def _unloadable(url: str, what: str, error: Exception) -> SinkLoadError:
    """Say in one line what the user's code did; who wrote it can have the traceback."""
    _logger.debug("the sink's own error", exc_info=error)
    problem = f"{what}: {type(error).__name__}: {error}"
    return SinkLoadError(url, mask_credentials(problem))


def _lacks(made: object, part: str) -> bool:
    """Tell whether a sink has no such part, or only the contract's, which does nothing."""
    own = getattr(type(made), part, None)
    return own is getattr(Sink, part) if own is not None else part not in vars(made)


def _options(settings: Settings, metrics: Metrics, recorder: Recorder | None) -> _Options:
    return {
        "collections": settings.collections,
        "dids": settings.dids,
        "check": cast("Check", settings.check),
        "cursor": settings.cursor,
        "on_sequence_reset": settings.on_sequence_reset,
        "connect_wait_s": settings.connect_wait_s,
        "stall_timeout_s": settings.stall_timeout_s,
        "ping_interval_s": settings.ping_interval_s,
        "buffer_bytes_max": settings.buffer_bytes_max,
        "metrics": metrics,
        "recorder": recorder,
    }
