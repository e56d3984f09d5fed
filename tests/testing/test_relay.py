from __future__ import annotations

from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from libipld import decode_dag_cbor_multi
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from blueflow.testing.frames import NetworkFrame, read_recording
from blueflow.testing.ledger import Ledger
from blueflow.testing.network import FIRST_SEQ, SimulatedNetwork
from blueflow.testing.relay import RelaySettings, SimulatedRelay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

FIRST = FIRST_SEQ
PATIENCE_S = 15


def network(seed: int = 1, **options: Any) -> SimulatedNetwork:
    """A network that is quick to build."""
    return SimulatedNetwork(seed, **({"records": 100, "accounts": 50} | options))


async def test_a_live_consumer_gets_every_event_as_the_network_made_it(listen: Any) -> None:
    ledger = Ledger()
    async with SimulatedRelay(network(), RelaySettings(limit=300), ledger=ledger) as relay:
        heard = await listen(relay, messages=300)
    frames = list(islice(network(), 300))
    assert heard.messages == [frame.data for frame in frames]
    assert len(ledger) == sum(len(frame.events) for frame in frames)
    assert relay.stats.sent_events == 300
    assert relay.stats.sent_bytes > sum(len(frame.data) for frame in frames)


@pytest.mark.parametrize(
    ("resume", "first"), [("exclusive", FIRST + 41), ("inclusive", FIRST + 40)]
)
async def test_a_cursor_resumes_behind_or_at_it(resume: Any, first: int, listen: Any) -> None:
    settings = RelaySettings(limit=60, resume=resume)
    async with SimulatedRelay(network(), settings) as relay:
        await listen(relay, messages=60)
        heard = await listen(relay, cursor=FIRST + 40, messages=5)
    assert heard.seqs == list(range(first, first + 5))


async def test_no_cursor_is_live(listen: Any) -> None:
    async with SimulatedRelay(network(), RelaySettings(speed=4)) as relay:
        await listen(relay, messages=20)
        issued = relay.log.end
        heard = await listen(relay, messages=5)
    assert FIRST + 20 <= FIRST + issued <= heard.seqs[0] < FIRST + relay.log.end


async def test_cursor_0_is_the_oldest_event_kept(listen: Any) -> None:
    settings = RelaySettings(limit=200, retention=50)
    async with SimulatedRelay(network(), settings) as relay:
        await listen(relay, messages=200)
        heard = await listen(relay, cursor=0, messages=50)
    assert heard.seqs == list(range(FIRST + 150, FIRST + 200))


async def test_an_outdated_cursor_begins_at_the_oldest_and_is_told_so_on_request(
    listen: Any,
) -> None:
    for outdated_info in (False, True):
        settings = RelaySettings(limit=200, retention=50, outdated_info=outdated_info)
        async with SimulatedRelay(network(), settings) as relay:
            await listen(relay, messages=200)
            heard = await listen(relay, cursor=FIRST + 7, messages=10)
        assert heard.seqs[0] == FIRST + 150
        names = [body.get("name") for header, body in heard.frames if header["t"] == "#info"]
        assert names == ["OutdatedCursor"] * outdated_info


async def test_a_future_cursor_is_live_or_an_error(listen: Any) -> None:
    async with SimulatedRelay(network(), RelaySettings(limit=90)) as relay:
        heard = await listen(relay, cursor=FIRST + 10**6, messages=1)
        assert heard.seqs == [FIRST]
    async with SimulatedRelay(network(), RelaySettings(limit=90, future="error")) as relay:
        heard = await listen(relay, cursor=FIRST + 10**6)
    assert [body["error"] for _, body in heard.frames] == ["FutureCursor"]
    assert heard.closed == (1008, "FutureCursor")


@pytest.mark.parametrize(
    ("target", "status"), [("?cursor=-1", 400), ("?cursor=x", 400), ("/else", 404)]
)
async def test_requests_that_make_no_sense_are_refused(target: str, status: int) -> None:
    async with SimulatedRelay(network(), RelaySettings(limit=1)) as relay:
        with pytest.raises(InvalidStatus) as refused:
            await connect(relay.stream_url + target)
    assert refused.value.response.status_code == status
    assert relay.stats.refused == 1


async def test_recorded_frames_come_first_and_byte_for_byte(
    data_folder: Path, recorded_frames: list[bytes], listen: Any
) -> None:
    recording = read_recording(data_folder / "firehose/frames.bin")
    ledger = Ledger()
    async with SimulatedRelay(recording, ledger=ledger) as relay:
        heard = await listen(relay, messages=100)
        assert heard.messages == recorded_frames
        assert len(ledger) == 102
        again = await listen(relay, cursor=heard.seqs[89], messages=10)  # it has ended, and serves
    assert again.seqs == heard.seqs[90:]


async def test_consumers_get_the_same_independently(listen: Any) -> None:
    settings = RelaySettings(limit=400, speed=200, rate=500)
    heard: dict[int, list[int]] = {}

    async def consume(number: int) -> None:
        heard[number] = (await listen(relay, cursor=0, messages=400)).seqs

    async with SimulatedRelay(network(), settings) as relay, anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(consume, number)
    assert set(map(tuple, heard.values())) == {tuple(range(FIRST, FIRST + 400))}
    assert relay.stats.connections == 5


async def test_a_restarted_relay_serves_the_same(listen: Any) -> None:
    settings = RelaySettings(limit=50)
    heard = []
    for _ in range(2):
        async with SimulatedRelay(network(), settings) as relay:
            heard.append((await listen(relay, messages=50)).messages)
    assert heard[0] == heard[1]


async def test_pings_are_answered_and_closing_is_a_handshake() -> None:
    async with SimulatedRelay(network(), RelaySettings(limit=5)) as relay:
        async with connect(relay.stream_url) as connection:
            with anyio.fail_after(PATIENCE_S):
                await (await connection.ping())
                await connection.close(1000)
        assert connection.close_code == 1000
        staying = await connect(relay.stream_url)
        await until(lambda: relay.consumers == 1)
    with anyio.fail_after(PATIENCE_S):
        await staying.wait_closed()
    assert staying.close_code == 1001  # the relay went away


async def test_a_consumer_that_does_not_read_is_kicked() -> None:
    # Buffers on the way take some thousand events, so what is counted is beyond them.
    settings = RelaySettings(cycle=100, speed=100, rate=1000, lag_max=500, close_timeout_s=0.5)
    heard: list[Any] = []
    async with SimulatedRelay(network(), settings) as relay:
        connection = await connect(relay.stream_url, max_size=None, max_queue=1)
        with anyio.fail_after(PATIENCE_S):
            await until(lambda: relay.stats.kicked)
            with pytest.raises(ConnectionClosed):  # noqa: PT012 - the end of a loop
                while True:
                    heard.append(await connection.recv())
    header, body = decode_dag_cbor_multi(heard[-1])
    assert (header, body["error"]) == ({"op": -1}, "ConsumerTooSlow")
    assert relay.stats.kicked == 1


async def test_flat_out_waits_for_the_slowest_and_kicks_nobody() -> None:
    events = 12_000  # more than the buffers of a connection take
    settings = RelaySettings(cycle=50, speed=inf, limit=events, lag_max=1_000)
    heard: dict[str, list[Any]] = {"slow": [], "fast": []}

    async def consume(name: str, connection: ClientConnection) -> None:
        while len(heard[name]) < events:
            heard[name].append(await connection.recv())

    async with SimulatedRelay(network(), settings) as relay, anyio.create_task_group() as tasks:
        url = relay.stream_url + "?cursor=0"
        slow = await connect(url, max_size=None, max_queue=1)
        fast = await connect(url, max_size=None)
        with anyio.fail_after(PATIENCE_S):
            with anyio.move_on_after(1) as patience:
                await consume("fast", fast)
            assert patience.cancelled_caught
            assert len(heard["fast"]) < events
            tasks.start_soon(consume, "slow", slow)
            await consume("fast", fast)
            await until(lambda: len(heard["slow"]) == events)
        assert relay.stats.kicked == 0
        await slow.close()
        await fast.close()
    assert seqs_of(heard["slow"]) == seqs_of(heard["fast"]) == list(range(FIRST, FIRST + events))


async def test_a_consumer_that_falls_out_of_the_retention_is_kicked() -> None:
    settings = RelaySettings(cycle=100, speed=100, rate=1000, retention=500, close_timeout_s=0.5)
    async with SimulatedRelay(network(), settings) as relay:
        connection = await connect(relay.stream_url, max_size=None, max_queue=1)
        await until(lambda: relay.log.start > 20_000)
        seqs = []
        with anyio.fail_after(PATIENCE_S), pytest.raises(ConnectionClosed):  # noqa: PT012 - a loop
            while True:
                seqs.append(last_part(await connection.recv()).get("seq"))
    assert relay.stats.kicked == 1
    assert seqs[:-1] == list(range(FIRST, FIRST + len(seqs) - 1))  # nothing silently left out
    assert seqs[-1] is None  # the error frame


async def test_cycled_frames_have_new_seqs_and_times_and_are_otherwise_the_same(
    listen: Any,
) -> None:
    ledger = Ledger()
    settings = RelaySettings(cycle=40, limit=130, rate=1000)
    async with SimulatedRelay(network(), settings, ledger=ledger) as relay:
        heard = await listen(relay, messages=130)
    bodies = heard.bodies
    assert heard.seqs == list(range(FIRST, FIRST + 130))
    pool = [decode_dag_cbor_multi(frame.data)[1] for frame in islice(network(), 40)]
    for index, body in enumerate(bodies):
        pooled = pool[index % 40]
        assert body | {"seq": 0, "time": ""} == pooled | {"seq": 0, "time": ""}
    assert len({body["time"] for body in bodies}) > 80
    assert {entry.seq: entry.time_us % 10**6 // 1000 for entry in ledger} == {
        body["seq"]: int(body["time"][20:23]) for body in bodies
    }


async def test_leaving_the_relay_does_not_wait_for_a_consumer_that_hangs() -> None:
    settings = RelaySettings(cycle=50, speed=inf, close_timeout_s=0.2)
    with anyio.fail_after(PATIENCE_S):
        async with SimulatedRelay(network(), settings, faults="half-open:600@5") as relay:
            connection = await connect(relay.stream_url, max_size=None, close_timeout=0.1)
            await until(lambda: not relay.faults.unfired)
    await connection.close()
    assert relay.consumers == 0


def last_part(message: Any) -> dict[str, Any]:
    body: dict[str, Any] = decode_dag_cbor_multi(message)[1]
    return body


def seqs_of(messages: list[Any]) -> list[int]:
    return [decode_dag_cbor_multi(message)[1]["seq"] for message in messages]


def test_a_relay_that_was_not_started_has_no_url() -> None:
    empty: list[NetworkFrame] = []
    with pytest.raises(RuntimeError, match="async with"):
        _ = SimulatedRelay(empty).url


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not condition():
            await anyio.sleep(0.01)
