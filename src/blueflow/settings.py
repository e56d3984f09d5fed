"""Every setting, declared once: its type, default, bounds, names and help.

`--help` pays for the import of this module, so it takes nothing heavy along.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from blueflow import quantities
from blueflow.masking import MASKED, mask_credentials
from blueflow.quantities import duration, size, whole, word

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_DAY_S = 86_400
_MIB = 1024**2
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    Attributes:
        parse: text -> value, or `ValueError` with the end of a sentence about the text.
        show: value -> text that `parse` reads again.
        unset: what None means, in a few words.
        many: the value is a tuple, and `parse` reads one item of it.
        secret: the value is never shown; credentials inside a URL never are, secret or not.
        bare: what the flag without a value means.
    """

    name: str
    group: str
    help: str
    default: Any
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str
    metavar: str = "TEXT"
    unset: str = "none"
    flag: str = ""
    environment: str = ""
    many: bool = False
    secret: bool = False
    bare: str | None = None

    def shown(self, value: object) -> str:
        """Return `value` as a person may see it."""
        if value is None or value == ():
            return self.unset
        if self.secret:
            return MASKED
        items = value if isinstance(value, tuple) else (value,)
        return mask_credentials(", ".join(map(self.show, items)))

    def read(self, raw: object) -> Any:
        """Turn what a source gave into the value.

        Raises:
            ValueError: the end of a sentence that begins with what was given.
        """
        if self.many:
            given = raw if isinstance(raw, (list, tuple)) else [raw]
            items = [item for one in given for item in _text_of(one).replace(",", " ").split()]
            return tuple(dict.fromkeys(map(self.parse, items)))
        return self.parse(_text_of(raw))


def _setting(group: str, default: _T, parse: Callable[[str], _T], about: str, **more: Any) -> _T:
    spec = Setting(name="", group=group, help=about, default=default, parse=parse, **more)
    declared: _T = field(default=default, metadata={"setting": spec})
    return declared


_seconds = partial(_setting, show=quantities.show_duration, metavar="DURATION")
_bytes = partial(_setting, show=quantities.show_size, metavar="SIZE")


def _list_of(parse: Callable[[str], str], about: str, **more: Any) -> tuple[str, ...]:
    spec = Setting(
        name="", group="filter", help=about, default=(), parse=parse, many=True, unset="all", **more
    )
    declared: tuple[str, ...] = field(default=(), metadata={"setting": spec})
    return declared


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings of one process. `config.load` makes one; in a program, name what differs.

    Names end in their unit; `SETTINGS` has the rest of what there is to say about each.
    """

    source: str = _setting(
        "input",
        "wss://bsky.network",
        quantities.text,
        "where events come from: wss://HOST (a relay), replay:FILE[.zst], or sim, the simulated "
        "network. The default is the public relay of Bluesky, live.",
        metavar="URL",
    )
    source_name: str | None = _setting(
        "input",
        None,
        quantities.label,
        "what events and positions carry as source. Two names are two sources: keep it.",
        metavar="NAME",
        unset="host of the source",
    )
    cursor: str = _setting(
        "input",
        "saved",
        quantities.cursor,
        "where to begin: saved (the position of the sink, else live), live, oldest, or a seq.",
        metavar="WHERE",
    )
    pipeline: str = _setting(
        "input",
        "default",
        quantities.label,
        "the name positions are kept under. A new name begins anew.",
        metavar="NAME",
    )
    speed: float = _setting(
        "input",
        math.inf,
        quantities.speed,
        "how fast to replay a recording: 1 is real time, 10 ten times that, max no waiting.",
        show=quantities.show_speed,
        metavar="FACTOR",
    )
    record: Path | None = _setting(  # noqa: RUF009 - it is `dataclasses.field`
        "input",
        None,
        quantities.path,
        "also write every frame received to FILE, for replay:FILE.",
        metavar="FILE",
        unset="not recorded",
    )
    check: str = _setting(
        "input",
        "all",
        word("all", "used", "none"),
        "which blocks to check against their hash: all, used (those of the records delivered) "
        "or none.",
        metavar="all|used|none",
    )
    on_sequence_reset: str = _setting(
        "input",
        "stop",
        word("stop", "continue"),
        "what to do when the relay begins to count anew: stop, or continue in a new epoch; "
        "events in between may be missing.",
        metavar="stop|continue",
    )

    collections: tuple[str, ...] = _list_of(
        quantities.collection,
        "only operations on this collection, such as app.bsky.feed.post or app.bsky.graph.*. "
        "May be given more than once.",
        flag="--collection",
        metavar="NSID",
    )
    dids: tuple[str, ...] = _list_of(
        quantities.did,
        "only this repository. May be given more than once.",
        flag="--did",
        metavar="DID",
    )
    limit: int | None = _setting(
        "filter",
        None,
        whole(1),
        "stop after N events.",
        metavar="N",
        unset="no limit",
    )
    for_s: float | None = _seconds(
        "filter", None, duration(0.001), "stop after this time.", unset="no limit"
    )

    sink: str | None = _setting(
        "output",
        None,
        quantities.text,
        "where events go: kafka://HOST:PORT, lake:DIR, lake:s3://BUCKET, stdout, jsonl:DIR, or a "
        "class of yours as package.module:Class.",
        metavar="SINK",
        unset="Kafka when its servers are set; else it has to be given",
    )
    commit_interval_s: float | None = _seconds(
        "output",
        None,
        duration(0.1, _DAY_S),
        "make the output durable at least this often. A crash re-reads no more than this.",
        unset="0.3s for Kafka, 60s for a folder or a lake",
    )
    commit_bytes_max: int | None = _bytes(
        "output",
        None,
        size(64 * 1024, 1024 * _MIB),
        "make the output durable when this much of it, uncompressed, is not.",
        unset="8MiB for Kafka, 64MiB for a folder or a lake",
    )
    quarantine_dir: Path | None = _setting(  # noqa: RUF009 - it is `dataclasses.field`
        "output",
        None,
        quantities.path,
        "where to keep input that cannot be read.",
        metavar="DIR",
        unset="beside the output, else the user's state folder",
    )
    drain_s: float = _seconds(
        "output",
        10.0,
        duration(0, 3600),
        "how long a stop may take to make everything durable. What is left comes again.",
    )

    kafka_bootstrap_servers: str | None = _setting(
        "kafka",
        None,
        quantities.text,
        "brokers to begin with, HOST:PORT,… When set, Kafka is the sink unless --sink says "
        "another.",
        environment="KAFKA_BOOTSTRAP_SERVERS",
        metavar="SERVERS",
    )
    topic_prefix: str = _setting(
        "kafka",
        "bluesky.",
        quantities.topic_prefix,
        "what the names of all topics begin with.",
        metavar="PREFIX",
    )
    route: str = _setting(
        "kafka",
        "by-kind",
        word("by-kind", "single"),
        "by-kind: posts, likes, reposts, follows, other, accounts; single: all in one topic.",
        metavar="by-kind|single",
    )
    partitions: int = _setting(
        "kafka",
        8,
        whole(1, 10_000),
        "partitions of each event topic that is created.",
        metavar="N",
    )
    kafka_replication: int | None = _setting(
        "kafka",
        None,
        whole(1, 100),
        "replicas of each topic that is created.",
        metavar="N",
        unset="the broker's default",
    )
    kafka_retention_s: float = _setting(
        "kafka",
        7.0 * _DAY_S,
        quantities.retention,
        "how long topics that are created keep events, or forever.",
        show=quantities.show_retention,
        metavar="DURATION",
    )
    delivery: str = _setting(
        "kafka",
        "exactly_once",
        word(
            *("exactly_once", "at_least_once"),
            same={"exactly-once": "exactly_once", "at-least-once": "at_least_once"},
        ),
        "exactly_once, by transactions, or at_least_once.",
        metavar="exactly_once|at_least_once",
    )
    kafka_compression: str = _setting(
        "kafka",
        "zstd",
        word("zstd", "snappy", "none"),
        "how batches are compressed: zstd, snappy or none.",
        metavar="zstd|snappy|none",
    )
    transaction_timeout_s: float = _seconds(
        "kafka",
        15.0,
        duration(1, 900),
        "after this the broker aborts the transaction of a dead producer; until then readers wait.",
    )
    kafka_security_protocol: str | None = _setting(
        "kafka",
        None,
        word("plaintext", "ssl", "sasl_plaintext", "sasl_ssl"),
        "plaintext, ssl, sasl_plaintext or sasl_ssl.",
        metavar="PROTOCOL",
        unset="plaintext; with a user name sasl_ssl",
    )
    kafka_sasl_mechanism: str = _setting(
        "kafka",
        "scram-sha-512",
        word("scram-sha-512", "scram-sha-256", "plain"),
        "how to log in: scram-sha-512, scram-sha-256 or plain.",
        metavar="MECHANISM",
    )
    kafka_username: str | None = _setting(
        "kafka", None, quantities.text, "user to log in as.", metavar="NAME"
    )
    kafka_password: str | None = _setting(
        "kafka",
        None,
        quantities.text,
        "its password; better from the environment, as every user of the machine sees flags.",
        metavar="SECRET",
        secret=True,
    )
    kafka_ca_file: Path | None = _setting(  # noqa: RUF009 - it is `dataclasses.field`
        "kafka",
        None,
        quantities.path,
        "certificates to trust, PEM.",
        metavar="FILE",
        unset="those of the system",
    )
    kafka_cert_file: Path | None = _setting(  # noqa: RUF009 - it is `dataclasses.field`
        "kafka", None, quantities.path, "certificate to show, PEM.", metavar="FILE"
    )
    kafka_key_file: Path | None = _setting(  # noqa: RUF009 - it is `dataclasses.field`
        "kafka",
        None,
        quantities.path,
        "its key, PEM.",
        metavar="FILE",
        unset="in the certificate's file",
    )

    lake: str = _setting(
        "lake",
        "s3://data-lake",
        quantities.text,
        "the lake that the archive writes: s3://BUCKET[/PREFIX] or a folder.",
        metavar="URL",
    )
    shard: str = _setting(
        "lake",
        "0/1",
        quantities.shard,
        "the part of the partitions that this archive reads: I/N, I from 0; all N have to run.",
        metavar="I/N",
    )
    lateness_s: float = _seconds(
        "lake",
        300.0,
        duration(0, 7 * _DAY_S),
        "how long after its end an hour may still get rows; then it is compacted and marked.",
    )
    keep_fresh_s: float = _seconds(
        "lake",
        26 * 3600.0,
        duration(0, 90 * _DAY_S),
        "how long the files of an hour stay in fresh/ once raw/ has them.",
    )
    compaction: str = _setting(
        "lake",
        "on",
        word("on", "off"),
        "on: compact closed hours beside writing; off: somebody else runs `blueflow lake compact`.",
        metavar="on|off",
    )
    accept_loss: str = _setting(
        "lake",
        "no",
        word("yes", "no"),
        "go on behind input that was gone before it was read; what is lost is noted and counted.",
        metavar="yes|no",
        bare="yes",
    )
    s3_endpoint: str | None = _setting(
        "lake",
        None,
        quantities.text,
        "address of the S3 server, with or without http:// or https://.",
        environment="MINIO_ENDPOINT",
        metavar="URL",
        unset="AWS",
    )
    s3_access_key: str | None = _setting(
        "lake",
        None,
        quantities.text,
        "its access key.",
        environment="MINIO_ACCESS_KEY",
        metavar="NAME",
        unset="the standard AWS chain",
    )
    s3_secret_key: str | None = _setting(
        "lake",
        None,
        quantities.text,
        "its secret key; better from the environment, as every user of the machine sees flags.",
        environment="MINIO_SECRET_KEY",
        metavar="SECRET",
        secret=True,
    )
    s3_region: str = _setting("lake", "us-east-1", quantities.label, "its region.", metavar="NAME")

    connect_wait_s: float = _seconds(
        "connection",
        30.0,
        duration(0.1, _DAY_S),
        "how long the first connection may take. Later ones are tried without end.",
    )
    stall_timeout_s: float | None = _seconds(
        "connection",
        None,
        duration(0.1, 3600),
        "reconnect after this much silence.",
        unset="adapts to the rate of the stream",
    )
    ping_interval_s: float = _seconds(
        "connection",
        15.0,
        duration(0.1, 3600),
        "how often to ask the relay whether it is alive.",
    )
    buffer_bytes_max: int = _bytes(
        "connection",
        32 * _MIB,
        size(8 * _MIB, 16_384 * _MIB),  # above one frame, which the spec lets have 5,000,000 bytes
        "how much to read ahead of the sink. When it is full, reading waits.",
    )

    log_level: str = _setting(
        "operation",
        "info",
        word(
            *("debug", "info", "warning", "error"),
            same={"warn": "warning", "critical": "error", "fatal": "error"},
        ),
        "how much to log: debug, info, warning or error.",
        environment="LOG_LEVEL",
        metavar="LEVEL",
    )
    log_format: str = _setting(
        "operation",
        "auto",
        word("auto", "text", "json"),
        "text, json (one object a line), or auto: text on a terminal, json elsewhere.",
        metavar="auto|text|json",
    )
    prometheus_port: int | None = _setting(
        "operation",
        None,
        quantities.port,
        "port of /metrics, /livez and /readyz; 0 turns them off. Without it a second process "
        "takes a free port, with it a busy port is an error.",
        environment="PROMETHEUS_PORT",
        metavar="PORT",
        unset="9401 for produce, 9402 for archive",
    )
    metrics_host: str = _setting(
        "operation",
        "127.0.0.1",
        quantities.text,
        "address they listen on; 0.0.0.0 opens them to the network.",
        metavar="ADDRESS",
    )

    sim_rate: float = _setting(
        "simulated network",
        500.0,
        quantities.rate,
        "events per second of the simulated network.",
        show=quantities.show_rate,
        metavar="RATE",
    )
    sim_seed: int = _setting(
        "simulated network",
        0,
        whole(0, 2**63 - 1),
        "seed of the simulated traffic; the same seed makes the same events.",
        metavar="N",
    )
    sim_frames: Path | None = _setting(  # noqa: RUF009 - it is `dataclasses.field`
        "simulated network",
        None,
        quantities.path,
        "recorded frames that the simulated network sends first.",
        metavar="FILE",
    )

    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def origin(self, name: str) -> str:
        """Say where the value of `name` came from, e.g. "environment LOG_LEVEL"."""
        changed = getattr(self, name) != SETTINGS[name].default
        return self.origins.get(name, "the program" if changed else "default")

    def shown(self, name: str) -> str:
        """Return the value of `name` as a person may see it: secrets and credentials masked."""
        return SETTINGS[name].shown(getattr(self, name))

    def __repr__(self) -> str:
        given = (name for name in SETTINGS if self.origin(name) != "default")
        return f"Settings({', '.join(f'{name}={self.shown(name)!r}' for name in given)})"


def _declared(name: str, spec: Setting) -> Setting:
    flag = spec.flag or "--" + name.removesuffix("_s").replace("_", "-")
    environment = spec.environment or f"BLUEFLOW_{name.upper()}"
    return replace(spec, name=name, flag=flag, environment=environment)


SETTINGS: Final[Mapping[str, Setting]] = {
    one.name: _declared(one.name, one.metadata["setting"])
    for one in fields(Settings)
    if "setting" in one.metadata
}


def _text_of(raw: object) -> str:
    if isinstance(raw, (str, int, float, os.PathLike)) and not isinstance(raw, bool):
        return str(raw).strip()
    raise ValueError("is neither text nor a number")
