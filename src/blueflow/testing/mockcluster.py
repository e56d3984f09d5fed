"""librdkafka's mock Kafka cluster: real sockets, planned errors, delays and outages.

It comes with the wheel of `confluent-kafka` and is driven by ctypes; `confluent_kafka` itself is
not imported.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from ctypes import POINTER, byref, c_char_p, c_int, c_int16, c_int32, c_size_t, c_void_p
from ctypes.util import find_library
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

_PRODUCER = 0  # a handle is of one kind or the other; the cluster does not care
_ALL_BROKERS = -1
_ERROR_SIZE = 512


class MockCluster:
    """A Kafka cluster inside this process, for faults and not for semantics.

    A client reaches it over TCP at `bootstrap`. An injected error takes the place of the request's
    effect: nothing is appended, nothing is committed. An answer can be late, but it cannot be lost
    after the effect: put a `KafkaProxy` in front and `advertise` it.

    What aiokafka 0.14 can do with librdkafka 2.16 (tests/testing/test_mockcluster.py):

    - ApiVersions is negotiated; metadata, offsets and leaders are those of a cluster.
    - Idempotent and transactional producers start, send, commit and abort. A batch that is sent
      again is recognized as a duplicate, and its offset is then -1.
    - A consumer with assigned partitions reads, with `check_crcs=False`: the markers of commits and
      aborts have no checksum.
    - A topic that nobody created appears, with 4 partitions, when a client asks for it.

    What it cannot, so that semantics are tested with a real Kafka:

    - `read_committed` hides nothing, neither what was aborted nor what is still open.
    - Nobody is fenced: a second producer with the same transactional.id leaves the first working,
      and no transaction times out.
    - CreateTopics, DescribeConfigs and the other requests of an administrator are not known.
      Message sizes and timestamps are not checked; the timestamp in an answer is always 1234.

    Args:
        brokers: how many; their ids count from 1.
        topics: name and number of partitions.

    Raises:
        ModuleNotFoundError: on entry; there is no librdkafka.
    """

    def __init__(self, *, brokers: int = 1, topics: Mapping[str, int] | None = None) -> None:
        self.bootstrap = ""  # host:port, of each broker, while it runs
        self._brokers, self._topics = brokers, dict(topics or {})
        self._kafka: int | None = None
        self._cluster: int | None = None
        self._errors = _PlannedErrors()
        self._late: Counter[tuple[int, int]] = Counter()  # broker and kind: planned by fail_after

    def fail(self, api: int, errors: Sequence[int]) -> None:
        """Answer the next requests of a kind with these errors, one each, whichever the broker."""
        if any(kind == api for _, kind in self._late):
            raise ValueError("fail_after was used for this kind: librdkafka reads that list alone")
        self._errors.plan(api, len(errors), self.requests(api))
        codes = (c_int * len(errors))(*errors)
        _library().rd_kafka_mock_push_request_errors_array(self._running, api, len(errors), codes)

    def fail_after(self, api: int, errors: Sequence[tuple[int, int]], *, broker: int = 1) -> None:
        """Answer the next requests of a kind late.

        Args:
            api: the kind of request.
            errors: code and delay in milliseconds, one pair for a request. With code 0 the request
                has its effect at once, and only the answer is late.
            broker: the one that does so. From here on it no longer looks at what `fail` planned
                for this kind.
        """
        numbers = [c_int(number) for pair in errors for number in pair]
        _check(
            _library().rd_kafka_mock_broker_push_request_error_rtts(
                self._running, broker, api, len(errors), *numbers
            )
        )
        self._late[broker, api] += len(errors)

    def fired(self, api: int) -> int:
        """Count the planned answers that were given: a fault that did not fire proves nothing."""
        fired = self._errors.fired(api, self.requests(api))
        for (broker, kind), planned in self._late.items():
            if kind == api:
                left = c_size_t()
                _check(
                    _library().rd_kafka_mock_broker_error_stack_cnt(
                        self._running, broker, api, byref(left)
                    )
                )
                fired += planned - left.value
        return fired

    def clear(self, api: int) -> None:
        """Forget what `fail` planned for this kind and has not fired; `fail_after` stays."""
        _library().rd_kafka_mock_clear_request_errors(self._running, api)
        self._errors.clear(api, self.requests(api))

    def requests(self, api: int | None = None) -> int:
        """Count the requests of a kind, or all, that the brokers understood."""
        library, count = _library(), c_size_t()
        requests = library.rd_kafka_mock_get_requests(self._running, byref(count))
        if not count.value:
            return 0
        try:
            kinds = [library.rd_kafka_mock_request_api_key(requests[n]) for n in range(count.value)]
        finally:
            library.rd_kafka_mock_request_destroy_array(requests, count)
        return len(kinds) if api is None else kinds.count(api)

    def set_rtt(self, milliseconds: int, *, broker: int = _ALL_BROKERS) -> None:
        """Send every answer so much later; requests have their effect at once."""
        _check(_library().rd_kafka_mock_broker_set_rtt(self._running, broker, milliseconds))

    def down(self, *, broker: int = _ALL_BROKERS) -> None:
        """Close the connections and refuse new ones; leaders and logs stay."""
        _check(_library().rd_kafka_mock_broker_set_down(self._running, broker))

    def up(self, *, broker: int = _ALL_BROKERS) -> None:
        """Accept connections again."""
        _check(_library().rd_kafka_mock_broker_set_up(self._running, broker))

    def fail_topic(self, topic: str, error: int) -> None:
        """Name this error in Metadata and AddPartitionsToTxn for the topic, until told 0."""
        _library().rd_kafka_mock_topic_set_error(self._running, topic.encode(), error)

    def set_leader(self, topic: str, partition: int, broker: int) -> None:
        """Move a partition to another broker; -1 leaves it without a leader."""
        _check(
            _library().rd_kafka_mock_partition_set_leader(
                self._running, topic.encode(), partition, broker
            )
        )

    def set_coordinator(self, transactional_id: str, broker: int) -> None:
        """Make a broker the coordinator of a transactional.id."""
        _check(
            _library().rd_kafka_mock_coordinator_set(
                self._running, b"transaction", transactional_id.encode(), broker
            )
        )

    def advertise(self, port: int, *, host: str = "127.0.0.1", broker: int = 1) -> None:
        """Tell clients this address for a broker: that of a proxy. `bootstrap` stays."""
        _library().rd_kafka_mock_broker_set_host_port(self._running, broker, host.encode(), port)

    def start(self) -> None:
        """Listen, and create the topics."""
        library = _library()
        reason = ctypes.create_string_buffer(_ERROR_SIZE)
        settings = library.rd_kafka_conf_new()
        # Warnings and worse go to stderr: a notice says that this handle itself is no client.
        library.rd_kafka_conf_set(settings, b"log_level", b"4", None, 0)
        self._kafka = library.rd_kafka_new(_PRODUCER, settings, reason, _ERROR_SIZE)
        if self._kafka is None:
            raise OSError(f"librdkafka did not start: {reason.value.decode()}")
        self._cluster = library.rd_kafka_mock_cluster_new(self._kafka, self._brokers)
        if self._cluster is None:
            self.stop()
            raise OSError(f"librdkafka has no cluster of {self._brokers} brokers")
        library.rd_kafka_mock_start_request_tracking(self._cluster)
        self.bootstrap = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        try:
            for topic, partitions in self._topics.items():
                _check(
                    library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1)
                )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Close every connection and forget every record."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            _library().rd_kafka_mock_cluster_destroy(cluster)
        kafka, self._kafka = self._kafka, None
        if kafka is not None:
            _library().rd_kafka_destroy(kafka)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _running(self) -> int:
        if self._cluster is None:  # librdkafka would not survive it
            raise ValueError("a mock cluster is used while it runs")
        return self._cluster


class _PlannedErrors:
    """Which errors of the cluster's own lists were taken: each request of a kind takes one.

    librdkafka does not tell, so it follows from how many requests there were.
    """

    def __init__(self) -> None:
        self._fired: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()
        self._requests: Counter[int] = Counter()  # seen when `_waiting` was true

    def plan(self, api: int, errors: int, requests: int) -> None:
        self._settle(api, requests)
        self._waiting[api] += errors

    def clear(self, api: int, requests: int) -> None:
        self._settle(api, requests)
        self._waiting[api] = 0

    def fired(self, api: int, requests: int) -> int:
        self._settle(api, requests)
        return self._fired[api]

    def _settle(self, api: int, requests: int) -> None:
        taken = min(self._waiting[api], requests - self._requests[api])
        self._fired[api] += taken
        self._waiting[api] -= taken
        self._requests[api] = requests


def _check(error: int) -> None:
    if error:
        name = _library().rd_kafka_err2name(error).decode()
        raise ValueError(f"the mock cluster refuses this broker, topic or number ({name})")


# What each function returns, and what it takes. Variadic ones: what comes before the dots.
# Source: rdkafka.h and rdkafka_mock.h of librdkafka 2.16.
_REQUESTS = POINTER(c_void_p)
_SIGNATURES = {
    "rd_kafka_conf_new": (c_void_p, []),
    "rd_kafka_conf_set": (c_int, [c_void_p, c_char_p, c_char_p, c_char_p, c_size_t]),
    "rd_kafka_new": (c_void_p, [c_int, c_void_p, c_char_p, c_size_t]),
    "rd_kafka_destroy": (None, [c_void_p]),
    "rd_kafka_err2name": (c_char_p, [c_int]),
    "rd_kafka_mock_cluster_new": (c_void_p, [c_void_p, c_int]),
    "rd_kafka_mock_cluster_destroy": (None, [c_void_p]),
    "rd_kafka_mock_cluster_bootstraps": (c_char_p, [c_void_p]),
    "rd_kafka_mock_topic_create": (c_int, [c_void_p, c_char_p, c_int, c_int]),
    "rd_kafka_mock_topic_set_error": (None, [c_void_p, c_char_p, c_int]),
    "rd_kafka_mock_partition_set_leader": (c_int, [c_void_p, c_char_p, c_int32, c_int32]),
    "rd_kafka_mock_coordinator_set": (c_int, [c_void_p, c_char_p, c_char_p, c_int32]),
    "rd_kafka_mock_push_request_errors_array": (
        None,
        [c_void_p, c_int16, c_size_t, POINTER(c_int)],
    ),
    "rd_kafka_mock_clear_request_errors": (None, [c_void_p, c_int16]),
    "rd_kafka_mock_broker_push_request_error_rtts": (
        c_int,
        [c_void_p, c_int32, c_int16, c_size_t],
    ),
    "rd_kafka_mock_broker_error_stack_cnt": (
        c_int,
        [c_void_p, c_int32, c_int16, POINTER(c_size_t)],
    ),
    "rd_kafka_mock_broker_set_rtt": (c_int, [c_void_p, c_int32, c_int]),
    "rd_kafka_mock_broker_set_down": (c_int, [c_void_p, c_int32]),
    "rd_kafka_mock_broker_set_up": (c_int, [c_void_p, c_int32]),
    "rd_kafka_mock_broker_set_host_port": (None, [c_void_p, c_int32, c_char_p, c_int]),
    "rd_kafka_mock_start_request_tracking": (None, [c_void_p]),
    "rd_kafka_mock_get_requests": (_REQUESTS, [c_void_p, POINTER(c_size_t)]),
    "rd_kafka_mock_request_api_key": (c_int16, [c_void_p]),
    "rd_kafka_mock_request_destroy_array": (None, [_REQUESTS, c_size_t]),
}


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_path())
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _path() -> str:
    """Return librdkafka beside or inside `confluent_kafka`, else the system's own."""
    spec = find_spec("confluent_kafka")
    for package in map(Path, (spec and spec.submodule_search_locations) or ()):
        for folder, names in (
            (package.with_name("confluent_kafka.libs"), "librdkafka*.so*"),  # Linux
            (package / ".dylibs", "librdkafka*.dylib"),  # macOS
        ):
            for path in sorted(folder.glob(names)):
                return str(path)
    found = find_library("rdkafka")
    if found is None:
        raise ModuleNotFoundError(
            "There is no librdkafka; pip install confluent-kafka brings one", name="confluent_kafka"
        )
    return found
