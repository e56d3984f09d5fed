"""Every metric family of blueflow, bound once, so that counting costs one addition.

Names have base units and `_total` on counters alone; a help text ends in what to do. Callers count
per batch. Text of strangers never becomes a label: `Labelled` knows its values from the start, so
every series exists before its first event, and `rate()` sees that one too.
"""

from __future__ import annotations

import math
import platform
import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from prometheus_client import (
    GC_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.registry import Collector

from blueflow.config import version

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "other"

KINDS = ("commit", "identity", "account", "sync")
OPERATIONS = ("create", "update", "delete")
COLLECTION_GROUPS = {
    "app.bsky.feed.post": "post",
    "app.bsky.feed.like": "like",
    "app.bsky.feed.repost": "repost",
    "app.bsky.graph.follow": "follow",
    "app.bsky.graph.block": "block",
    "app.bsky.actor.profile": "profile",
}
RECONNECT_REASONS = (
    *(f"closed_{code}" for code in (1000, 1001, 1002, 1006, 1008, 1009, 1011, 1012, 1013)),
    *("closed_other", "connect_error", "error_frame", "frame_error", "http_429", "http_error"),
    *("ping_timeout", "stalled", "too_slow"),
)
IGNORED_REASONS = ("op", "type", "info")
INFO_NAMES = ("OutdatedCursor",)
REJECT_REASONS = (
    *("action", "body", "car", "cbor", "frame", "hash", "missing_block", "nesting", "not_a_map"),
    *("path", "size", "time", "too_big"),
)
DROPS = (
    ("quarantine", "full"),
    ("quarantine", "write_error"),
    ("record", "write_error"),
    ("drain", "timeout"),
)
OUTCOMES = ("ok", "error")
TRANSACTION_OUTCOMES = ("committed", "recovered", "failed", "hanging")
REBUILD_REASONS = ("away", "fenced", "refused")
DLQ_REASONS = ("refused", "too_large")

_CONNECT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WRITE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_COMMIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 300)
_COMPACTION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_BATCH_BYTES_BUCKETS = tuple(1024 * 4**power for power in range(7))
_BATCH_BUCKETS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_MICROSECONDS = 1_000_000

_Key = TypeVar("_Key", bound="Hashable")


class Metrics:
    """All families of one flow, in a registry of its own by default.

    Args:
        registry: where to register, e.g. that of the program blueflow runs in; by default a fresh
            one, with the families about the process and the interpreter.
        clock: seconds since 1970; ages are computed when somebody looks.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
            registry.register(GC_COLLECTOR)
        self.registry = registry
        self.source = SourceMetrics(registry, clock)
        self.pipeline = PipelineMetrics(registry)
        self.sink = SinkMetrics(registry, clock)
        self._clock = clock
        self._kafka: KafkaMetrics | None = None
        self._lake: LakeMetrics | None = None
        self._flow = Info("blueflow_flow", "What runs here; join it to others.", registry=registry)
        build = Info("blueflow_build", "Version of blueflow and of Python.", registry=registry)
        build.info({"version": version(), "python": platform.python_version()})

    @property
    def kafka(self) -> KafkaMetrics:
        """The families of the Kafka sink; they exist from the first use on."""
        if self._kafka is None:
            self._kafka = KafkaMetrics(self.registry)
        return self._kafka

    @property
    def lake(self) -> LakeMetrics:
        """The families of the lake; they exist from the first use on."""
        if self._lake is None:
            self._lake = LakeMetrics(self.registry, self._clock)
        return self._lake

    def describe(self, *, pipeline: str, source: str, sink: str, simulated: bool) -> None:
        """Tell what runs here. `source` is a name, `sink` a scheme: a URL may have secrets."""
        told = {"pipeline": pipeline, "source": source, "sink": sink}
        self._flow.info({**told, "simulated": str(simulated).lower()})

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format; its type is `CONTENT_TYPE`."""
        return generate_latest(_WithoutCreated(self.registry))


class Running:
    """A counter fed with the running totals that the cores keep since the start of the process."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._total = 0

    @property
    def total(self) -> int:
        """What was counted so far."""
        return self._total

    def inc(self, amount: int = 1) -> None:
        """Count `amount` more."""
        self.reach(self._total + amount)

    def reach(self, total: int) -> None:
        """Count up to `total`. A lower one than before is a bug of ours, and raises ValueError."""
        self._counter.inc(total - self._total)
        self._total = total


class Labelled(Generic[_Key]):
    """One counter per known key, bound at the start. Whatever else comes counts as `other`."""

    def __init__(self, family: Counter, known: Iterable[_Key], other: _Key) -> None:
        keys = dict.fromkeys((*known, other))
        self._children = {key: Running(_child(family, key)) for key in keys}
        self._other = self._children[other]

    def __getitem__(self, key: _Key) -> Running:
        return self._children.get(key, self._other)


class SourceMetrics:
    """The connection to the relay and what came over it."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        make = _Families("blueflow_source", registry)
        self._latest_time_s = math.nan
        self.connected = make.gauge(
            "connected",
            "1 while frames can arrive. 0 for minutes: see reconnects_total and the log.",
        )
        self.frames = make.counter("frames", "Frames received. A rate of 0 is an outage.")
        self.frame_bytes = make.counter("frame_bytes", "Bytes of the frames received.")
        self.last_seq = make.gauge("last_seq", "Seq of the newest frame received.", math.nan)
        lag = make.gauge(
            "lag_seconds",
            "How far the newest frame is behind the clock. Rising: this process or the relay is "
            "too slow; above the relay's retention (about 3 days) events are lost.",
        )
        lag.set_function(lambda: _age(clock, self._latest_time_s))
        self.connect_seconds = make.histogram(
            "connect_seconds", "Time to open a connection, TLS included.", _CONNECT_BUCKETS
        )
        self.reconnects = make.labelled(
            "reconnects",
            "Connections that ended, by reason. too_slow: the sink does not keep up; "
            "frame_error again and again: take another relay.",
            "reason",
            RECONNECT_REASONS,
        )
        self.missed_seqs = make.running(
            "missed_seqs",
            "Seqs the relay skipped. Gaps are legal; a steady rate is loss upstream: backfill.",
        )
        self.possible_loss_seqs = make.running(
            "possible_loss_seqs",
            "Seqs missing between the cursor and the first frame of a resume. Above 0: the relay "
            "may no longer have had them; backfill from the PDSes.",
        )
        self.replayed_frames = make.running(
            "replayed_frames", "Frames a resume sent again; skipped. Expected after reconnects."
        )
        self.duplicate_frames = make.running(
            "duplicate_frames",
            "Frames that came twice on one connection; skipped. A steady rate: tell the relay.",
        )
        self.late_frames = make.running(
            "late_frames",
            "Frames that came behind their successors; delivered. A steady rate: tell the relay.",
        )
        self.sequence_resets = make.counter(
            "sequence_resets",
            "Times the relay began to count anew. Events may be missing: backfill.",
        )
        self.ignored_frames = make.labelled(
            "ignored_frames",
            "Frames of kinds this version does not know; the spec says to ignore them. Update.",
            "reason",
            IGNORED_REASONS,
        )
        self.unknown_fields = make.running(
            "unknown_fields_frames",
            "Frames with fields newer than this version; the fields are ignored. Update.",
        )
        self.infos = make.labelled(
            "infos",
            "Remarks of the relay. OutdatedCursor: events between the cursor and its oldest are "
            "lost; backfill.",
            "name",
            INFO_NAMES,
        )
        self.buffer_bytes = make.gauge(
            "buffer_bytes", "Bytes read that the sink has not taken. Near the limit: a slow sink."
        )
        self.buffer_bytes_max = make.gauge(
            "buffer_bytes_limit", "Where reading pauses; set by --buffer-bytes-max."
        )
        self.reading_paused = make.gauge(
            "reading_paused", "1 while the buffer is full and reading waits for the sink."
        )
        self.paused_seconds = make.counter(
            "paused_seconds", "Time that reading waited for the sink. Steady: speed the sink up."
        )

    def newest(self, seq: int, time_us: int) -> None:
        """Note the newest frame: its seq and its relay time in microseconds, 0 when unknown."""
        self.last_seq.set(seq)
        if time_us:
            self._latest_time_s = time_us / _MICROSECONDS


class PipelineMetrics:
    """What happened to events between source and sink."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Families("blueflow_pipeline", registry)
        self.events = make.labelled(
            "events",
            "Events handed to the sink. A rate of 0 with frames coming: look at the filters.",
            "kind",
            KINDS,
        )
        self.operations = Operations(
            make.family(
                "operations",
                "Repository operations handed to the sink, by group of collections.",
                ["collection", "operation"],
            )
        )
        self.filtered_frames = make.running(
            "filtered_frames", "Frames without anything that --collection or --did wants."
        )
        self.quarantined = make.labelled(
            "quarantined",
            "Frames and operations that cannot be read, kept in the quarantine, by reason. "
            "A sudden rate: compare another relay, then report it.",
            "reason",
            REJECT_REASONS,
        )
        dropped = make.family(
            "dropped",
            "What was let go for good. Anything above 0: see the log for the place and the reason.",
            ["stage", "reason"],
        )
        self.dropped: Labelled[tuple[str, str]] = Labelled(dropped, DROPS, (OTHER, OTHER))
        self.batch_events = make.histogram(
            "batch_events", "Events per batch. Ever larger: the sink falls behind.", _BATCH_BUCKETS
        )


class Operations:
    """Counters by collection and operation; collections are clamped to a few groups."""

    def __init__(self, family: Counter) -> None:
        groups = (*COLLECTION_GROUPS.values(), OTHER)
        known = [(group, operation) for group in groups for operation in OPERATIONS]
        self._by_group: Labelled[tuple[str, str]] = Labelled(family, known, (OTHER, OTHER))

    def __getitem__(self, key: tuple[str, str]) -> Running:
        collection, operation = key
        return self._by_group[COLLECTION_GROUPS.get(collection, OTHER), operation]


class SinkMetrics:
    """What the sink took and what it made durable."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        make = _Families("blueflow_sink", registry)
        self._clock = clock
        self._durable_at_s = math.nan
        self.written_events = make.counter(
            "written_events", "Events the sink took; they may not be durable yet."
        )
        self.commits = make.labelled(
            "commits",
            "Times the sink made its output durable, by outcome. error: see the log; the process "
            "ends and resumes from the last one that is ok.",
            "outcome",
            OUTCOMES,
        )
        self.write_seconds = make.histogram(
            "write_seconds",
            "Time the sink took for one batch. Slow: the target is.",
            _WRITE_BUCKETS,
        )
        self.commit_seconds = make.histogram(
            "commit_seconds",
            "Time to make the output durable. Seconds: a slow disk or service.",
            _COMMIT_BUCKETS,
        )
        self.durable_seq = make.gauge(
            "durable_seq", "Seq a restart resumes behind. It never goes back.", math.nan
        )
        self.durable_time = make.gauge(
            "durable_time_seconds",
            "Relay time of that position, since 1970. Too old: the sink does not keep up.",
            math.nan,
        )
        age = make.gauge(
            "durable_age_seconds",
            "Time since the output last became durable, or since the start. Above a few "
            "--commit-interval: the sink hangs, or nothing arrives.",
        )
        age.set_function(lambda: _age(clock, self._durable_at_s))

    def begun(self) -> None:
        """Note that a sink that keeps a position is there; its age counts from now on."""
        self._durable_at_s = self._clock()

    def durable(self, seq: int, time_us: int) -> None:
        """Note the position that just became durable, and its relay time; 0 is unknown."""
        self.durable_seq.set(seq)
        if time_us:
            self.durable_time.set(time_us / _MICROSECONDS)
        self._durable_at_s = self._clock()


class KafkaMetrics:
    """What the Kafka sink sent, and what became of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Families("blueflow_kafka", registry)
        self.records = make.counter(
            "records", "Records the brokers took, cursor and dead letters included."
        )
        self.record_bytes = make.counter("record_bytes", "Bytes of their batches, compressed.")
        self.batch_records = make.histogram(
            "batch_records", "Records per batch. A few: too many partitions.", _BATCH_BUCKETS
        )
        self.batch_bytes = make.histogram(
            "batch_bytes", "Bytes per batch, compressed.", _BATCH_BYTES_BUCKETS
        )
        self.transactions = make.labelled(
            "transactions",
            "Transactions by outcome. failed: a try of one, repeated unless the process ends, see "
            "the log for the reason; recovered: the answer to the commit was lost, and Kafka had "
            "committed (not in records and bytes); hanging: one that the brokers had left open was "
            "ended.",
            "outcome",
            TRANSACTION_OUTCOMES,
        )
        self.rebuilds = make.labelled(
            "producer_rebuilds",
            "Producers discarded and built anew, by reason. away: a broker or the network; "
            "fenced: this process slept past the transaction timeout; refused: see the log.",
            "reason",
            REBUILD_REASONS,
        )
        self.send_seconds = make.histogram(
            "send_seconds",
            "Time from the first batch of a transaction to the last acknowledgement.",
            _COMMIT_BUCKETS,
        )
        self.transaction_seconds = make.histogram(
            "transaction_seconds",
            "Time of a whole transaction. Seconds: slow brokers.",
            _COMMIT_BUCKETS,
        )
        self.latency_seconds = make.histogram(
            "latency_seconds",
            "Time from an event's arrival at the sink until it can be read, by batch. Above 1 s: "
            "the brokers are slow, or --commit-interval is long.",
            _LATENCY_BUCKETS,
        )
        self.end_to_end_seconds = make.histogram(
            "end_to_end_seconds",
            "Relay time of the newest event of a transaction until it can be read. Rising: "
            "the whole pipeline is behind.",
            _LATENCY_BUCKETS,
        )
        self.dead_letters = make.labelled(
            "dead_letters",
            "Events that Kafka does not take, in the topic dlq with the reason and a pointer. "
            "Above 0: look at them, then fetch the records from their PDS.",
            "reason",
            DLQ_REASONS,
        )
        self.pending_bytes = make.gauge(
            "pending_bytes", "Bytes of events that wait for their transaction, or are in one."
        )


class LakeMetrics:
    """What went into the lake, and what its keeper did."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        make = _Families("blueflow_lake", registry)
        self._clock = clock
        self._committed_at_s = math.nan
        self.rows = make.counter("rows", "Rows published, in all data sets.")
        self.bytes = make.counter("bytes", "Bytes of the files published.")
        self.files = make.counter(
            "files", "Files published. Thousands an hour: make --commit-interval longer."
        )
        self.commits = make.labelled(
            "commits",
            "Records of the log by outcome. error: see the log; the process ends and resumes from "
            "the last one.",
            "outcome",
            OUTCOMES,
        )
        self.encode_seconds = make.histogram(
            "encode_seconds", "Time to make the files of a commit.", _COMMIT_BUCKETS
        )
        self.upload_seconds = make.histogram(
            "upload_seconds",
            "Time to store the files of a commit. Seconds: a slow store.",
            _COMMIT_BUCKETS,
        )
        self.flush_seconds = make.histogram(
            "flush_seconds",
            "Time of a whole commit, until its files are visible.",
            _COMMIT_BUCKETS,
        )
        self.open_bytes = make.gauge(
            "open_bytes", "Bytes of wire JSON that wait for their commit, or are in one."
        )
        self.watermark = make.gauge(
            "watermark_seconds",
            "Event time up to which the input is read, since 1970. Far behind the clock: the "
            "archive does not keep up, or the producer is down.",
            math.nan,
        )
        age = make.gauge(
            "commit_age_seconds", "Time since the last commit. Above a few --commit-interval: hung."
        )
        age.set_function(lambda: _age(clock, self._committed_at_s))
        self.rejected = make.running(
            "rejected_records", "Records of the topics that are no events; left out. See the log."
        )
        self.lost = make.running(
            "lost_input",
            "Offsets or seqs that were gone before they were read, accepted by --accept-loss.",
        )
        self.repaired_files = make.running(
            "repaired_files", "Files made anew because the store had forgotten their upload."
        )
        self.store_retries = make.running(
            "store_retries", "Calls of the store that were tried again. Steady: a slow store."
        )
        self.invisible_uploads = make.gauge(
            "invisible_uploads",
            "Uploads that are neither completed nor aborted. Ever more: look at `blueflow lake "
            "verify`.",
        )
        self.compactions = make.labelled(
            "compactions", "Hours compacted into raw/, by outcome.", "outcome", OUTCOMES
        )
        self.compaction_seconds = make.histogram(
            "compaction_seconds", "Time to compact one data set's hour.", _COMPACTION_BUCKETS
        )
        self.backlog_hours = make.gauge(
            "compaction_backlog_hours",
            "Closed hours without their marker, over all data sets. Above 6 for long: the keeper "
            "does not keep up, or fails.",
        )
        self.swept_files = make.counter(
            "swept_files", "Files of fresh/ removed 26 h after their hour's marker."
        )

    def committed(self) -> None:
        """Note that a commit is visible."""
        self._committed_at_s = self._clock()


class _Families:
    """Makes the families of one room under their common prefix."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        self._prefix, self._registry = prefix, registry

    def family(self, name: str, about: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"{self._prefix}_{name}_total", about, labels, registry=self._registry)

    def counter(self, name: str, about: str) -> Counter:
        return self.family(name, about)

    def running(self, name: str, about: str) -> Running:
        return Running(self.family(name, about))

    def labelled(self, name: str, about: str, label: str, known: Iterable[str]) -> Labelled[str]:
        return Labelled(self.family(name, about, [label]), known, OTHER)

    def gauge(self, name: str, about: str, value: float = 0.0) -> Gauge:
        gauge = Gauge(f"{self._prefix}_{name}", about, registry=self._registry)
        gauge.set(value)
        return gauge

    def histogram(self, name: str, about: str, buckets: Iterable[float]) -> Histogram:
        edges = tuple(buckets)
        return Histogram(f"{self._prefix}_{name}", about, buckets=edges, registry=self._registry)


class _WithoutCreated(Collector):
    """A registry without `_created`: OpenMetrics only, and many more series in the text format."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def _child(family: Counter, key: Hashable) -> Counter:
    return family.labels(*key) if isinstance(key, tuple) else family.labels(key)


def _age(clock: Callable[[], float], since_s: float) -> float:
    age_s = clock() - since_s
    return 0.0 if age_s < 0 else age_s  # clocks differ; nan, not known yet, stays nan
