"""Calls of an S3 server: each bounded, tried again where that can help, and errors made ours."""

from __future__ import annotations

import logging
import os
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
import anyio
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from blueflow.backoff import Backoff
from blueflow.errors import BucketError, StoreLoginError, StoreUnavailableError
from blueflow.logs import clip
from blueflow.masking import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from blueflow.metrics import LakeMetrics

CONNECT_TIMEOUT_S: Final = 5.0
ATTEMPT_S: Final = 20.0
CALL_S: Final = 60.0
SLOWEST_BYTES_PER_S: Final = 256 * 1024  # a body gets as much time as it needs at this rate
CONNECTIONS_MAX: Final = 16
_BACKOFF: Final = Backoff(base_s=0.1, cap_s=5.0)
NO_BUCKET: Final = "NoSuchBucket"
_PROBLEM_LENGTH_MAX: Final = 200
_SERVER_ERRORS: Final = 500
_AGAIN: Final = frozenset({
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "TooManyRequests",
})  # fmt: skip
_LOGIN: Final = frozenset({
    "AccessDenied",
    "AccountProblem",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "403",
    "401",
})  # fmt: skip

# No answer, or a part of one. botocore wraps most of what aiohttp raises, not all.
_BROKEN: Final = (
    BotoConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    OSError,
)
_NO_LOGIN: Final = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class S3Options:
    """Where an S3 server is, and how to log in. The secret is never shown.

    Attributes:
        endpoint: its address; without a scheme it is http. None is AWS.
        access_key: with `secret_key`; None is the standard AWS chain.
        secret_key: belongs to it.
        region: what requests are signed for.
    """

    endpoint: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    region: str = "us-east-1"

    @classmethod
    def of_environment(cls) -> S3Options:
        """Return what MINIO_ENDPOINT, MINIO_ACCESS_KEY and MINIO_SECRET_KEY say."""
        names = ("MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY")
        endpoint, access_key, secret_key = (os.environ.get(name) or None for name in names)
        region = os.environ.get("BLUEFLOW_S3_REGION") or "us-east-1"
        return cls(endpoint, access_key, secret_key, region)

    @property
    def endpoint_url(self) -> str | None:
        """The address with a scheme."""
        if self.endpoint is None or "://" in self.endpoint:
            return self.endpoint
        return f"http://{self.endpoint}"


class S3Client:
    """One client of botocore, whose calls end.

    Args:
        url: what errors name.
        options: where the server is.
        metrics: counts tries again.
        attempt_s: how long one try may take, for small requests.
        call_s: how long all tries of a call may take.
    """

    def __init__(
        self,
        url: str,
        options: S3Options,
        metrics: LakeMetrics | None,
        *,
        attempt_s: float = ATTEMPT_S,
        call_s: float = CALL_S,
    ) -> None:
        self.url, self._options, self._metrics = url, options, metrics
        self._attempt_s, self._call_s = attempt_s, call_s
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def open(self) -> None:
        """Make the client; connects with the first call.

        Raises:
            StoreLoginError, StoreUnavailableError: it cannot be made.
        """
        if self._client is not None:
            return
        options = self._options
        config = AioConfig(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=max(60.0, self._call_s),  # ours is shorter
            retries={"total_max_attempts": 1},
            max_pool_connections=CONNECTIONS_MAX,
            # Servers other than AWS do not all know the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        session = get_session()
        session.register_component("data_loader", _loader())
        try:
            self._client = await self._stack.enter_async_context(
                session.create_client(
                    "s3",
                    region_name=options.region,
                    endpoint_url=options.endpoint_url,
                    aws_access_key_id=options.access_key,
                    aws_secret_access_key=options.secret_key,
                    config=config,
                )
            )
        except _NO_LOGIN as error:
            raise StoreLoginError(self.url, _told(error)) from error
        except (BotoCoreError, ValueError) as error:
            raise StoreUnavailableError(self.url, 0, _told(error)) from error
        self._client.meta.events.register("before-send.s3", _without_expect)

    async def close(self) -> None:
        """Disconnect."""
        self._client = None
        await self._stack.aclose()

    async def call(
        self,
        name: str,
        *,
        codes: frozenset[str] = frozenset(),
        size: int = 0,
        read: Callable[[Any], Awaitable[Any]] | None = None,
        **arguments: Any,
    ) -> Mapping[str, Any] | str:
        """Do a call of the S3 API; return its answer, or one of `codes` when that is the answer.

        Args:
            name: of botocore's method.
            codes: error codes that the caller understands.
            size: bytes that it sends.
            read: reads the body of the answer, which gets the time that its length needs; its
                result is the answer's `Body`.
            arguments: of the method.

        Raises:
            StoreUnavailableError: no answer in time, or errors until then.
            StoreLoginError: the server refuses us.
            BucketError: there is no such bucket, and `codes` does not have it.
        """
        failures, words = 0, ""
        bound_s = self._call_s + 2 * size / SLOWEST_BYTES_PER_S
        began_s = anyio.current_time()
        while True:
            left_s = bound_s - (anyio.current_time() - began_s)
            problem = "it did not answer"
            attempt_s = self._attempt_s + size / SLOWEST_BYTES_PER_S
            with anyio.move_on_after(min(left_s, attempt_s)) as scope:
                answer = await self._try(name, codes, read, arguments, scope)
                if not isinstance(answer, _MayPass):
                    return answer
                problem = words = answer.problem
            failures += 1
            wait_s = _BACKOFF.delay_s(failures, random.random())  # noqa: S311 - jitter
            waited_s = anyio.current_time() - began_s
            if waited_s + wait_s >= bound_s:
                raise StoreUnavailableError(self.url, round(waited_s, 1), words or problem)
            if self._metrics is not None:
                self._metrics.store_retries.inc()
            extra = {"call": name, "problem": problem, "failures": failures}
            _logger.info("a call of the store is tried again", extra=extra)
            await anyio.sleep(wait_s)

    async def _try(
        self,
        name: str,
        codes: frozenset[str],
        read: Callable[[Any], Awaitable[Any]] | None,
        arguments: Mapping[str, Any],
        scope: anyio.CancelScope,
    ) -> Mapping[str, Any] | str | _MayPass:
        try:
            answer = dict(await getattr(self._client, name)(**arguments))
            if read is not None:
                scope.deadline += answer["ContentLength"] / SLOWEST_BYTES_PER_S
                answer["Body"] = await read(answer["Body"])
        except ClientError as error:
            code = _code(error)
            if code in codes:
                return code
            if code in _LOGIN:
                raise StoreLoginError(self.url, _told(error)) from error
            if code == NO_BUCKET:
                raise BucketError(self.url, "there is no such bucket") from error
            if not _may_pass(error, code):
                raise StoreUnavailableError(self.url, 0, _told(error)) from error
            return _MayPass(_told(error))
        except _NO_LOGIN as error:
            raise StoreLoginError(self.url, _told(error)) from error
        except _BROKEN as error:
            return _MayPass(_told(error))
        except BotoCoreError as error:
            raise StoreUnavailableError(self.url, 0, _told(error)) from error
        return answer


class _MayPass(NamedTuple):
    """A failure that another try may not meet."""

    problem: str


@lru_cache(maxsize=1)
def _loader() -> Any:
    """Return what reads the description of S3: a third of a second, once for all clients."""
    return create_loader()


def _without_expect(request: Any, **_: object) -> None:
    """Do not ask before a body is sent: a silent server would be waited for, for ever."""
    request.headers.pop("Expect", None)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _may_pass(error: ClientError, code: str) -> bool:
    return code in _AGAIN or _status(error) >= _SERVER_ERRORS or _status(error) == 429  # noqa: PLR2004 - HTTP


def _told(error: Exception) -> str:
    told = mask_credentials(str(error) or repr(error))  # botocore names endpoints as they are
    return clip(told, _PROBLEM_LENGTH_MAX).rstrip(".")
