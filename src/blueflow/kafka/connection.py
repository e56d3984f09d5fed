"""How to reach the brokers, and what it means when that fails."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

import anyio
from aiokafka import errors as kafka
from aiokafka.conn import collect_hosts, create_conn

from blueflow import quantities
from blueflow.errors import (
    BlueflowError,
    HeldBackError,
    KafkaLoginError,
    KafkaRightsError,
    KafkaUnavailableError,
    SettingError,
)
from blueflow.logs import clip
from blueflow.masking import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine
    from typing import TypeVar

    _T = TypeVar("_T")

PLAINTEXT: Final = "PLAINTEXT"
MECHANISM: Final = "SCRAM-SHA-512"
PROTOCOLS: Final = (PLAINTEXT, "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS: Final = (MECHANISM, "SCRAM-SHA-256", "PLAIN")
REQUEST_TIMEOUT_S: Final = 10.0
_FINISH_S = 1.0
_ASK_S = 3.0  # each broker, why it cannot be used

_PROBLEM_LENGTH_MAX = 200
_RIGHTS: dict[type[kafka.KafkaError], tuple[str, str]] = {
    kafka.TopicAuthorizationFailedError: ("read or write", "topic"),
    kafka.GroupAuthorizationFailedError: ("use", "group"),
    kafka.ClusterAuthorizationFailedError: (
        "create topics or write idempotently on",
        "the cluster",
    ),
    kafka.TransactionalIdAuthorizationFailed: ("write with", "transactional id"),
}
_LOGIN = (
    kafka.SaslAuthenticationFailed,
    kafka.AuthenticationFailedError,
    kafka.AuthenticationMethodNotSupported,
    kafka.UnsupportedSaslMechanismError,
    kafka.IllegalSaslStateError,
    ssl.SSLError,
)
_BUSY = (kafka.KafkaTimeoutError, kafka.ConcurrentTransactions)
_FENCED = (
    kafka.ProducerFenced,
    kafka.InvalidProducerEpoch,
    kafka.InvalidProducerIdMapping,
    kafka.InvalidTxnState,
    kafka.TransactionCoordinatorFenced,
)


def _without_login(record: logging.LogRecord) -> bool:
    """Keep what is said in a login out of the log; of PLAIN it is the password itself."""
    values = record.args if isinstance(record.args, tuple) else ()
    return not any(hasattr(value, "sasl_auth_bytes") for value in values)


# It logs requests as a whole, below INFO. At the logger, so that no level and no handler shows it.
logging.getLogger("aiokafka.conn").addFilter(_without_login)


@dataclass(frozen=True)
class Connection:
    """Where the brokers are and how to log in. The password is never shown."""

    bootstrap: str
    security_protocol: str = PLAINTEXT
    sasl_mechanism: str = MECHANISM
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __repr__(self) -> str:
        return f"Connection({self.bootstrap!r}, {self.security_protocol})"

    def options(self, client_id: str) -> dict[str, Any]:
        """Return the keyword arguments that every client of aiokafka takes.

        Raises:
            SettingError: there is no such way in, credentials are missing, or a file of
                certificates cannot be used.
        """
        protocol, mechanism = self.security_protocol.upper(), self.sasl_mechanism.upper()
        for setting, given, known in (
            ("kafka_security_protocol", protocol, PROTOCOLS),
            ("kafka_sasl_mechanism", mechanism, MECHANISMS),
        ):
            if given not in known:
                problem = f"{given} is none of {', '.join(known)}"
                raise SettingError(setting, "Connection", problem)
        try:
            servers = quantities.servers(self.bootstrap)
        except (ValueError, AttributeError) as error:
            problem = f"{self.bootstrap!r} is not HOST:PORT[,HOST:PORT]"
            raise SettingError("connection", "Connection", mask_credentials(problem)) from error
        options: dict[str, Any] = {
            "bootstrap_servers": servers.split(","),
            "client_id": client_id,
            "request_timeout_ms": int(REQUEST_TIMEOUT_S * 1000),
            "security_protocol": protocol,
        }
        if protocol.endswith("SSL"):
            options["ssl_context"] = self._tls()
        if protocol.startswith("SASL"):
            for name, value in (("username", self.username), ("password", self.password)):
                if not value:
                    problem = f"{protocol} needs it"
                    raise SettingError(f"kafka_{name}", "default", problem)
            options["sasl_mechanism"] = mechanism
            options["sasl_plain_username"] = self.username
            options["sasl_plain_password"] = self.password
        return options

    def _tls(self) -> ssl.SSLContext:
        name, path = "kafka_ca_file", self.ca_file
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file:
                name, path = "kafka_cert_file", self.cert_file
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            problem = f"{path} cannot be used: {error.strerror or error}"
            raise SettingError(name, "the settings", problem) from error
        return context

    async def why_not(self, began_s: float) -> BlueflowError:
        """Ask each broker once more, and say why none can be used.

        aiokafka tells its log alone which of the reasons it was.

        Args:
            began_s: since when there is no answer, monotonic.
        """
        options = self.options("blueflow")
        problem = "no address in it can be reached"
        for host, port, _ in collect_hosts(options.pop("bootstrap_servers")):
            try:
                with anyio.fail_after(_ASK_S):
                    connection = await create_conn(host, port, **options)
            except _LOGIN as error:
                return KafkaLoginError(self.bootstrap, told(error))
            except (OSError, TimeoutError, kafka.KafkaError, AssertionError) as error:
                problem = told(error)
            else:
                connection.close()
                problem = "it answers but is not ready"
        return KafkaUnavailableError(self.bootstrap, time.monotonic() - began_s, problem)


class Failure(Enum):
    """What a failed call means for a producer; each kind has one thing to do next."""

    AWAY = auto()  # no answer: wait, rebuild, try again for ever
    FENCED = auto()  # somebody has our transactional id, or we slept past the timeout
    SUSPECT = auto()  # refused: rebuild, try again; the third time look for the record
    FATAL = auto()  # an operator has to act


def origin_of(error: BaseException) -> BaseException:
    """Return what a broker said where aiokafka wraps it in a plain KafkaError."""
    while type(error) is kafka.KafkaError and error.__cause__ is not None:
        error = error.__cause__
    return error


def kind_of_failure(error: BaseException) -> Failure:
    """Judge what a client of aiokafka raised."""
    error = origin_of(error)
    if isinstance(error, HeldBackError):
        return Failure.AWAY
    if isinstance(error, (BlueflowError, kafka.InvalidTransactionTimeout, *_RIGHTS, *_LOGIN)):
        return Failure.FATAL
    if isinstance(error, _FENCED):
        return Failure.FENCED
    if isinstance(error, (OSError, TimeoutError, *_BUSY)):
        return Failure.AWAY
    if isinstance(error, kafka.KafkaError) and error.retriable:
        return Failure.AWAY
    return Failure.SUSPECT


def as_blueflow_error(error: BaseException, what: str = "") -> BlueflowError | None:
    """Return the error of ours for one of aiokafka that an operator has to act on."""
    error = origin_of(error)
    if isinstance(error, BlueflowError):
        return error
    if isinstance(error, _LOGIN):
        return KafkaLoginError("the brokers", told(error))
    if isinstance(error, kafka.InvalidTransactionTimeout):
        problem = "it is longer than the brokers allow (transaction.max.timeout.ms)"
        return SettingError("transaction_timeout_s", "the settings", problem)
    for kind, (right, resource) in _RIGHTS.items():
        if isinstance(error, kind):
            named = ", ".join(sorted(_names(error))) or what
            return KafkaRightsError(right, f"{resource} {named}".strip())
    return None


def told(error: BaseException) -> str:
    """Return what an error says, in one short line without a full stop."""
    error = origin_of(error)
    if isinstance(error, TimeoutError) and not str(error):
        return "it took too long"
    if isinstance(error, kafka.KafkaError) and not error.args:
        text = getattr(error, "description", "") or type(error).__name__
    else:
        text = str(error) or type(error).__name__
    if "Unable to bootstrap" in text:  # with a list of Python tuples behind it
        return "no broker answers"
    return clip(text, _PROBLEM_LENGTH_MAX).rstrip(".")


async def bounded(call: Awaitable[_T], wait_s: float) -> _T:
    """Await a call of aiokafka for at most `wait_s` seconds; raises TimeoutError."""
    with anyio.fail_after(wait_s):
        return await call


async def connecting(call: Coroutine[Any, Any, _T]) -> _T:
    """Await a call of aiokafka that connects; cancelled, let it finish for up to a second.

    aiokafka forgets to close the connection that it asks for the brokers when it is cancelled
    within that question, which takes milliseconds.
    """
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.move_on_after(_FINISH_S, shield=True):
            await asyncio.wait([task])
        task.cancel()
        with anyio.move_on_after(_FINISH_S, shield=True):
            await asyncio.wait([task])
        if task.done() and not task.cancelled():
            task.exception()  # nobody else will ask for it
        raise


def _names(error: BaseException) -> set[str]:
    names: set[str] = set()
    for argument in error.args:
        names |= {argument} if isinstance(argument, str) else set(map(str, argument))
    return names
