"""Options of the clients, no password anywhere, and what each failure means."""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka import errors as kafka
from aiokafka.conn import create_conn

from blueflow.errors import (
    BlueflowError,
    HeldBackError,
    KafkaLoginError,
    KafkaRightsError,
    KafkaUnavailableError,
    SettingError,
    TopicError,
)
from blueflow.kafka import connection
from blueflow.kafka.connection import (
    Connection,
    Failure,
    as_blueflow_error,
    connecting,
    kind_of_failure,
    origin_of,
    told,
)
from blueflow.testing.services.certificates import make_certificates

if TYPE_CHECKING:
    from pathlib import Path

LOGIN = {"username": "me", "password": "hunter2"}


def caused(by: BaseException, error: Exception | None = None) -> Exception:
    """Return an error as aiokafka raises it `from` another one."""
    error = error or kafka.KafkaError("Unexpected error during batch delivery")
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("protocol", "tls", "sasl"),
    [
        ("PLAINTEXT", False, False),
        ("SSL", True, False),
        ("SASL_PLAINTEXT", False, True),
        ("SASL_SSL", True, True),
    ],
)
async def test_each_protocol_has_its_options_and_clients_take_them(
    protocol: str, *, tls: bool, sasl: bool
) -> None:
    connection = Connection("a:1,b:2", protocol, "SCRAM-SHA-256", **LOGIN)
    options = connection.options("me-client")
    assert options.pop("bootstrap_servers") == ["a:1", "b:2"]
    assert options.pop("client_id") == "me-client"
    assert options.pop("security_protocol") == protocol
    assert options.pop("request_timeout_ms") == 10_000
    context = options.pop("ssl_context", None)
    assert isinstance(context, ssl.SSLContext) == tls
    if isinstance(context, ssl.SSLContext):
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    expected = {
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_plain_username": "me",
        "sasl_plain_password": "hunter2",
    }
    assert options == (expected if sasl else {})
    await AIOKafkaConsumer(**connection.options("me-client")).stop()


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
@pytest.mark.parametrize("missing", ["username", "password"])
@pytest.mark.parametrize("value", [None, ""])
def test_what_is_missing_is_named(protocol: str, missing: str, value: str | None) -> None:
    connection = replace(Connection("a:1", protocol, **LOGIN), **{missing: value})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=f"kafka_{missing} .*{protocol} needs it") as caught:
        connection.options("x")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_files_of_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "odd.pem").write_text("no certificate")
    make_certificates(tmp_path)
    good = str(tmp_path / "ca.pem")
    for files, name, problem in (
        ({"ca_file": "/no/ca.pem"}, "kafka_ca_file", "/no/ca.pem cannot be used: No such file"),
        ({"ca_file": str(tmp_path / "odd.pem")}, "kafka_ca_file", "odd.pem cannot be used: "),
        ({"ca_file": good, "cert_file": "/no/me.pem"}, "kafka_cert_file", "/no/me.pem cannot be"),
        ({"ca_file": good, "cert_file": good}, "kafka_cert_file", "ca.pem cannot be used: "),
    ):
        with pytest.raises(SettingError) as caught:
            Connection("a:1", "SSL", **files).options("x")
        assert (caught.value.name, problem in str(caught.value)) == (name, True), str(caught.value)
    server = str(tmp_path / "server.pem")
    options = Connection("a:1", "SSL", ca_file=good, cert_file=server).options("x")
    assert len(options["ssl_context"].get_ca_certs()) == 1


def test_the_password_is_not_shown() -> None:
    connection = Connection("a:1", "SASL_SSL", ca_file=None, **LOGIN)
    assert repr(connection) == str(connection) == "Connection('a:1', SASL_SSL)"
    assert "hunter2" not in f"{connection} {[connection]} {connection!r}"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"security_protocol": "sasl_tls"}, "kafka_security_protocol"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "GSSAPI"}, "kafka_sasl_mechanism"),
    ],
)
def test_a_way_in_that_does_not_exist_is_named(given: dict[str, str], name: str) -> None:
    with pytest.raises(SettingError, match="is none of") as caught:
        Connection("a:1", **given, **LOGIN).options("x")
    assert caught.value.name == name


def test_names_of_protocols_and_mechanisms_may_be_small() -> None:
    options = Connection("a:1", "sasl_ssl", "scram-sha-256", **LOGIN).options("x")
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-256"
    assert options["ssl_context"]


async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection as a broker with the mechanism PLAIN would."""
    answers = {
        18: struct.pack(">hihhhhhh", 0, 2, 17, 0, 1, 36, 0, 1),  # what it has: both requests below
        17: struct.pack(">hih5s", 0, 1, 5, b"PLAIN"),
        36: struct.pack(">hhiq", 0, -1, 0, 0),
    }
    for _ in answers:
        size = await reader.readexactly(4)
        request = await reader.readexactly(int.from_bytes(size, "big"))
        api, _, number = struct.unpack(">hhi", request[:8])
        answer = struct.pack(">i", number) + answers[api]
        writer.write(struct.pack(">i", len(answer)) + answer)
    writer.close()


async def test_the_password_is_not_logged_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with await asyncio.start_server(let_in, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection = Connection(f"127.0.0.1:{port}", "SASL_PLAINTEXT", "PLAIN", **LOGIN)
        options = connection.options("x")
        del options["bootstrap_servers"]
        made = await create_conn("127.0.0.1", port, **options)
        made.close()
    assert "Authenticated as me via PLAIN" in caplog.text
    assert "SaslHandShakeRequest" in caplog.text  # the rest is there for whoever looks
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        # Nobody answers: wait.
        (OSError("connection refused"), Failure.AWAY),
        (ConnectionResetError(), Failure.AWAY),
        (TimeoutError(), Failure.AWAY),
        (kafka.KafkaTimeoutError(), Failure.AWAY),
        (kafka.KafkaConnectionError("no"), Failure.AWAY),
        (kafka.NodeNotReadyError(), Failure.AWAY),
        (kafka.RequestTimedOutError(), Failure.AWAY),
        (kafka.NotLeaderForPartitionError(), Failure.AWAY),
        (kafka.NotEnoughReplicasError(), Failure.AWAY),
        (kafka.NotEnoughReplicasAfterAppendError(), Failure.AWAY),
        (kafka.CoordinatorNotAvailableError(), Failure.AWAY),
        (kafka.CoordinatorLoadInProgressError(), Failure.AWAY),
        (kafka.ConcurrentTransactions(), Failure.AWAY),
        (kafka.UnknownTopicOrPartitionError(), Failure.AWAY),
        (kafka.LeaderNotAvailableError(), Failure.AWAY),
        (HeldBackError("t/0", 1, 2.0, "x"), Failure.AWAY),
        # Somebody else has the transactional id.
        (kafka.ProducerFenced(), Failure.FENCED),
        (kafka.InvalidProducerEpoch(), Failure.FENCED),
        (kafka.InvalidProducerIdMapping(), Failure.FENCED),
        (kafka.InvalidTxnState(), Failure.FENCED),
        (kafka.TransactionCoordinatorFenced(), Failure.FENCED),
        # An operator has to act.
        (kafka.TopicAuthorizationFailedError("t"), Failure.FATAL),
        (kafka.ClusterAuthorizationFailedError(), Failure.FATAL),
        (kafka.TransactionalIdAuthorizationFailed(), Failure.FATAL),
        (kafka.SaslAuthenticationFailed(), Failure.FATAL),
        (kafka.AuthenticationFailedError("no"), Failure.FATAL),
        (kafka.UnsupportedSaslMechanismError(), Failure.FATAL),
        (ssl.SSLCertVerificationError(1, "self-signed"), Failure.FATAL),  # also an OSError
        (kafka.InvalidTransactionTimeout(), Failure.FATAL),
        (TopicError("t", "is odd", "do"), Failure.FATAL),
        (KafkaUnavailableError("a:1", 1.0, "x"), Failure.FATAL),
        # Refused, for what may be a record's sake.
        (kafka.MessageSizeTooLargeError(), Failure.SUSPECT),
        (kafka.InvalidTimestampError(), Failure.SUSPECT),
        (kafka.UnknownError(), Failure.SUSPECT),
        (kafka.OutOfOrderSequenceNumber(), Failure.SUSPECT),
        (AssertionError("a transaction is open"), Failure.SUSPECT),
        (ValueError("odd bytes"), Failure.SUSPECT),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.name,
)  # fmt: skip
def test_each_failure_has_one_thing_to_do_next_also_when_it_is_wrapped(
    error: BaseException, kind: Failure
) -> None:
    assert kind_of_failure(error) is kind
    assert kind_of_failure(caused(error)) is kind
    assert kind_of_failure(caused(caused(error))) is kind
    ours = as_blueflow_error(error, "what")
    assert (ours is not None) == (kind is Failure.FATAL or isinstance(error, BlueflowError))


def test_every_error_of_aiokafka_is_judged_and_told() -> None:
    for name, kind in vars(kafka).items():
        if isinstance(kind, type) and issubclass(kind, kafka.KafkaError):
            error = kind()
            assert isinstance(kind_of_failure(error), Failure), name
            assert told(error), name
            assert (as_blueflow_error(error) is not None) == (
                kind_of_failure(error) is Failure.FATAL
            ), name


def test_only_a_plain_kafka_error_is_a_wrapper() -> None:
    said = OSError("no")
    assert origin_of(said) is said
    assert origin_of(caused(said)) is said
    assert origin_of(caused(caused(said))) is said
    own = kafka.ProducerFenced()
    assert origin_of(caused(said, own)) is own
    plain = kafka.KafkaError("alone")
    assert origin_of(plain) is plain
    assert kind_of_failure(plain) is Failure.SUSPECT


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TimeoutError(), "it took too long"),
        (TimeoutError("too slow."), "too slow"),
        (OSError(111, "Connection refused"), "[Errno 111] Connection refused"),
        (ValueError(), "ValueError"),
        (kafka.KafkaError("said."), "KafkaError: said"),
        (kafka.ProducerFenced(), "ProducerFenced: There is a newer producer"),
        (kafka.NodeNotReadyError(), "NodeNotReadyError"),
        (caused(OSError("the reason")), "the reason"),
        (OSError("one\ntwo\x1b[31m"), r"one\ntwo\x1b[31m"),
    ],
    ids=repr,
)
def test_what_an_error_says_is_one_short_line(error: BaseException, text: str) -> None:
    assert told(error).startswith(text)
    assert "\n" not in told(error)
    assert not told(error).endswith(".")


def test_a_long_error_is_cut() -> None:
    assert len(told(OSError("x" * 10_000))) <= 201


def test_a_right_that_is_missing_names_the_resource() -> None:
    cases: list[tuple[Any, str]] = [
        (kafka.TopicAuthorizationFailedError({"b", "a"}), "read or write topic a, b"),
        (kafka.TopicAuthorizationFailedError("p.posts"), "read or write topic p.posts"),
        (kafka.TopicAuthorizationFailedError(), "read or write topic default"),
        (kafka.TransactionalIdAuthorizationFailed(), "write with transactional id default"),
        (kafka.ClusterAuthorizationFailedError(), "write idempotently on the cluster"),
    ]
    for error, text in cases:
        ours = as_blueflow_error(caused(error), "default")
        assert isinstance(ours, KafkaRightsError)
        assert text in str(ours)


def test_what_an_operator_has_to_act_on_is_an_error_of_ours() -> None:
    timeout = as_blueflow_error(kafka.InvalidTransactionTimeout())
    assert isinstance(timeout, SettingError)
    assert timeout.name == "transaction_timeout_s"
    login = as_blueflow_error(ssl.SSLCertVerificationError(1, "self-signed certificate"))
    assert isinstance(login, KafkaLoginError)
    own = TopicError("t", "is odd", "do")
    assert as_blueflow_error(own) is own
    assert as_blueflow_error(OSError()) is None


async def test_why_not_tells_a_port_where_nobody_listens(free_tcp_port: int) -> None:
    for servers in (f"127.0.0.1:{free_tcp_port}", "nowhere.invalid:9092"):
        error = await Connection(servers).why_not(time.monotonic() - 3.0)
        assert isinstance(error, KafkaUnavailableError)
        assert (error.bootstrap, bool(error.problem)) == (servers, True)
        assert 3.0 <= error.waited_s < 20.0


@pytest.mark.parametrize("finishes", [True, False])
async def test_connecting_is_cancelled_once_it_had_time_to_finish(
    monkeypatch: pytest.MonkeyPatch, *, finishes: bool
) -> None:
    monkeypatch.setattr(connection, "_FINISH_S", 0.2)
    answer = anyio.Event()
    seen: list[str] = []

    async def connect() -> None:
        try:
            await answer.wait()
            seen.append("finished")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connecting, connect())
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
            if finishes:
                answer.set()
    assert seen == ["finished" if finishes else "cancelled"]


async def test_connecting_tells_how_it_failed() -> None:
    async def connect() -> None:
        raise OSError("no way")

    with pytest.raises(OSError, match="no way"):
        await connecting(connect())
