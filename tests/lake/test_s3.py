"""A lake's store on S3, with a proxy before a real server that loses, refuses and holds."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tests.s3 import new_bucket, options_of

from blueflow.errors import (
    BucketError,
    Exit,
    LakeUrlError,
    OutputIOError,
    StoreLoginError,
    StoreUnavailableError,
    StoreUnfitError,
    UploadGoneError,
)
from blueflow.lake.s3 import S3Options, S3Store
from blueflow.metrics import Metrics
from blueflow.testing.s3proxy import Operation, S3Proxy
from blueflow.testing.services.child import free_ports
from blueflow.testing.services.s3 import SeaweedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from blueflow.metrics import LakeMetrics

PATIENCE_S = 60
PART_BYTES = 8 * 1024 * 1024
SHORT: dict[str, Any] = {"attempt_s": 0.3, "call_s": 1.0}
KEY = "fresh/posts/year=2026/month=07/day=04/hour=16/a.parquet"
CALLS = [
    Operation.PUT_NEW,
    Operation.GET_OBJECT,
    Operation.HEAD_OBJECT,
    Operation.LIST_OBJECTS,
    Operation.CREATE_UPLOAD,
    Operation.UPLOAD_PART,
    Operation.COMPLETE_UPLOAD,
    Operation.ABORT_UPLOAD,
    Operation.LIST_UPLOADS,
    Operation.DELETE_OBJECTS,
]


@asynccontextmanager
async def proxied(
    server: SeaweedServer, metrics: LakeMetrics | None = None, **bounds: float
) -> AsyncIterator[tuple[S3Proxy, S3Store]]:
    """Yield a proxy without faults and an open store behind it, in a bucket of its own."""
    async with S3Proxy(f"127.0.0.1:{server.port}") as proxy:
        options = options_of(server, proxy.endpoint)
        store = S3Store(f"s3://{new_bucket()}/lake", options, metrics, **bounds)
        await store.open(create=True)
        try:
            yield proxy, store
        finally:
            await store.close()


async def live(store: S3Store) -> None:
    """Do everything once that a store can do, and check it."""
    data = Random(1).randbytes(PART_BYTES + 1)
    assert await store.put_new("_blueflow/logs/a", b"record")
    assert not await store.put_new("_blueflow/logs/a", b"another")
    staged = await store.stage(KEY, data)
    assert [one.key for one in await store.uploads("fresh/")] == [KEY]
    await store.complete(staged)
    await store.abort(await store.stage("fresh/b", b"given up"))
    assert await store.uploads("fresh/") == []
    found = await store.head(KEY)
    assert found is not None
    assert [found] == await store.list("fresh/")
    assert found.size == len(data)
    assert await store.get(KEY) == data
    assert await store.folders("fresh/posts/") == ["year=2026"]
    await store.delete([KEY, "never"])
    assert await store.get(KEY) is None


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError")])
async def test_what_a_busy_server_refuses_is_tried_again_and_counted(
    seaweed: SeaweedServer, operation: Operation, status: int, code: str
) -> None:
    metrics = Metrics().lake
    async with proxied(seaweed, metrics) as (proxy, store):
        proxy.refuse(operation, status, code, times=2)
        await live(store)
        assert proxy.fired == {"refuse": 2}
        assert metrics.store_retries.total == 2


@pytest.mark.parametrize("operation", CALLS)
async def test_whatever_answer_is_lost_the_store_does_what_it_should(
    seaweed: SeaweedServer, operation: Operation
) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.lose_reply(operation)
        if operation is Operation.CREATE_UPLOAD:  # the first one is found by the keeper
            await store.complete(await store.stage(KEY, b"rows"))
            (left,) = await store.uploads(KEY)
            await store.abort(left)
            await store.delete([KEY])
        await live(store)
        assert proxy.fired == {"lose_reply": 1}


@pytest.mark.parametrize("operation", CALLS)
async def test_whatever_connection_breaks_the_store_does_what_it_should(
    seaweed: SeaweedServer, operation: Operation
) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.lose_request(operation)
        await live(store)
        assert proxy.fired == {"lose_request": 1}


async def test_a_record_whose_answer_was_lost_is_ours_and_anothers_is_not(
    seaweed: SeaweedServer,
) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.lose_reply(Operation.PUT_NEW, times=2)
        assert await store.put_new("_blueflow/logs/1", b"ours")
        assert proxy.fired == {"lose_reply": 2}
        await store.put_new("_blueflow/logs/2", b"another's")
        proxy.lose_reply(Operation.PUT_NEW)
        assert not await store.put_new("_blueflow/logs/2", b"ours")
        assert await store.get("_blueflow/logs/2") == b"another's"
        assert proxy.fired == {"lose_reply": 3}


async def test_a_record_that_arrives_after_it_was_given_up_is_ours(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed, attempt_s=0.5, call_s=PATIENCE_S) as (proxy, store):
        proxy.delay(Operation.PUT_NEW, 1.0, of="request")
        assert await store.put_new("_blueflow/logs/1", b"ours")
        assert proxy.fired == {"delay": 1}


async def test_a_conflict_of_conditions_is_tried_again(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.refuse(Operation.PUT_NEW, 409, "ConditionalRequestConflict", times=3)
        assert await store.put_new("_blueflow/logs/1", b"ours")
        assert proxy.fired == {"refuse": 3}


async def test_a_completion_that_fails_with_status_200_is_tried_again(
    seaweed: SeaweedServer,
) -> None:
    async with proxied(seaweed) as (proxy, store):
        staged = await store.stage(KEY, b"rows")
        proxy.refuse(Operation.COMPLETE_UPLOAD, 200, "InternalError")
        await store.complete(staged)
        assert await store.get(KEY) == b"rows"
        assert proxy.fired == {"refuse": 1}


@pytest.mark.parametrize("then", ["close", "hang"])
async def test_a_completion_whose_answer_was_lost_is_done(
    seaweed: SeaweedServer, then: Any
) -> None:
    async with proxied(seaweed, attempt_s=0.5, call_s=PATIENCE_S) as (proxy, store):
        staged = await store.stage(KEY, b"rows")
        proxy.lose_reply(Operation.COMPLETE_UPLOAD, then=then)
        await store.complete(staged)
        assert await store.get(KEY) == b"rows"
        assert proxy.fired == {"lose_reply": 1}


@pytest.mark.parametrize(
    "operation", [Operation.GET_OBJECT, Operation.LIST_OBJECTS, Operation.CREATE_UPLOAD]
)
async def test_a_half_of_an_answer_is_no_answer(
    seaweed: SeaweedServer, operation: Operation
) -> None:
    async with proxied(seaweed) as (proxy, store):
        await store.put_new("raw/a", b"content" * 10_000)
        proxy.lose_reply(operation, then="half")
        assert await store.get("raw/a") == b"content" * 10_000
        assert [one.key for one in await store.list("raw/")] == ["raw/a"]
        await store.stage(KEY, b"rows")
        assert proxy.fired == {"lose_reply": 1}


async def test_a_silent_server_is_not_waited_for_without_end(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed, **SHORT) as (proxy, store):
        staged = await store.stage(KEY, b"rows")
        proxy.block()
        calls = [
            store.put_new("_blueflow/logs/1", b"ours"),
            store.get("_blueflow/logs/1"),
            store.list(""),
            store.stage("fresh/b", b"rows"),
            store.complete(staged),
            store.delete(["a"]),
        ]
        with anyio.fail_after(PATIENCE_S):
            errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} == {StoreUnavailableError}
        assert all("it did not answer" in str(error) for error in errors)
        assert proxy.fired["block"] > len(calls)
        proxy.unblock()
        await store.complete(staged)  # what was held arrives, too
        assert await store.get(KEY) == b"rows"


async def test_a_server_that_stays_busy_is_given_up_with_its_own_words(
    seaweed: SeaweedServer,
) -> None:
    async with proxied(seaweed, **SHORT) as (proxy, store):
        proxy.refuse(Operation.GET_OBJECT, times=1000)
        with pytest.raises(StoreUnavailableError, match=r"BF-240: s3://.*SlowDown") as caught:
            await store.get("a")
        assert caught.value.retryable
        assert caught.value.exit_code == Exit.UNAVAILABLE
        assert proxy.fired["refuse"] > 1


async def test_the_words_of_a_server_count_more_than_its_silence(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed, **SHORT) as (proxy, store):
        proxy.refuse(Operation.GET_OBJECT)
        proxy.lose_request(Operation.GET_OBJECT, times=100, then="hang")
        with pytest.raises(StoreUnavailableError, match="SlowDown"):
            await store.get("a")
        assert proxy.fired["refuse"] == 1
        assert proxy.fired["lose_request"] >= 1


async def test_nobody_listens(seaweed: SeaweedServer) -> None:
    (port,) = free_ports(1)
    options = S3Options(f"127.0.0.1:{port}", "key", "a-secret")
    store = S3Store("s3://lake", options, **SHORT)
    with anyio.fail_after(PATIENCE_S), pytest.raises(StoreUnavailableError) as caught:
        await store.open(create=True)
    assert str(port) in str(caught.value)
    assert "a-secret" not in str(caught.value) + repr(caught.value) + repr(options)
    await store.close()


@pytest.mark.parametrize(
    ("access_key", "secret_key", "said"),
    [
        (None, "a-wrong-secret", "SignatureDoesNotMatch"),
        ("unknown", "a-wrong-secret", "InvalidAccessKeyId"),
    ],
)
async def test_wrong_credentials_are_told_without_the_secret(
    seaweed: SeaweedServer, access_key: str | None, secret_key: str, said: str
) -> None:
    options = S3Options(seaweed.endpoint, access_key or seaweed.access_key, secret_key)
    store = S3Store(f"s3://{new_bucket()}", options)
    with pytest.raises(StoreLoginError, match=said) as caught:
        await store.open(create=True)
    assert secret_key not in str(caught.value) + repr(caught.value) + repr(options)


async def test_no_credentials_at_all(
    seaweed: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "BOTO_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = S3Store(f"s3://{new_bucket()}", S3Options(seaweed.endpoint))
    with pytest.raises(StoreLoginError, match="Unable to locate credentials"):
        await store.open(create=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    await store.open(create=True)  # the standard chain
    await store.close()


async def test_a_missing_bucket_is_made_by_writers_only(seaweed: SeaweedServer) -> None:
    store = S3Store(f"s3://{new_bucket()}", options_of(seaweed))
    with pytest.raises(BucketError, match="there is no such bucket"):
        await store.open(create=False)
    await store.open(create=True)
    await store.close()
    await store.open(create=False)
    assert await store.list("") == []  # nothing is left of the probe
    await store.close()


async def test_a_bucket_that_may_not_be_made_or_that_vanishes(seaweed: SeaweedServer) -> None:
    async with S3Proxy(f"127.0.0.1:{seaweed.port}") as proxy:
        proxy.refuse(Operation.CREATE_BUCKET, 403, "AccessDenied")
        store = S3Store(f"s3://{new_bucket()}", options_of(seaweed, proxy.endpoint))
        with pytest.raises(BucketError, match="AccessDenied"):
            await store.open(create=True)
        await store.open(create=True)
        proxy.refuse(Operation.PUT_NEW, 404, "NoSuchBucket")
        with pytest.raises(BucketError, match="no such bucket"):
            await store.put_new("a", b"")
        await store.close()
        assert proxy.fired == {"refuse": 2}


async def test_a_server_that_ignores_conditions_keeps_no_lake(seaweed: SeaweedServer) -> None:
    async with S3Proxy(f"127.0.0.1:{seaweed.port}") as proxy:
        proxy.refuse(Operation.PUT_NEW, 200, "", times=2)
        store = S3Store(f"s3://{new_bucket()}", options_of(seaweed, proxy.endpoint))
        with pytest.raises(StoreUnfitError, match="If-None-Match"):
            await store.open(create=True)
        await store.open(create=False)  # a reader needs no conditions
        assert await store.list("") == []
        await store.close()
        assert proxy.fired == {"refuse": 2}


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "MissingContentMD5")])
async def test_a_server_without_batches_removes_singly(
    seaweed: SeaweedServer, status: int, code: str
) -> None:
    async with proxied(seaweed) as (proxy, store):
        keys = [f"fresh/{number}" for number in range(20)]
        for key in keys:
            await store.put_new(key, b"")
        proxy.refuse(Operation.DELETE_OBJECTS, status, code)
        proxy.refuse(Operation.DELETE_OBJECT, times=2)
        await store.delete([*keys, "never"])
        assert await store.list("fresh/") == []
        assert proxy.fired == {"refuse": 3}


async def test_a_right_that_is_missing_is_told(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.refuse(Operation.DELETE_OBJECTS, 403, "AccessDenied")
        with pytest.raises(StoreLoginError, match="AccessDenied"):
            await store.delete(["a"])
        assert proxy.fired == {"refuse": 1}


@pytest.mark.parametrize("operation", [Operation.PUT_NEW, Operation.DELETE_OBJECTS])
async def test_a_writer_without_a_right_is_told_at_its_start(
    seaweed: SeaweedServer, operation: Operation
) -> None:
    async with S3Proxy(f"127.0.0.1:{seaweed.port}") as proxy:
        proxy.refuse(operation, 403, "AccessDenied")
        store = S3Store(f"s3://{new_bucket()}", options_of(seaweed, proxy.endpoint))
        with pytest.raises(StoreLoginError, match="AccessDenied"):
            await store.open(create=True)
        assert proxy.fired == {"refuse": 1}


async def test_an_upload_that_expires_while_it_is_made_is_told(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.refuse(Operation.UPLOAD_PART, 404, "NoSuchUpload", skip=1)
        with pytest.raises(UploadGoneError):
            await store.stage(KEY, Random(1).randbytes(3 * PART_BYTES))
        assert proxy.fired == {"refuse": 1}
        assert await store.uploads("") == []


async def test_an_upload_that_fails_leaves_nothing_behind(
    seaweed: SeaweedServer, tmp_path: Path
) -> None:
    async with proxied(seaweed) as (proxy, store):
        proxy.refuse(Operation.UPLOAD_PART, 400, "EntityTooLarge", skip=1)
        with pytest.raises(StoreUnavailableError, match="EntityTooLarge"):
            await store.stage(KEY, Random(1).randbytes(3 * PART_BYTES))
        with pytest.raises(OutputIOError, match="No such file"):
            await store.stage(KEY, tmp_path / "missing")
        assert proxy.fired == {"refuse": 1}
        assert await store.uploads("") == []
        assert await store.list("") == []


async def test_connections_that_are_cut_between_calls_do_not_matter(seaweed: SeaweedServer) -> None:
    async with proxied(seaweed) as (proxy, store):
        await store.put_new("a", b"1")
        proxy.cut()
        assert await store.get("a") == b"1"
        assert proxy.fired["cut"]


async def test_a_server_that_is_killed_and_comes_back_has_what_it_acknowledged() -> None:
    async with SeaweedServer() as server:
        store = S3Store("s3://data-lake", options_of(server))
        await store.open(create=True)
        assert await store.put_new("_blueflow/logs/1", b"before")
        staged = await store.stage(KEY, b"rows")
        await server.kill()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.complete, staged)  # waits for it
            await server.start()
        assert await store.get(KEY) == b"rows"
        assert not await store.put_new("_blueflow/logs/1", b"after")
        server.suspend()
        try:
            short = S3Store("s3://data-lake", options_of(server), **SHORT)
            with anyio.fail_after(PATIENCE_S), pytest.raises(StoreUnavailableError):
                await short.open(create=False)
        finally:
            server.resume()
        assert await store.get("_blueflow/logs/1") == b"before"
        await store.close()


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///lake", "s3://user:pass@host/lake", "s3://a b/lake", "s3://b?ucket"]
)
def test_an_address_without_a_bucket(url: str) -> None:
    with pytest.raises(LakeUrlError) as caught:
        S3Store(url, S3Options())
    assert "pass@" not in str(caught.value)


def test_the_secret_is_not_shown_and_an_endpoint_needs_no_scheme() -> None:
    assert "secret" not in repr(S3Options("host:9000", "key", "secret")).replace("secret_key", "")
    assert S3Options("host:9000").endpoint_url == "http://host:9000"
    assert S3Options("https://host").endpoint_url == "https://host"
    assert S3Options().endpoint_url is None
