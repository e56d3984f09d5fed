"""Every error that blueflow raises on purpose.

A class stands for one decision that its catcher can take. `code` is stable and has an entry in
`docs/errors.md`; `exit_code` is what a command exits with when nobody catches the error.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of every command; `docs/errors.md` tells what a supervisor should do with each."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2  # argparse's own code: flags or settings are wrong
    UNAVAILABLE = 69  # EX_UNAVAILABLE: a service is away; a restart can help
    BROKEN_PROMISE = 70  # EX_SOFTWARE: an invariant of ours does not hold
    CANNOT_WRITE = 73  # EX_CANTCREAT: the output cannot be written
    REFUSED = 78  # EX_CONFIG: an operator has to decide; do not restart


class BlueflowError(Exception):
    """What happened, where, with which values, what to do, and whether another try can help."""

    code: ClassVar[str] = "BF-000"
    remedy: ClassVar[str] = ""
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[Exit] = Exit.UNEXPECTED

    def what(self) -> str:
        """Say in one sentence what happened; the subclass has the values."""
        return " ".join(str(arg) for arg in self.args)

    def __str__(self) -> str:
        return f"{self.code}: {self.what()} {self.remedy}".rstrip()


class InvariantError(BlueflowError):
    """A promise of blueflow's own does not hold; the process ends before it stores a lie."""

    code = "BF-001"
    remedy = "This is a bug in blueflow: keep the output as it is and report this line."
    exit_code = Exit.BROKEN_PROMISE

    def __init__(self, promise: str) -> None:
        super().__init__(promise)
        self.promise = promise

    def what(self) -> str:
        return f"broken promise: {self.promise}."


class SettingError(BlueflowError):
    """A setting has no usable value."""

    code = "BF-002"
    exit_code = Exit.USAGE

    def __init__(self, name: str, origin: str, problem: str) -> None:
        super().__init__(name, origin, problem)
        self.name, self.origin, self.problem = name, origin, problem

    def what(self) -> str:
        return f"{self.name} (from {self.origin}): {self.problem}."

    remedy = "`blueflow config` shows every setting, its value and where it came from."


class MissingExtraError(BlueflowError):
    """An optional part of blueflow was asked for that is not installed."""

    code = "BF-003"
    remedy = "Install what is named in quotes, for example with pip."
    exit_code = Exit.USAGE

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(extra, needed_for)
        self.extra, self.needed_for = extra, needed_for

    def what(self) -> str:
        return f'{self.needed_for} need "blueflow[{self.extra}]", which is not installed.'


class SourceUrlError(BlueflowError):
    """`--source` names nothing that blueflow can read."""

    code = "BF-101"
    remedy = "Use wss://HOST (a relay), ws://HOST:PORT, replay:FILE[.zst] or sim (simulated)."
    exit_code = Exit.USAGE

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"cannot use source {self.url!r}: {self.problem}."


class RelayUnavailableError(BlueflowError):
    """The relay could not be reached within the time allowed at start-up."""

    code = "BF-102"
    remedy = "Check the address, the network and HTTPS_PROXY; --connect-wait sets how long to try."
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, url: str, waited_s: float, problem: str) -> None:
        super().__init__(url, waited_s, problem)
        self.url, self.waited_s, self.problem = url, waited_s, problem

    def what(self) -> str:
        return f"no connection to {self.url} within {self.waited_s:g} s: {self.problem}."


class RelayRefusedError(BlueflowError):
    """The server answers, but it will never give us this stream."""

    code = "BF-103"
    remedy = "It is not a relay, or it wants other credentials: choose another --source."
    exit_code = Exit.REFUSED

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"{self.url} refuses the stream: {self.problem}."


class SimulatedRelayError(BlueflowError):
    """The simulated relay, a child process, did not start or has ended."""

    code = "BF-104"
    remedy = "If it told a reason, that is on stderr before this line. Then start again."
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def what(self) -> str:
        return f"the simulated relay {self.problem}."


class ServiceError(BlueflowError):
    """A server that `blueflow.testing.services` runs did not start, has ended or did not work."""

    code = "BF-105"
    remedy = "Correct what it says, or take another --port or --data; then start again."
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, service: str, problem: str, output: str) -> None:
        super().__init__(service, problem, output)
        self.service, self.problem, self.output = service, problem, output

    def what(self) -> str:
        said = f"; it said: {self.output.rstrip('.')}" if self.output else ""
        return f"{self.service}: {self.problem}{said}."


class MissingProgramError(BlueflowError):
    """A program from outside is needed that is not on PATH."""

    code = "BF-106"
    remedy = "Install it with the command in brackets, or correct PATH."
    exit_code = Exit.USAGE

    def __init__(self, program: str, needed_for: str, install: str) -> None:
        super().__init__(program, needed_for, install)
        self.program, self.needed_for, self.install = program, needed_for, install

    def what(self) -> str:
        return f"{self.needed_for} needs {self.program}, which is not on PATH ({self.install})."


class FrameError(BlueflowError):
    """A websocket message is not a frame: the spec drops the connection."""

    code = "BF-110"
    remedy = "Reconnect from the cursor; met again after the same seq it is quarantined."
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, source: str, size: int, problem: str) -> None:
        super().__init__(source, size, problem)
        self.source, self.size, self.problem = source, size, problem

    def what(self) -> str:
        return f"{self.source} sent {self.size} bytes that are no frame: {self.problem}."


class FutureCursorError(BlueflowError):
    """Our cursor is ahead of the relay's stream."""

    code = "BF-111"
    remedy = (
        "The relay was changed or lost its sequence: begin anew with --pipeline NAME "
        "--cursor oldest, or take another relay."
    )
    exit_code = Exit.REFUSED

    def __init__(self, url: str, cursor: int) -> None:
        super().__init__(url, cursor)
        self.url, self.cursor = url, cursor

    def what(self) -> str:
        return f"{self.url} has not reached the cursor {self.cursor}."


class SequenceResetError(BlueflowError):
    """The relay sends lower seqs with newer times: it began to count anew."""

    code = "BF-113"
    remedy = (
        "Events may be missing. Go on in a new epoch with --on-sequence-reset continue, "
        "or take another relay."
    )
    exit_code = Exit.REFUSED

    def __init__(self, source: str, seq: int, last_seq: int) -> None:
        super().__init__(source, seq, last_seq)
        self.source, self.seq, self.last_seq = source, seq, last_seq

    def what(self) -> str:
        return (
            f"{self.source} restarted its sequence: it sent seq {self.seq}, newer than "
            f"seq {self.last_seq} which is the position."
        )


class CarError(BlueflowError):
    """The blocks of a commit are not a sound CAR: nothing in the commit can be trusted."""

    code = "BF-114"
    remedy = "The event is quarantined; fetch the repository from its PDS if you need the record."

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(reason, problem)
        self.reason, self.problem = reason, problem

    def what(self) -> str:
        return f"unsound CAR ({self.reason}): {self.problem}."


class RecordError(BlueflowError):
    """One record in a sound commit cannot be decoded."""

    code = "BF-115"
    remedy = "The operation is quarantined; the rest of the commit goes on."

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(reason, problem)
        self.reason, self.problem = reason, problem

    def what(self) -> str:
        return f"unusable record ({self.reason}): {self.problem}."


class FrameSizeError(BlueflowError):
    """A message is so large that the connection ends before it can be stepped over."""

    code = "BF-116"
    exit_code = Exit.REFUSED

    def __init__(self, source: str, after_seq: int | None, bytes_max: int) -> None:
        super().__init__(source, after_seq, bytes_max)
        self.source, self.after_seq, self.bytes_max = source, after_seq, bytes_max

    remedy = "No relay may send this; take another one, or go on live with a new --pipeline."

    def what(self) -> str:
        return (
            f"{self.source} sends, after seq {self.after_seq}, again and again a message "
            f"above {self.bytes_max} bytes."
        )


class CursorError(BlueflowError):
    """The cursor asked for contradicts what is there, or is no cursor."""

    code = "BF-120"
    exit_code = Exit.USAGE

    def __init__(self, cursor: str, problem: str) -> None:
        super().__init__(cursor, problem)
        self.cursor, self.problem = cursor, problem

    remedy = (
        "Use --cursor saved (the default), or --cursor live|oldest|N with a new --pipeline NAME."
    )

    def what(self) -> str:
        return f"cannot start at cursor {self.cursor!r}: {self.problem}."


class RecordingError(BlueflowError):
    """A file is not a recording of frames or wire JSON, or it is damaged.

    `offset` is the place of the damage in the (decompressed) file; -1 when there is none to tell.
    """

    code = "BF-121"
    remedy = "replay: takes what --record wrote, or wire JSON lines, plain or .zst."
    exit_code = Exit.USAGE

    def __init__(self, name: str, offset: int, problem: str) -> None:
        super().__init__(name, offset, problem)
        self.name, self.offset, self.problem = name, offset, problem

    def what(self) -> str:
        place = f" at byte {self.offset}" if self.offset >= 0 else ""
        return f"cannot replay {self.name}: {self.problem}{place}."


class CursorFileError(CursorError):
    """The cursor file of `blueflow.firehose` holds no position, or that of another source."""

    code = "BF-122"
    remedy = "The file was not changed. Name another one, or remove it to begin anew."

    def what(self) -> str:
        return f"cannot go on from {self.cursor}: {self.problem}."


class SinkUrlError(BlueflowError):
    """`--sink` names nothing that blueflow can write."""

    code = "BF-201"
    remedy = (
        "Use --sink kafka://HOST:PORT (or KAFKA_BOOTSTRAP_SERVERS), lake:DIR, lake:s3://BUCKET, "
        "jsonl:DIR, stdout, or a class of yours as module:Class."
    )
    exit_code = Exit.USAGE

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"cannot use sink {self.url!r}: {self.problem}." if self.url else "no sink is set."


class SinkLoadError(BlueflowError):
    """`--sink module:Class` does not give a sink."""

    code = "BF-207"
    remedy = "docs/guides/custom-sink.md shows a whole one, and the suite that proves it."
    exit_code = Exit.USAGE

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"cannot load sink {self.url!r}: {self.problem}."


class OutputNotWritableError(BlueflowError):
    """The output folder cannot be used as it is: nothing was written to it."""

    code = "BF-202"
    remedy = "Name a folder on a local disk that you may write to; its parent has to exist."
    exit_code = Exit.CANNOT_WRITE

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def what(self) -> str:
        return f"cannot write to {self.path}: {self.problem}."


class OutputLockedError(BlueflowError):
    """Another writer has the output: two would mix their events."""

    code = "BF-203"
    remedy = "Stop that one first, or write to another folder."
    exit_code = Exit.REFUSED

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(path, holder)
        self.path, self.holder = path, holder

    def what(self) -> str:
        return f"{self.path} has another writer: {self.holder}."


class CommitLogError(BlueflowError):
    """The commit log or what it names is damaged: nothing in it was changed."""

    code = "BF-204"
    remedy = "Put the folder back from a copy, or write to a new one; blueflow repairs no damage."
    exit_code = Exit.REFUSED

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def what(self) -> str:
        return f"{self.path} is damaged: {self.problem}."


class OtherSourceError(BlueflowError):
    """The output belongs to another source; seqs of two sources cannot be compared."""

    code = "BF-205"
    remedy = (
        "Write to another folder or --topic-prefix (another source, the same kind of data: a new "
        "--pipeline)."
    )
    exit_code = Exit.REFUSED

    def __init__(self, path: str, stored: str, wanted: str) -> None:
        super().__init__(path, stored, wanted)
        self.path, self.stored, self.wanted = path, stored, wanted

    def what(self) -> str:
        return f"{self.path} holds {self.stored}, and this run would add {self.wanted}."


class RecordFileError(BlueflowError):
    """The file that `--record` names cannot be made."""

    code = "BF-206"
    remedy = "Name a new file in a folder that exists: a recording is never written over."
    exit_code = Exit.CANNOT_WRITE

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def what(self) -> str:
        return f"cannot record to {self.path}: {self.problem}."


class OutputIOError(BlueflowError):
    """The disk failed or is full. After a failed write or fsync that call is not tried again."""

    code = "BF-208"
    remedy = (
        "What was committed is whole: free space or repair the disk, then start again; "
        "it goes on from the last commit."
    )
    exit_code = Exit.CANNOT_WRITE

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def what(self) -> str:
        return f"writing {self.path} failed: {self.problem}."


class OutputClosedError(BlueflowError):
    """The reader of our output has gone (`| head`): a normal end."""

    code = "BF-209"
    remedy = "Nothing is wrong: start again when there is a reader."
    exit_code = Exit.OK

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def what(self) -> str:
        return f"the reader of {self.path} has gone."


class KafkaUnavailableError(BlueflowError):
    """No broker answered within the time allowed."""

    code = "BF-220"
    remedy = (
        "Check the address, that the broker advertises one that is reachable from here, and its "
        "TLS; `python -m blueflow.testing.services up kafka` starts one on this machine."
    )
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, bootstrap: str, waited_s: float, problem: str) -> None:
        super().__init__(bootstrap, waited_s, problem)
        self.bootstrap, self.waited_s, self.problem = bootstrap, waited_s, problem

    def what(self) -> str:
        return (
            f"Kafka at {self.bootstrap} did not answer for {self.waited_s:.0f} s: {self.problem}."
        )


class KafkaLoginError(BlueflowError):
    """The broker refuses our credentials, or we its certificate."""

    code = "BF-221"
    remedy = (
        "Check --kafka-security-protocol, --kafka-sasl-mechanism, --kafka-username, "
        "BLUEFLOW_KAFKA_PASSWORD and --kafka-ca-file. Nothing was written."
    )
    exit_code = Exit.REFUSED

    def __init__(self, bootstrap: str, problem: str) -> None:
        super().__init__(bootstrap, problem)
        self.bootstrap, self.problem = bootstrap, problem

    def what(self) -> str:
        return f"no login at Kafka at {self.bootstrap}: {self.problem}."


class KafkaRightsError(BlueflowError):
    """The user may not do what is needed."""

    code = "BF-222"
    remedy = (
        "Grant it with kafka-acls; docs/guides/kafka.md lists every right that blueflow needs. "
        "The cursor did not move."
    )
    exit_code = Exit.REFUSED

    def __init__(self, right: str, resource: str) -> None:
        super().__init__(right, resource)
        self.right, self.resource = right, resource

    def what(self) -> str:
        return f"this user has no right to {self.right} {self.resource}."


class TopicError(BlueflowError):
    """A topic is not as blueflow needs it; blueflow never alters one."""

    code = "BF-223"
    remedy = "blueflow never alters a topic that is there; another --topic-prefix makes new ones."
    exit_code = Exit.REFUSED

    def __init__(self, topic: str, problem: str, how: str) -> None:
        super().__init__(topic, problem, how)
        self.topic, self.problem, self.how = topic, problem, how

    def what(self) -> str:
        return f"topic {self.topic} {self.problem}. To mend it: {self.how}."


class RetentionError(BlueflowError):
    """The source is older than what the topics keep: Kafka would delete the records at once."""

    code = "BF-224"
    remedy = (
        "Write to topics that keep them: a new --topic-prefix with --kafka-retention forever, or "
        "raise retention.ms of the topics. Nothing was written."
    )
    exit_code = Exit.REFUSED

    def __init__(self, source: str, age_s: float, topic: str, retention_s: float) -> None:
        super().__init__(source, age_s, topic, retention_s)
        self.source, self.age_s = source, age_s
        self.topic, self.retention_s = topic, retention_s

    def what(self) -> str:
        return (
            f"events of {self.source} are {self.age_s / 3600:,.0f} h old, and topic {self.topic} "
            f"keeps {self.retention_s / 3600:,.0f} h."
        )


class FencedError(BlueflowError):
    """Another process writes for this pipeline now; this one must not go on, nor be restarted."""

    code = "BF-225"
    remedy = (
        "One process per pipeline: leave the other one running, or start this one with "
        "another --pipeline. Nothing is lost or twice."
    )
    exit_code = Exit.REFUSED

    def __init__(self, pipeline: str, instance: str) -> None:
        super().__init__(pipeline, instance)
        self.pipeline, self.instance = pipeline, instance

    def what(self) -> str:
        return f"instance {self.instance} took pipeline {self.pipeline} over."


class CursorTopicError(BlueflowError):
    """The topic of the cursors cannot be understood: nobody knows where to go on."""

    code = "BF-226"
    remedy = (
        "Somebody else wrote to it, or a newer blueflow did: look at it with a console consumer, "
        "or write with another --topic-prefix. Nothing was written."
    )
    exit_code = Exit.REFUSED

    def __init__(self, topic: str, offset: int, problem: str) -> None:
        super().__init__(topic, offset, problem)
        self.topic, self.offset, self.problem = topic, offset, problem

    def what(self) -> str:
        return f"record {self.offset} of topic {self.topic} is no cursor: {self.problem}."


class KafkaRefusesError(BlueflowError):
    """Kafka refuses, again and again, and it is not a few odd records."""

    code = "BF-227"
    remedy = "Look at the broker's log for this client. A cursor did not move; nothing is lost."
    exit_code = Exit.REFUSED

    def __init__(self, topic: str, problem: str) -> None:
        super().__init__(topic, problem)
        self.topic, self.problem = topic, problem

    def what(self) -> str:
        return f"Kafka refuses what is asked of topic {self.topic}: {self.problem}."


class HeldBackError(BlueflowError):
    """Committed records cannot be read, since an older transaction of somebody is still open."""

    code = "BF-228"
    remedy = (
        "Its producer is slow, paused or dead: end it, and the broker aborts the transaction after "
        "its timeout; or `kafka-transactions.sh abort`. Then read on from the same positions."
    )
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, partition: str, offset: int, held_s: float, holder: str) -> None:
        super().__init__(partition, offset, held_s, holder)
        self.partition, self.offset = partition, offset
        self.held_s, self.holder = held_s, holder

    def what(self) -> str:
        return (
            f"{self.partition} has been held back at offset {self.offset} for {self.held_s:.0f} s "
            f"by {self.holder}."
        )


class RecordsGoneError(BlueflowError):
    """Retention removed records before they were read, or the partition was cut or made anew."""

    code = "BF-229"
    remedy = (
        "What is missing is lost to this reader: note the range, then go on at an offset that the "
        "partition has: its oldest, or its end."
    )
    exit_code = Exit.REFUSED

    def __init__(self, partition: str, wanted: int, oldest: int, end: int) -> None:
        super().__init__(partition, wanted, oldest, end)
        self.partition, self.wanted, self.oldest, self.end = partition, wanted, oldest, end

    def what(self) -> str:
        there = f"it begins at {self.oldest} and ends at {self.end}"
        return f"{self.partition} has no offset {self.wanted}; {there}."


class DrainTimeoutError(BlueflowError):
    """The sink did not make everything durable in the time that a stop may take."""

    code = "BF-130"
    remedy = "Nothing is lost: what is missing comes again with the next start. See --drain."
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, drain_s: float) -> None:
        super().__init__(drain_s)
        self.drain_s = drain_s

    def what(self) -> str:
        return f"the sink was not done {self.drain_s:g} s after the stop."


def sole(error: BaseException) -> BaseException:
    """Return what a group of one holds, however deep; other errors and groups as they are."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def foremost(error: BaseException) -> BaseException:
    """Return the error of a group that tells most; of calls that failed together, one is enough.

    A broken promise before anything unexpected, and that before an error that another try may not
    meet; else the first.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [foremost(one) for one in error.exceptions]
    return min(leaves, key=_weight)


def _weight(error: BaseException) -> int:
    if isinstance(error, BlueflowError):
        return 0 if isinstance(error, InvariantError) else 3 if error.retryable else 2
    return 1


class StoreUnavailableError(BlueflowError):
    """The store of a lake did not answer in time."""

    code = "BF-240"
    remedy = (
        "Check the address (MINIO_ENDPOINT) and the network; what is not committed comes again "
        "after a restart."
    )
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, url: str, waited_s: float, problem: str) -> None:
        super().__init__(url, waited_s, problem)
        self.url, self.waited_s, self.problem = url, waited_s, problem

    def what(self) -> str:
        return f"{self.url} did not do it within {self.waited_s:g} s: {self.problem}."


class StoreLoginError(BlueflowError):
    """The store of a lake refuses the credentials, or they lack a right."""

    code = "BF-241"
    remedy = (
        "Set MINIO_ACCESS_KEY and MINIO_SECRET_KEY, or the credentials of AWS; they need to list, "
        "read, write and delete in the bucket."
    )
    exit_code = Exit.REFUSED

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"{self.url} refuses us: {self.problem}."


class BucketError(BlueflowError):
    """The bucket of a lake is missing."""

    code = "BF-242"
    remedy = "Make it, or name another; a writer makes it itself where it may."
    exit_code = Exit.REFUSED

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"{self.url}: {self.problem}."


class StoreUnfitError(BlueflowError):
    """A store cannot keep a lake safely."""

    code = "BF-243"
    remedy = "Take one that honours If-None-Match, such as AWS S3, MinIO of 2024-08 or newer."
    exit_code = Exit.REFUSED

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"{self.url} cannot keep a lake: {self.problem}."


class UploadGoneError(BlueflowError):
    """What was uploaded for a file expired before the file appeared."""

    code = "BF-244"
    remedy = "A restart makes the file anew from its input."
    retryable = True
    exit_code = Exit.UNAVAILABLE

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        self.url, self.key = url, key

    def what(self) -> str:
        return f"the upload of {self.key} to {self.url} is gone, and the file is not there."


class LakeFencedError(BlueflowError):
    """Another process took over this part of a lake."""

    code = "BF-245"
    remedy = "Let it work, and do not restart this one; two that write need other --shard numbers."
    exit_code = Exit.REFUSED

    def __init__(self, url: str, shard: str, by: str) -> None:
        super().__init__(url, shard, by)
        self.url, self.shard, self.by = url, shard, by

    def what(self) -> str:
        return f"{self.by} took over {self.shard} of {self.url}."


class InputLostError(BlueflowError):
    """Input of a lake is gone that nobody has read yet."""

    code = "BF-246"
    remedy = "Get it from elsewhere, or go on without it: --accept-loss."
    exit_code = Exit.REFUSED

    def __init__(self, name: str, first: int, end: int, why: str) -> None:
        super().__init__(name, first, end, why)
        self.name, self.first, self.end, self.why = name, first, end, why

    def what(self) -> str:
        return f"{self.name}: {self.first} up to {self.end} (exclusive) is lost: {self.why}."


class NoLakeError(BlueflowError):
    """There is no lake to read."""

    code = "BF-247"
    remedy = "Name the folder or s3://BUCKET that `lake:` or the archive was given."
    exit_code = Exit.USAGE

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url

    def what(self) -> str:
        return f"{self.url} holds no lake."


class CompactionError(BlueflowError):
    """An hour of a lake cannot be compacted; the others can."""

    code = "BF-248"
    remedy = (
        "Nothing was changed, and fresh/ has every row: run `blueflow lake verify`, which names "
        "the damaged files."
    )

    def __init__(self, hour: str, problem: str) -> None:
        super().__init__(hour, problem)
        self.hour, self.problem = hour, problem

    def what(self) -> str:
        return f"{self.hour} cannot be compacted: {self.problem}."


class LakeUrlError(BlueflowError):
    """An address where no lake can be."""

    code = "BF-249"
    remedy = (
        "Name a folder, or s3://BUCKET[/PREFIX]: 3 to 63 lowercase letters, digits, dots or dashes."
    )
    exit_code = Exit.USAGE

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def what(self) -> str:
        return f"there can be no lake at {self.url!r}: {self.problem}."


class MissingLibraryError(BlueflowError):
    """A library of others is not installed that only some uses need; no extra brings it."""

    code = "BF-250"
    remedy = "Install what is named in quotes, for example with pip."
    exit_code = Exit.USAGE

    def __init__(self, library: str, needed_for: str) -> None:
        super().__init__(library, needed_for)
        self.library, self.needed_for = library, needed_for

    def what(self) -> str:
        return f'{self.needed_for} needs "{self.library}", which is not installed.'
