"""A lake in a bucket of an S3 server."""

from __future__ import annotations

import hashlib
import re
import secrets
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from blueflow.errors import (
    BlueflowError,
    BucketError,
    LakeUrlError,
    StoreUnfitError,
    UploadGoneError,
    foremost,
)
from blueflow.files.disk import output_error
from blueflow.lake.layout import BOOKKEEPING
from blueflow.lake.logrecord import Staged
from blueflow.lake.s3client import (
    ATTEMPT_S,
    CALL_S,
    CONNECT_TIMEOUT_S,
    NO_BUCKET,
    S3Client,
    S3Options,
)
from blueflow.lake.store import Object, PendingUpload, Store
from blueflow.masking import mask_credentials

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from blueflow.lake.store import Content
    from blueflow.metrics import LakeMetrics

__all__ = ["S3Options", "S3Store"]

SCHEME: Final = "s3://"
PART_BYTES: Final = 8 * 1024 * 1024
_PARTS_AT_ONCE: Final = 4
_KEYS_MAX: Final = 1000
_REMOVED_AT_ONCE: Final = 8
_ABORT_S: Final = 5.0
_READ_TIMEOUT_S: Final = 60.0
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_NO_UPLOAD: Final = frozenset({"NoSuchUpload", "404", "NotFound", "NoSuchKey"})
_CANNOT_COMPLETE: Final = _NO_UPLOAD | {"InvalidPart", "InvalidPartOrder"}
_TAKEN: Final = frozenset({"PreconditionFailed", "412"})
# Of a server that does not know the request, or not our checksum of it.
_NO_BATCH: Final = frozenset({
    "InvalidDigest",
    "InvalidRequest",
    "MethodNotAllowed",
    "MissingContentMD5",
    "NotImplemented",
})  # fmt: skip
_HAVE_BUCKET: Final = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})


class S3Store(Store):
    """Objects of a bucket, below a prefix; see `Store`.

    Args:
        url: `s3://BUCKET[/PREFIX]`.
        options: where the server is, and how to log in; by default what the environment says.
        metrics: counts what is tried again.
        attempt_s: how long one try of a call may take, for small requests.
        call_s: how long all tries of a call may take.

    Raises:
        LakeUrlError: there is no bucket in the URL.
    """

    def __init__(
        self,
        url: str,
        options: S3Options | None = None,
        metrics: LakeMetrics | None = None,
        *,
        attempt_s: float = ATTEMPT_S,
        call_s: float = CALL_S,
    ) -> None:
        self._bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(self._bucket):
            raise LakeUrlError(mask_credentials(url), "there is no name of a bucket in it")
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = options or S3Options.of_environment()
        self._url = f"{SCHEME}{self._bucket}" + (f"/{prefix}" if prefix else "")
        self._client = S3Client(
            self._url, self._options, metrics, attempt_s=attempt_s, call_s=call_s
        )

    @property
    def url(self) -> str:
        """The bucket and the prefix."""
        return self._url

    async def open(self, *, create: bool) -> None:
        """Connect; make the bucket when it is missing, and see whether it honours conditions."""
        await self._client.open()
        try:
            await self._find_bucket(create=create)
            if create:
                await self._probe()
        except BaseException:
            await self._client.close()
            raise

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()

    async def get(self, key: str) -> bytes | None:
        """Return an object."""
        answer = await self._client.call("get_object", codes=_MISSING, read=_read, **self._at(key))
        return None if isinstance(answer, str) else bytes(answer["Body"])

    async def put_new(self, key: str, data: bytes) -> bool:
        """Write an object by a conditional PUT."""
        answer = await self._client.call(
            "put_object",
            codes=_TAKEN,
            size=len(data),
            Body=data,
            IfNoneMatch="*",
            **self._at(key),
        )
        # It may be ours: a try whose answer was lost.
        return not isinstance(answer, str) or await self.get(key) == data

    async def head(self, key: str) -> Object | None:
        """Return what is known of an object."""
        answer = await self._client.call("head_object", codes=_MISSING, **self._at(key))
        if isinstance(answer, str):
            return None
        return Object(key, answer["ContentLength"], answer["LastModified"].timestamp())

    async def list(self, prefix: str, *, limit: int | None = None) -> Sequence[Object]:
        """Return objects by key."""
        found: list[Object] = []
        more: dict[str, Any] = {}
        while limit is None or len(found) < limit:
            most = _KEYS_MAX if limit is None else min(_KEYS_MAX, limit - len(found))
            answer = await self._listed(prefix, MaxKeys=most, **more)
            found += [
                Object(self._key(one["Key"]), one["Size"], one["LastModified"].timestamp())
                for one in answer.get("Contents", ())
            ]
            if not answer.get("IsTruncated"):
                break
            more = {"ContinuationToken": answer["NextContinuationToken"]}
        return sorted(found, key=lambda one: one.key)

    async def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of folders."""
        found: list[str] = []
        more: dict[str, Any] = {}
        while True:
            answer = await self._listed(prefix, Delimiter="/", **more)
            found += [
                self._key(one["Prefix"])[len(prefix) :].rstrip("/")
                for one in answer.get("CommonPrefixes", ())
            ]
            if not answer.get("IsTruncated"):
                return sorted(found)
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        for start in range(0, len(keys), _KEYS_MAX):
            names = [{"Key": self._prefix + key} for key in keys[start : start + _KEYS_MAX]]
            answer = await self._client.call(
                "delete_objects",
                codes=_NO_BATCH,
                Bucket=self._bucket,
                Delete={"Objects": names, "Quiet": True},
            )
            left = names if isinstance(answer, str) else answer.get("Errors", ())
            await self._delete_each([one["Key"] for one in left if one.get("Code") not in _MISSING])

    async def stage(self, key: str, content: Content) -> Staged:
        """Upload the parts of an object."""
        answer = await self._client.call("create_multipart_upload", **self._at(key))
        upload_id = str(_answer(answer)["UploadId"])
        try:
            parts, size, checksum = await self._upload(key, upload_id, content)
        except BaseException:
            with anyio.move_on_after(_ABORT_S, shield=True):
                with suppress(BlueflowError):  # the keeper finds what is left
                    await self.abort(PendingUpload(key, upload_id, 0))
            raise
        return Staged(key, upload_id, tuple(parts), size, checksum)

    async def complete(self, staged: Staged) -> None:
        """Make an object of the parts."""
        await self._client.call(
            "complete_multipart_upload",
            codes=_CANNOT_COMPLETE,
            UploadId=staged.upload_id,
            MultipartUpload={
                "Parts": [
                    {"PartNumber": number, "ETag": tag}
                    for number, tag in enumerate(staged.parts, start=1)
                ]
            },
            **self._at(staged.key),
        )
        # Done before, done now, or gone: of an upload that is gone some servers say that it was
        # completed, when an object of its key is there.
        there = await self.head(staged.key)
        if there is None or there.size != staged.size:
            raise UploadGoneError(self._url, staged.key)

    async def abort(self, upload: Staged | PendingUpload) -> None:
        """Forget an upload."""
        await self._client.call(
            "abort_multipart_upload",
            codes=_NO_UPLOAD,
            UploadId=upload.upload_id,
            **self._at(upload.key),
        )

    async def uploads(self, prefix: str) -> Sequence[PendingUpload]:
        """Return the uploads that are neither completed nor aborted."""
        found: list[PendingUpload] = []
        more: dict[str, Any] = {}
        while True:
            answer = _answer(
                await self._client.call(
                    "list_multipart_uploads",
                    Bucket=self._bucket,
                    Prefix=self._prefix + prefix,
                    **more,
                )
            )
            found += [
                PendingUpload(self._key(one["Key"]), one["UploadId"], one["Initiated"].timestamp())
                for one in answer.get("Uploads", ())
            ]
            if not answer.get("IsTruncated"):
                return found
            more = {
                "KeyMarker": answer["NextKeyMarker"],
                "UploadIdMarker": answer["NextUploadIdMarker"],
            }

    def filesystem(self) -> tuple[Any, str]:
        """Return Arrow's file system for S3 and the place in it."""
        from pyarrow.fs import S3FileSystem  # noqa: PLC0415 - only readers need it

        options: dict[str, Any] = {
            "region": self._options.region,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "request_timeout": _READ_TIMEOUT_S,
        }
        if (endpoint := self._options.endpoint_url) is not None:
            scheme, _, address = endpoint.partition("://")
            options |= {"endpoint_override": address.rstrip("/"), "scheme": scheme}
        if self._options.access_key is not None:
            options |= {
                "access_key": self._options.access_key,
                "secret_key": self._options.secret_key,
            }
        return S3FileSystem(**options), f"{self._bucket}/{self._prefix}".rstrip("/")

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _key(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    async def _listed(self, prefix: str, **more: Any) -> Mapping[str, Any]:
        answer = await self._client.call(
            "list_objects_v2", Bucket=self._bucket, Prefix=self._prefix + prefix, **more
        )
        return _answer(answer)

    async def _delete_each(self, names: Sequence[str]) -> None:
        """Remove what a batch left: each is tried again where that helps; its error says why."""
        room = anyio.Semaphore(_REMOVED_AT_ONCE)

        async def delete(name: str) -> None:
            async with room:
                call = self._client.call
                await call("delete_object", codes=_MISSING, Bucket=self._bucket, Key=name)

        async with _alone(), anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(delete, name)

    async def _find_bucket(self, *, create: bool) -> None:
        # Unlike HeadBucket this says in its body why it is refused.
        answer = await self._client.call(
            "list_objects_v2", codes=frozenset({NO_BUCKET}), Bucket=self._bucket, MaxKeys=1
        )
        if not isinstance(answer, str):
            return
        if not create:
            raise BucketError(self._url, "there is no such bucket")
        await self._create_bucket()

    async def _create_bucket(self) -> None:
        more: dict[str, Any] = {}
        if self._options.endpoint is None and self._options.region != "us-east-1":
            more = {"CreateBucketConfiguration": {"LocationConstraint": self._options.region}}
        answer = await self._client.call(
            "create_bucket",
            codes=_HAVE_BUCKET | {"AccessDenied", "403", "InvalidBucketName"},
            Bucket=self._bucket,
            **more,
        )
        if isinstance(answer, str) and answer not in _HAVE_BUCKET:
            raise BucketError(self._url, f"there is no such bucket, and making it gave {answer}")

    async def _probe(self) -> None:
        """Find out now whether a conditional PUT is one, and whether we may write and delete."""
        key = f"{BOOKKEEPING}/probe-{secrets.token_hex(8)}"
        try:
            await self.put_new(key, b"1")
            ignored = await self.put_new(key, b"2")
        except BaseException:
            with anyio.move_on_after(_ABORT_S, shield=True):
                with suppress(BlueflowError):  # an object of a byte; the error before it counts
                    await self.delete([key])
            raise
        await self.delete([key])
        if ignored:
            raise StoreUnfitError(self._url, "it ignores If-None-Match")

    async def _upload(
        self, key: str, upload_id: str, content: Content
    ) -> tuple[Sequence[str], int, str]:
        """Upload the parts, a few at once; return their tags, the size and the checksum."""
        tags: dict[int, str] = {}
        digest = hashlib.sha256()
        size = number = 0
        room = anyio.Semaphore(_PARTS_AT_ONCE)

        async def upload(number: int, part: bytes) -> None:
            try:
                answer = await self._client.call(
                    "upload_part",
                    codes=_NO_UPLOAD,
                    size=len(part),
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=part,
                    **self._at(key),
                )
            finally:
                room.release()
            if isinstance(answer, str):
                raise UploadGoneError(self._url, key)
            tags[number] = str(answer["ETag"])

        async with _alone(), anyio.create_task_group() as tasks:
            while True:
                part = await _part(content, size)
                if not part and number:
                    break
                number += 1
                size += len(part)
                digest.update(part)
                await room.acquire()
                tasks.start_soon(upload, number, part)
                if len(part) < PART_BYTES:
                    break
        return [tags[one] for one in sorted(tags)], size, digest.hexdigest()


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    """Raise the error of a task group's task without the group around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        failure = foremost(group)
    else:
        return
    raise failure  # outside of the handler, which would make the group its context


async def _part(content: Content, start: int) -> bytes:
    if isinstance(content, Path):

        def read() -> bytes:
            with content.open("rb") as file:
                file.seek(start)
                return file.read(PART_BYTES)

        try:
            return await anyio.to_thread.run_sync(read)
        except OSError as error:
            raise output_error(content, error) from error
    return content[start : start + PART_BYTES]


async def _read(body: Any) -> bytes:
    async with body as stream:
        data: bytes = await stream.read()
    return data


def _answer(answer: Mapping[str, Any] | str) -> Mapping[str, Any]:
    return {} if isinstance(answer, str) else answer
