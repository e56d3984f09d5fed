from __future__ import annotations

import socket
import struct
from hashlib import sha256
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from libipld import decode_car, decode_dag_cbor, decode_dag_cbor_multi
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from blueflow.testing.faultplan import FAULTS
from blueflow.testing.frames import read_network_frame
from blueflow.testing.ledger import Entry, Ledger
from blueflow.testing.network import FIRST_SEQ, SimulatedNetwork
from blueflow.testing.relay import RelaySettings, SimulatedRelay

if TYPE_CHECKING:
    from collections.abc import Callable

    from websockets.asyncio.client import ClientConnection

    from blueflow.testing.frames import NetworkFrame

FIRST = FIRST_SEQ
LIMIT = 40
AT = 20
PATIENCE_S = 15
SEQS = list(range(FIRST, FIRST + LIMIT))


def relay_with(faults: str, **settings: Any) -> SimulatedRelay:
    """A relay over a small network, with a ledger."""
    network = SimulatedNetwork(1, records=100, accounts=50)
    settings = {"limit": LIMIT, "close_timeout_s": 1.0} | settings
    return SimulatedRelay(network, RelaySettings(**settings), faults=faults, ledger=Ledger())


@pytest.fixture(scope="module")
def plain() -> list[NetworkFrame]:
    """What the relay issues without faults."""
    return list(islice(SimulatedNetwork(1, records=100, accounts=50), LIMIT))


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012, 1013])
async def test_close_codes(listen: Any, code: int) -> None:
    async with relay_with(f"close:{code}@{AT}") as relay:
        heard = await listen(relay)
        assert heard.seqs == SEQS[:AT]
        assert heard.closed[0] == code
        again = await listen(relay, cursor=heard.seqs[-1], messages=LIMIT - AT)  # once only
        assert again.seqs == SEQS[AT:]
    assert relay.faults.fired == {f"close:{code}@{AT}": 1}
    assert [fired.index for fired in ledger_of(relay).fired] == [AT]


async def test_a_fault_that_comes_twice(listen: Any) -> None:
    async with relay_with(f"close:1012@{AT}x2") as relay:
        first, second = await listen(relay), await listen(relay, cursor=SEQS[AT - 1])
        third = await listen(relay, cursor=SEQS[AT - 1], messages=LIMIT - AT)
    assert (len(first.seqs), len(second.seqs), len(third.seqs)) == (AT, 0, LIMIT - AT)
    assert relay.faults.fired == {f"close:1012@{AT}x2": 2}


async def test_a_stall_answers_pings_and_goes_on() -> None:
    async with relay_with(f"stall:0.3@{AT}") as relay, connect(relay.stream_url) as connection:
        with anyio.fail_after(PATIENCE_S):
            got = [await connection.recv() for _ in range(AT)]
            await until(lambda: not relay.faults.unfired)
            start = monotonic()
            await (await connection.ping())
            got += [await connection.recv() for _ in range(LIMIT - AT)]
        assert monotonic() - start > 0.1
    assert seqs_of(got) == SEQS


async def test_a_half_open_connection_answers_nothing_and_stays() -> None:
    async with relay_with(f"half-open@{AT}") as relay:
        connection = await connect(relay.stream_url, close_timeout=0.1, ping_interval=None)
        with anyio.fail_after(PATIENCE_S):
            for _ in range(AT):
                await connection.recv()
            pong = await connection.ping()
            with anyio.move_on_after(0.3) as patience:
                await pong
            assert patience.cancelled_caught
            assert relay.consumers == 1
            await connection.close()
        assert relay.faults.unfired == []


@pytest.mark.parametrize("name", ["ConsumerTooSlow", "FutureCursor", "NeverHeardOf"])
async def test_error_frames(listen: Any, name: str) -> None:
    async with relay_with(f"error:{name}@{AT}") as relay:
        heard = await listen(relay)
    assert [body["error"] for header, body in heard.frames if header["op"] == -1] == [name]
    assert (heard.seqs, heard.closed) == (SEQS[:AT], (1008, name))
    assert relay.stats.kicked == 0


async def test_a_kick(listen: Any) -> None:
    async with relay_with(f"slow@{AT}") as relay:
        heard = await listen(relay)
    assert heard.frames[-1][1]["error"] == "ConsumerTooSlow"
    assert (heard.seqs, relay.stats.kicked) == (SEQS[:AT], 1)


async def test_a_remark_and_an_unknown_op(listen: Any) -> None:
    async with relay_with(f"info:Weather@{AT},unknown-op:9@{AT}") as relay:
        heard = await listen(relay, messages=LIMIT + 2)
    assert heard.frames[AT][1]["name"] == "Weather"
    assert heard.frames[AT + 1][0] == {"op": 9}
    assert heard.seqs == SEQS


@pytest.mark.parametrize("kind", ["garbage", "truncated", "oversize", "text"])
async def test_a_message_that_is_no_frame_comes_once(
    listen: Any, kind: str, plain: list[NetworkFrame]
) -> None:
    async with relay_with(f"{kind}@{AT}") as relay:
        heard = await listen(relay, messages=LIMIT)
        again = await listen(relay, cursor=SEQS[AT - 1], messages=LIMIT - AT)
    assert_no_frame(kind, heard.messages[AT], plain[AT])
    assert heard.messages[:AT] + heard.messages[AT + 1 :] == [
        f.data for f in plain[:AT] + plain[AT + 1 :]
    ]
    assert again.messages == [frame.data for frame in plain[AT:]]
    assert {entry.delivery for entry in ledger_of(relay)} == {"required"}


@pytest.mark.parametrize("kind", ["garbage", "truncated", "oversize", "text"])
@pytest.mark.parametrize("cycle", [0, 7])
async def test_a_message_that_is_no_frame_stays(
    listen: Any, kind: str, cycle: int, plain: list[NetworkFrame]
) -> None:
    async with relay_with(f"{kind}-stays@{AT}", cycle=cycle) as relay:
        heard = await listen(relay, messages=LIMIT)
        again = await listen(relay, cursor=SEQS[AT - 1], messages=LIMIT - AT)
    if not cycle:
        assert_no_frame(kind, heard.messages[AT], plain[AT])
    assert again.messages == heard.messages[AT:]
    spoilt = [entry for entry in ledger_of(relay) if entry.delivery == "forbidden"]
    assert {entry.seq for entry in spoilt} == {SEQS[AT]}
    assert spoilt[0].spoilt == str(relay.faults.faults[0])
    assert list(relay.faults.fired.values()) == [2]


async def test_an_event_comes_twice(listen: Any) -> None:
    async with relay_with(f"duplicate@{AT}") as relay:
        heard = await listen(relay, messages=LIMIT + 1)
    assert heard.seqs == [*SEQS[: AT + 1], *SEQS[AT:]]


async def test_neighbours_are_swapped_once(listen: Any) -> None:
    async with relay_with(f"reorder@{AT}") as relay:
        heard = await listen(relay, messages=LIMIT)
        again = await listen(relay, cursor=SEQS[AT - 1], messages=LIMIT - AT)
    assert heard.seqs == [*SEQS[:AT], SEQS[AT + 1], SEQS[AT], *SEQS[AT + 2 :]]
    assert again.seqs == SEQS[AT:]


async def test_a_swap_waits_for_an_event_that_is_not_issued_yet(listen: Any) -> None:
    """One event is due every 20 ms, so the consumer is at the newest one when it is swapped."""
    at, limit = 3, 6
    async with relay_with(f"reorder@{at}", limit=limit, rate=50.0, speed=1) as relay:
        heard = await listen(relay, messages=limit)
    assert heard.seqs == [*SEQS[:at], SEQS[at + 1], SEQS[at], SEQS[at + 2]]
    assert not relay.faults.unfired


async def test_a_swap_that_its_consumer_did_not_wait_for_befalls_the_next_one(listen: Any) -> None:
    at = 3
    async with relay_with(f"reorder@{at}", limit=6, rate=10.0, speed=1) as relay:
        async with connect(relay.stream_url) as connection:
            for _ in range(at):
                await connection.recv()
            await until(lambda: relay.log.end == at + 1)  # it waits for the event behind that one
        assert relay.faults.unfired
        heard = await listen(relay, cursor=SEQS[at - 1], messages=3)
    assert heard.seqs == [SEQS[at + 1], SEQS[at], SEQS[at + 2]]
    assert not relay.faults.unfired


@pytest.mark.parametrize("limit", [LIMIT, None], ids=["limit", "network"])
@pytest.mark.parametrize(
    "how", [{"speed": 1, "rate": 2000.0}, {}, {"lag_max": 1}], ids=["at rate", "flat out", "singly"]
)
async def test_the_last_event_cannot_be_swapped_and_is_not_held_back(
    listen: Any, plain: list[NetworkFrame], how: dict[str, Any], limit: int | None
) -> None:
    settings = RelaySettings(limit=limit, **how)
    async with SimulatedRelay(iter(plain), settings, faults=f"reorder@{LIMIT - 1}") as relay:
        heard = await listen(relay, messages=LIMIT)
    assert heard.seqs == SEQS
    assert relay.faults.unfired == [f"reorder@{LIMIT - 1}"]


async def test_a_swap_needs_no_room_to_run_ahead(listen: Any) -> None:
    async with relay_with(f"reorder@{AT}", lag_max=1) as relay:
        heard = await listen(relay, messages=LIMIT)
    assert heard.seqs == [*SEQS[:AT], SEQS[AT + 1], SEQS[AT], *SEQS[AT + 2 :]]


async def test_a_consumer_that_resets_its_connection_is_no_failure_of_the_relay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with relay_with("oversize:6000000@1") as relay:
        connection = await connect(relay.stream_url, max_size=None, ping_interval=None)
        connection.transport.pause_reading()
        await until(lambda: not relay.faults.unfired)
        await anyio.sleep(0.1)  # the message does not fit: the relay waits for its buffer to drain
        reset(connection)
        await until(lambda: relay.consumers == 0)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("cycle", [0, 7])
async def test_seqs_are_skipped(listen: Any, cycle: int) -> None:
    async with relay_with(f"gap:5@{AT}", cycle=cycle) as relay:
        heard = await listen(relay, messages=LIMIT)
        in_gap = await listen(relay, cursor=SEQS[AT] + 2, messages=LIMIT - AT)
    later = [seq + 5 for seq in SEQS[AT:]]
    assert heard.seqs == SEQS[:AT] + later
    assert in_gap.seqs == later
    assert [entry.seq for entry in entries(relay, op=0)] == heard.seqs


@pytest.mark.parametrize(("cycle", "low"), [(0, 1), (7, 2**32)])
async def test_the_sequence_restarts_with_newer_times(listen: Any, cycle: int, low: int) -> None:
    async with relay_with(f"restart@{AT}", cycle=cycle) as relay:
        heard = await listen(relay, messages=LIMIT)
        oldest = await listen(relay, cursor=0, messages=LIMIT - AT)
        assert (await listen(relay, cursor=low + 4, messages=1)).seqs == [low + 5]
    assert heard.seqs == SEQS[:AT] + list(range(low, low + LIMIT - AT))
    assert oldest.seqs == heard.seqs[AT:]  # what was before is not the same sequence
    times = [body["time"] for body in heard.bodies]
    assert min(times[AT:]) > max(times[:AT])
    assert ledger_of(relay).compare(wire_of(heard)).ok


async def test_a_type_that_is_newer_than_its_reader(listen: Any) -> None:
    async with relay_with(f"unknown-type:#weather@{AT}") as relay:
        heard = await listen(relay, messages=LIMIT + 1)
    assert heard.seqs == [*SEQS, SEQS[-1] + 1]
    assert heard.frames[AT][0] == {"op": 1, "t": "#weather"}
    assert SEQS[AT] not in {entry.seq for entry in ledger_of(relay)}


async def test_a_bit_of_a_record_is_flipped(listen: Any, plain: list[NetworkFrame]) -> None:
    spoilt, body = await spoil(listen, f"corrupt-record@{AT}")
    _, blocks = decode_car(body["blocks"])  # only the hash tells
    assert wrong_hashes(body["blocks"]) == [op_of(body, spoilt)["cid"]]
    assert blocks[op_of(body, spoilt)["cid"]]["createdAt"].endswith("[")
    original = decode_dag_cbor_multi(plain[spoilt.index].data)[1]
    assert body | {"blocks": b""} == original | {"blocks": b""}


async def test_a_bit_of_a_tree_node_is_flipped(listen: Any, plain: list[NetworkFrame]) -> None:
    async with relay_with(f"corrupt-node@{AT}") as relay:
        heard = await listen(relay, messages=LIMIT)
    spoilt = [entry for entry in ledger_of(relay) if entry.spoilt]
    assert {entry.delivery for entry in spoilt} == {"allowed"}
    body = heard.bodies[spoilt[0].index]
    _, sound = decode_car(decode_dag_cbor_multi(plain[spoilt[0].index].data)[1]["blocks"])
    _, blocks = decode_car(body["blocks"])
    (wrong,) = wrong_hashes(body["blocks"])
    assert [cid for cid in sound if sound[cid] != blocks[cid]] == [wrong]
    assert all(blocks[op["cid"]] == sound[op["cid"]] for op in body["ops"] if op["cid"])


async def test_a_record_is_missing(listen: Any) -> None:
    spoilt, body = await spoil(listen, f"missing-record@{AT}")
    assert wrong_hashes(body["blocks"]) == []
    assert op_of(body, spoilt)["cid"] not in raw_blocks(body["blocks"])


async def test_a_record_is_a_nesting_bomb(listen: Any) -> None:
    spoilt, body = await spoil(listen, f"bomb@{AT}")
    assert wrong_hashes(body["blocks"]) == []
    blocks = raw_blocks(body["blocks"])
    assert body["commit"] in blocks
    with pytest.raises(RecursionError):
        decode_dag_cbor(blocks[op_of(body, spoilt)["cid"]])


async def test_refusals_before_the_handshake(listen: Any) -> None:
    async with relay_with("http:429/7@0,http:503@0x2,http:501@0") as relay:
        refusals = []
        for _ in range(4):
            with pytest.raises(InvalidStatus) as refused:
                await connect(relay.stream_url)
            response = refused.value.response
            refusals.append((response.status_code, response.headers.get("Retry-After")))
        heard = await listen(relay, messages=LIMIT)
    assert refusals == [(429, "7"), (503, None), (503, None), (501, None)]
    assert heard.seqs == SEQS
    assert relay.stats.refused == 4
    assert relay.faults.unfired == []


async def test_a_gap_of_a_relay_in_use_is_seen_by_everybody_and_a_close_by_one() -> None:
    heard: dict[int, list[bytes | str]] = {0: [], 1: []}

    async def consume(number: int) -> None:
        async with connect(relay.stream_url + "?cursor=0") as connection:
            try:
                while len(heard[number]) < LIMIT:
                    heard[number].append(await connection.recv())
            except ConnectionClosed:
                pass

    async with relay_with(f"gap@{AT},close:1012@{AT + 5}", speed=1, rate=1000) as relay:
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume, 0)
                tasks.start_soon(consume, 1)
    assert sorted(map(len, heard.values())) == [AT + 5, LIMIT]
    assert seqs_of(heard[0])[: AT + 5] == seqs_of(heard[1])[: AT + 5]


def test_every_kind_of_fault_is_tested_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    whole = {"garbage", "truncated", "oversize", "text"}
    tested = {kind for kind in FAULTS if f"{kind}@" in text or f"{kind}:" in text}
    assert set(FAULTS) - tested <= whole | {f"{kind}-stays" for kind in whole}


async def spoil(listen: Any, fault: str) -> tuple[Entry, dict[str, Any]]:
    """Let a fault spoil a record; return the operation that is lost and the body it came in."""
    async with relay_with(fault) as relay:
        heard = await listen(relay, messages=LIMIT)
        again = await listen(relay, cursor=FIRST, messages=LIMIT - 1)
    assert heard.messages[1:] == again.messages
    assert list(relay.faults.fired.values()) == [2]
    (spoilt,) = [entry for entry in ledger_of(relay) if entry.delivery == "forbidden"]
    assert AT <= spoilt.index < LIMIT
    return spoilt, heard.bodies[spoilt.index]


def wrong_hashes(car: bytes) -> list[bytes]:
    return [cid for cid, block in raw_blocks(car).items() if sha256(block).digest() != cid[4:]]


def raw_blocks(car: bytes) -> dict[bytes, bytes]:
    """Read the sections of a CAR by hand."""
    position, blocks = 1 + car[0], {}
    while position < len(car):
        size = shift = 0
        while True:
            byte = car[position]
            position += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        blocks[car[position : position + 36]] = car[position + 36 : position + size]
        position += size
    return blocks


def op_of(body: dict[str, Any], entry: Entry) -> dict[str, Any]:
    op: dict[str, Any] = body["ops"][entry.op_index]
    return op


def assert_no_frame(kind: str, message: Any, original: NetworkFrame) -> None:
    match kind:
        case "text":
            assert isinstance(message, str)
        case "oversize":
            assert len(message) > 5_000_000
        case "truncated":
            assert original.data.startswith(message)
            assert len(message) == len(original.data) // 2
        case _:
            with pytest.raises(ValueError, match=r"."):
                decode_dag_cbor_multi(message)


def ledger_of(relay: SimulatedRelay) -> Ledger:
    assert relay.ledger is not None
    return relay.ledger


def entries(relay: SimulatedRelay, op: int) -> list[Entry]:
    return [entry for entry in ledger_of(relay) if entry.op_index == op]


def seqs_of(messages: list[Any]) -> list[int]:
    return [decode_dag_cbor_multi(message)[1]["seq"] for message in messages]


def wire_of(heard: Any) -> list[dict[str, Any]]:
    """Wire JSON of what came, made without blueflow."""
    lines = []
    for message in heard.messages:
        frame = read_network_frame(message)
        for index, event in enumerate(frame.events):
            body = {name: getattr(event, name) for name in ("rev", "operation", "collection")}
            body |= {"rkey": event.rkey, "cid": event.cid}
            lines.append(
                {"kind": event.kind, "did": event.did, "seq": frame.seq, "op_index": index}
                | {event.kind: body}
            )
    return lines


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not condition():
            await anyio.sleep(0.01)


def reset(connection: ClientConnection) -> None:
    """End the TCP connection with RST: the other side's next read or write fails."""
    tcp = connection.transport.get_extra_info("socket")
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.transport.abort()
