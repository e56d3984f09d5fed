"""`python dying_neighbour.py SERVERS TIMEOUT_MS TOPIC…`: dies inside a transaction, by kill -9.

Each topic gets one record in partition 0; in the topic of the cursors it is a cursor of pipeline
`neighbour`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from aiokafka import AIOKafkaProducer

VALUE = b'{"source":"sim","seq":1,"time_us":1,"instance":"neighbour.1","simulated":true}'


async def main(servers: str, timeout_ms: str, *topics: str) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=servers,
        transactional_id="neighbour",
        transaction_timeout_ms=int(timeout_ms),
    )
    await producer.start()
    await producer.begin_transaction()
    for topic in topics:
        await producer.send_and_wait(topic, VALUE, b"neighbour|sim", partition=0)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
