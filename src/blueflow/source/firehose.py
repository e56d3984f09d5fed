"""The relay source: reads, decodes, reconnects from the cursor, and never stalls silently."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from itertools import count
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import anyio
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)

from blueflow.backoff import Backoff
from blueflow.config import version
from blueflow.decode import Decoder, Wanted
from blueflow.errors import (
    BlueflowError,
    CursorError,
    FrameError,
    FrameSizeError,
    FutureCursorError,
    InvariantError,
    RelayRefusedError,
    RelayUnavailableError,
    SequenceResetError,
    SettingError,
    SourceUrlError,
    sole,
)
from blueflow.events import Position, epoch_after
from blueflow.logs import Throttle, clip, connection_id
from blueflow.masking import mask_credentials
from blueflow.metrics import Metrics
from blueflow.source.connection import (
    MESSAGE_BYTES_MAX,
    WRITE_BYTES_MAX,
    Inbox,
    RelayConnection,
    opener,
)
from blueflow.source.policy import StallClock, close_reason, refusal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from types import TracebackType
    from typing import Self

    from blueflow.decode import Check
    from blueflow.interfaces import Batch
    from blueflow.source.recorder import Recorder
    from blueflow.wire.frame import ErrorMessage

PATH = "/xrpc/com.atproto.sync.subscribeRepos"
OPEN_TIMEOUT_S = 20.0
BATCH_BYTES = 1024 * 1024  # decoding this much takes a few milliseconds; then others have a turn
_STOP_S = 2.0
_WATCH_S = 1.0
_OVERSIZE_MAX = 3
_DEFAULT_PORTS = {"wss": 443, "ws": 80}

_logger = logging.getLogger(__name__)


class FirehoseSource:
    """Batches of events from one relay, from a position on, across any number of connections.

    A task of its own reads into a buffer that is bounded by bytes; whoever iterates decodes. When
    the buffer is full, reading waits; the relay may then drop us, and we come back with the cursor.

    Args:
        url: `wss://HOST` or `ws://HOST:PORT`; the path of the stream is added when there is none.
        name: what events carry as `source`; the host by default.
        simulated: whether the data is made up.
        collections: NSIDs wanted (a trailing `.*` stands for all below); empty is everything.
        dids: accounts wanted; empty is all.
        check: blocks to compare with their hash: "all", "used" or "none".
        cursor: where to begin without a position: "live", "oldest" or a seq.
        on_sequence_reset: "stop" or "continue" when the relay begins to count anew.
        connect_wait_s: how long to try at first; later attempts never end.
        stall_timeout_s: silence that ends a connection; None follows the stream's rate.
        ping_interval_s: time between pings, and what a pong may take.
        buffer_bytes_max: bytes to read ahead.
        backoff: the delays between attempts.
        metrics: where to count.
        recorder: gets every frame decoded, and is closed at the end.
    """

    def __init__(  # noqa: PLR0913 - each is a choice of its own, with a default
        self,
        url: str = "wss://bsky.network",
        *,
        name: str | None = None,
        simulated: bool = False,
        collections: Collection[str] = (),
        dids: Collection[str] = (),
        check: Check = "all",
        cursor: str | int = "live",
        on_sequence_reset: str = "stop",
        connect_wait_s: float = 30.0,
        stall_timeout_s: float | None = None,
        ping_interval_s: float = 15.0,
        buffer_bytes_max: int = 32 * 1024 * 1024,
        backoff: Backoff | None = None,
        metrics: Metrics | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._url, host = _stream_url(url)
        self._shown_url = mask_credentials(url)
        self._name = name or host
        self._simulated = simulated
        self._wanted = Wanted(collections, dids)
        self._check = check
        self._begin = _begin(cursor)
        self._continue_after_reset = on_sequence_reset == "continue"
        self._connect_wait_s = connect_wait_s
        self._stall_timeout_s = stall_timeout_s
        self._ping_interval_s = ping_interval_s
        self._backoff = backoff or Backoff()
        self._buffer_bytes_max = buffer_bytes_max
        self._metrics = metrics or Metrics()
        self._recorder = recorder
        self._jitter = random.random
        self._decoder: Decoder | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connection: RelayConnection | None = None
        self._end_reason: str | None = None  # why we ended a connection ourselves
        self._failure: BlueflowError | None = None
        self._stopped = False
        self._remarks = Throttle()
        self._opened = False  # whether this address has ever been a relay
        self._too_big = False
        self.reconnects = 0

    @property
    def name(self) -> str:
        """What events and positions carry as `source`."""
        return self._decoder.source if self._decoder else self._name

    @property
    def simulated(self) -> bool:
        """Whether the data is made up."""
        return self._simulated

    @property
    def connected(self) -> bool:
        """Whether frames can arrive now."""
        return self._connection is not None

    @property
    def position(self) -> Position | None:
        """The position behind the last batch; None before the first frame."""
        return self._decoder.position if self._decoder else None

    @property
    def latest_time_us(self) -> int:
        """Relay time of the newest frame decoded; 0 before the first."""
        return self._decoder.latest_time_us if self._decoder else 0

    def connect_to(self, url: str) -> None:
        """Take another address, before the start; the name stays."""
        self._url, _ = _stream_url(url)
        self._shown_url = mask_credentials(url)

    async def start(self, after: Position | None) -> None:
        """Begin to read behind `after`; None begins at the cursor given."""
        if self._reader is not None:
            raise InvariantError("a source is started once")
        begin = after
        if begin is None and self._begin:
            begin = Position(self._name, self._begin)
        self._decoder = Decoder(
            begin.source if begin else self._name,
            after=begin,
            wanted=self._wanted,
            check=self._check,
        )
        inbox = self._inbox = Inbox(self._buffer_bytes_max)
        self._pending: deque[bytes | str] = deque()
        self._ended = False
        self._drained = asyncio.Event()
        metrics = self._metrics.source
        metrics.buffer_bytes_max.set(self._buffer_bytes_max)
        # Asked for when somebody looks: while the sink hangs, nothing runs here that could tell.
        metrics.buffer_bytes.set_function(lambda: inbox.bytes)
        metrics.reading_paused.set_function(lambda: inbox.paused)
        if not self._stopped:  # by another task, before there was anything to stop
            self._reader = asyncio.create_task(self._read(), name="firehose-reader")

    async def stop(self) -> None:
        """Close the connection; what is not taken comes again after a restart."""
        self._stopped = True
        if self._reader is None:
            return
        self._reader.cancel()
        with anyio.move_on_after(_STOP_S, shield=True):
            await asyncio.wait([self._reader])
        self._inbox.wake()
        if self._recorder is not None:
            self._recorder.close()

    async def __aenter__(self) -> Self:
        if self._reader is None:
            await self.start(None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch, of at most about 1 MiB of frames.

        Raises:
            RelayUnavailableError: no first connection within the time allowed.
            RelayRefusedError: the server will never give this stream.
            SequenceResetError: the relay restarted its sequence.
            FutureCursorError: the relay does not know the cursor yet.
            FrameSizeError: a message too large comes again and again.
        """
        decoder = self._decoder
        if decoder is None:
            await self.start(None)
            decoder = self._decoder
        if decoder is None:
            raise InvariantError("a started source has a decoder")
        while not self._stopped:
            await asyncio.sleep(0)  # the reader's turn; behind here nothing can be cancelled
            if not self._pending:
                self._pending.extend(self._inbox.take(BATCH_BYTES))
            if self._pending:
                self._decode(decoder)
                batch = self._take(decoder)
                if batch.frames:
                    return batch
                continue
            if self._failure is not None:
                raise self._failure
            if self._ended:
                self._ended = False
                self._drained.set()  # everything received is decoded: now the cursor is known
            elif self._reader is not None and self._reader.done():
                self._reader.result()
                raise InvariantError("a reader ends with a failure or when it is stopped")
            await self._inbox.wait()
        raise StopAsyncIteration

    def _decode(self, decoder: Decoder) -> None:
        now_us = time.time_ns() // 1000
        pending, recorder = self._pending, self._recorder
        while pending:
            message = pending.popleft()
            try:
                error = decoder.feed(message, now_us)
            except FrameError as bad:
                _logger.warning(
                    "a message that is no frame; reconnecting from the cursor",
                    extra={"problem": clip(bad.problem), "bytes": bad.size},
                )
                self._drop("frame_error")
                return
            except FutureCursorError as future:
                self._fail(FutureCursorError(self._shown_url, future.cursor))
                return
            except SequenceResetError as reset:
                self._metrics.source.sequence_resets.inc()
                if not self._continue_after_reset:
                    self._fail(reset)
                    return
                pending.appendleft(message)
                if decoder.take_ready:
                    return  # hand over the old epoch's events first
                decoder.new_epoch(epoch_after(decoder.source))
                _logger.warning(
                    "the relay restarted its sequence: a new epoch begins",
                    extra={"source": decoder.source, "last_seq": reset.last_seq, "seq": reset.seq},
                )
                continue
            if error is not None:
                self._judge(error)
                return
            if recorder is not None and message and isinstance(message, bytes):
                recorder.add(message)

    def _judge(self, error: ErrorMessage) -> None:
        extra = {"error": clip(error.error), "message_text": clip(error.message or "")}
        _logger.warning("the relay sent an error frame", extra=extra)
        if error.error == "FutureCursor":
            position = self.position
            self._fail(FutureCursorError(self._shown_url, position.seq if position else -1))
            return
        self._drop("too_slow" if error.error == "ConsumerTooSlow" else "error_frame")

    def _take(self, decoder: Decoder) -> Batch:
        batch = decoder.take()
        metrics, sequence = self._metrics.source, decoder.sequence
        metrics.frames.inc(batch.frames)
        metrics.frame_bytes.inc(batch.frame_bytes)
        if sequence.last is not None:
            metrics.newest(sequence.last, decoder.latest_time_us)
        counts = sequence.counts
        metrics.missed_seqs.reach(counts.missed)
        metrics.replayed_frames.reach(counts.replayed)
        metrics.duplicate_frames.reach(counts.duplicates)
        metrics.late_frames.reach(counts.late)
        if counts.possible_loss > metrics.possible_loss_seqs.total:
            _logger.warning(
                "the first frame after the resume is not the next: events may be lost",
                extra={
                    "missing_seqs": counts.possible_loss - metrics.possible_loss_seqs.total,
                    "seq": sequence.last,
                },
            )
            metrics.possible_loss_seqs.reach(counts.possible_loss)
        for reason, number in decoder.counts.ignored.items():
            metrics.ignored_frames[reason].reach(number)
        metrics.unknown_fields.reach(decoder.counts.unknown_fields)
        self._metrics.pipeline.filtered_frames.reach(decoder.counts.filtered_frames)
        for info in decoder.take_infos():
            metrics.infos[info.name].inc()
            if self._remarks.admit(time.monotonic()) is None:
                continue
            extra = {"info": clip(info.name), "message_text": clip(info.message or "", 256)}
            _logger.warning("the relay remarks on the stream", extra=extra)
        return batch

    def _drop(self, reason: str) -> None:
        """End the connection for `reason`; what it brought and is not decoded comes again."""
        self._pending.clear()
        if self._connection is not None and self._end_reason is None:
            self._end_reason = reason
            self._connection.abandon()
        else:
            self._inbox.clear()  # it has ended already; the rest is behind the bad message
            self._end_reason = self._end_reason or reason
        self._inbox.wake()

    def _fail(self, error: BlueflowError) -> None:
        """End the source with an error that decoding met; what lies behind it is given up."""
        self._failure = self._failure or error
        self._pending.clear()
        if self._connection is not None:
            self._connection.abandon()  # now, or the next frames would be taken for the next ones
        self._inbox.clear()
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> None:
        """Keep a connection open, one after the other, until stopped."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._count_pauses)
                try:
                    await self._keep_connected()
                except BlueflowError as error:
                    self._failure = error
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise sole(group) from None  # of one: callers know errors
        finally:
            self._inbox.wake()

    async def _keep_connected(self) -> None:
        failures = oversize = 0
        deadline_s = time.monotonic() + self._connect_wait_s
        for number in count(1):
            connection_id.set(f"c{number}")
            wait_s = 0.0
            before = self.position
            try:
                reason = await self._one_connection()
            except _ConnectFailure as failure:
                reason, wait_s = failure.reason, failure.wait_s
                failures += 1
                if not self._opened and time.monotonic() + wait_s > deadline_s:
                    raise RelayUnavailableError(
                        self._shown_url, self._connect_wait_s, failure.problem
                    ) from failure
                _logger.warning(
                    "no connection to the relay",
                    extra={"problem": clip(failure.problem, 200), "attempt": failures},
                )
            else:
                await self._wait_until_drained()
                position = self.position
                progressed = position != before
                failures = 0 if progressed else failures + 1
                oversize = oversize + 1 if self._too_big and not progressed else 0
                if oversize >= _OVERSIZE_MAX:
                    raise FrameSizeError(
                        self._name, position.seq if position else None, MESSAGE_BYTES_MAX
                    )
            self.reconnects += 1
            self._metrics.source.reconnects[reason].inc()
            delay_s = max(wait_s, self._backoff.delay_s(failures, self._jitter()))
            _logger.info("connecting again", extra={"reason": reason, "delay_s": round(delay_s, 3)})
            await asyncio.sleep(delay_s)

    async def _one_connection(self) -> str:
        """Open a connection, read until it ends, and return why it did."""
        url = self._url_with_cursor()
        began_s = time.monotonic()
        self._end_reason = None
        connection = await self._open(url)
        self._connection = connection
        self._opened = True
        if self._decoder is not None:
            self._decoder.connected()
        self._inbox.open()
        metrics = self._metrics.source
        metrics.connect_seconds.observe(time.monotonic() - began_s)
        metrics.connected.set(1)
        _logger.info("connected to the relay", extra={"url": mask_credentials(url)})
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, connection)
                tasks.start_soon(self._ping, connection)
                await connection.wait_closed()
                tasks.cancel_scope.cancel()
        except BaseException:  # cancelled, that is stopped: nobody will read on
            connection.abandon()
            raise
        finally:
            self._connection = None
            metrics.connected.set(0)
        self._too_big = connection.refused_message
        reason = self._end_reason or close_reason(connection.end_code)
        _logger.info(
            "the connection ended",
            extra={"reason": reason, "close_reason": clip(connection.close_reason or "")},
        )
        return reason

    async def _open(self, url: str) -> RelayConnection:
        how = opener(
            url,
            self._inbox,
            open_timeout_s=min(OPEN_TIMEOUT_S, self._connect_wait_s),
            user_agent=f"blueflow/{version()}",
        )
        try:
            connection = await how
        except InvalidStatus as error:
            response = error.response
            verdict = refusal(
                response.status_code,
                next(iter(response.headers.get_all("Retry-After")), None),  # a proxy may add one
                seen_frames=self._opened,
                now_s=time.time(),
            )
            problem = f"HTTP {response.status_code}"
            if verdict.fatal:
                raise RelayRefusedError(self._shown_url, problem) from error
            raise _ConnectFailure(verdict.reason, problem, verdict.wait_s) from error
        except (ProxyError, OSError, EOFError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
            raise _ConnectFailure("connect_error", problem) from error
        except (InvalidProxy, ImportError) as error:  # the latter: a SOCKS proxy needs a library
            problem = mask_credentials(str(error))
            raise SettingError("the proxy", "HTTPS_PROXY or its like", problem) from error
        except InvalidHandshake as error:
            if isinstance(error.__cause__, EOFError):  # a load balancer whose relay is not up
                raise _ConnectFailure("connect_error", str(error)) from error
            raise self._odd_answer(str(error)) from error
        except (InvalidURI, LookupError, ValueError) as error:
            # Ours was looked at in the beginning, so a redirect leads to none, or to several.
            raise self._odd_answer(clip(f"a redirect to nowhere: {error}", 200)) from error
        if not isinstance(connection, RelayConnection):
            raise InvariantError("websockets opened a connection of ours")
        return connection

    def _odd_answer(self, problem: str) -> Exception:
        """Judge what no relay answers: a bad moment of one that has been seen, else none."""
        if self._opened:
            return _ConnectFailure("http_error", problem)
        return RelayRefusedError(self._shown_url, problem)

    async def _watch(self, connection: RelayConnection) -> None:
        """End a connection that is open and silent."""
        clock = StallClock(time.monotonic(), self._stall_timeout_s)
        inbox = self._inbox
        while True:
            await asyncio.sleep(min(_WATCH_S, clock.timeout_s / 4))
            if connection.transport.get_write_buffer_size() > WRITE_BYTES_MAX:
                self._end(connection, "ping_timeout")  # it pings and pings, and reads nothing
                return
            if clock.look(time.monotonic(), inbox.received, reading=not inbox.paused):
                self._end(connection, "stalled")
                return

    async def _ping(self, connection: RelayConnection) -> None:
        """End a connection whose other side has gone without a word."""
        inbox = self._inbox
        while True:
            await asyncio.sleep(self._ping_interval_s)
            received = inbox.received
            with (
                anyio.move_on_after(self._ping_interval_s) as scope,
                contextlib.suppress(ConnectionClosed),  # the reader is about to see it
            ):
                await (await connection.ping())
            # A pong waits behind the frames that we do not read or that are still on their way.
            if scope.cancelled_caught and not inbox.paused and inbox.received == received:
                self._end(connection, "ping_timeout")
                return

    async def _count_pauses(self) -> None:
        """Count the time that reading waits while it does, on whatever connection."""
        inbox, counter, counted_s = self._inbox, self._metrics.source.paused_seconds, 0.0
        while True:
            try:
                await asyncio.sleep(_WATCH_S)
            finally:  # also what the last second had
                paused_s = inbox.paused_s
                counter.inc(paused_s - counted_s)
                counted_s = paused_s

    def _end(self, connection: RelayConnection, reason: str) -> None:
        _logger.warning("the connection is dead; reconnecting", extra={"reason": reason})
        if self._end_reason is None:
            self._end_reason = reason
        connection.transport.abort()

    async def _wait_until_drained(self) -> None:
        """Wait until everything received is decoded: only then is the cursor known."""
        self._drained.clear()
        self._ended = True
        self._inbox.wake()
        await self._drained.wait()

    def _url_with_cursor(self) -> str:
        position = self.position
        cursor = position.seq if position else self._begin
        if cursor is None:
            return self._url
        parts = urlsplit(self._url)
        given = [
            pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] != "cursor"
        ]
        query = urlencode([*given, ("cursor", str(cursor))])
        return urlunsplit(parts._replace(query=query))


class _ConnectFailure(Exception):  # noqa: N818 - a signal between two methods, not an error
    def __init__(self, reason: str, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(reason, problem, wait_s)
        self.reason, self.problem, self.wait_s = reason, problem, wait_s


def _begin(cursor: str | int) -> int | None:
    if cursor in ("live", "saved"):
        return None
    if cursor == "oldest":
        return 0
    with contextlib.suppress(ValueError):
        if (number := int(cursor)) >= 0:
            return number
    raise CursorError(str(cursor), "it is neither live, oldest nor a seq")


def _stream_url(url: str) -> tuple[str, str]:
    """Return the address of the stream, and the host (with a port that is not the default)."""
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:  # of which UnicodeError is one; urlsplit's words may cite a password
        problem = (
            "its host or port cannot be read; in a user or a password, "
            "what is neither letter nor digit is percent-encoded (/ is %2F)"
        )
        raise SourceUrlError(mask_credentials(url), problem) from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise SourceUrlError(mask_credentials(url), f"the scheme {parts.scheme!r} is not wss or ws")
    if not parts.hostname:
        raise SourceUrlError(mask_credentials(url), "there is no host in it")
    host = (
        parts.hostname
        if port in (None, _DEFAULT_PORTS[parts.scheme])
        else (f"{parts.hostname}:{port}")
    )
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or PATH)), host
