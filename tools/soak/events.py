"""The server ends while clients are at work: killed and started again, or told to end."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass, field

from .answers import Answers
from .load import compare, saturate
from .server import Server
from .wire import Connection, post, say, texts_body

BATCH = 8  # texts of a request to a server that is told to end
ENDED = (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was told with


@dataclass
class Event:
    """What happened: numbers for the report, and what was not as it has to be."""

    numbers: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


async def kill_and_restart(server: Server, answers: Answers, dtype: str, clients: int, seconds: float) -> Event:
    """SIGKILL under load, then the same server again, with clients that never stop asking.

    Until the kill and from when it is ready again, there is no error; between, there are errors of the connection alone;
    every answer is right.
    """
    event, moments = Event(), {}

    async def fault() -> None:
        await asyncio.sleep(seconds)
        moments["killed"] = time.monotonic()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.wait_until_ready)
        moments["ready"] = time.monotonic()

    async def load() -> list:
        """In turns, since nobody knows how long the start takes; the last one is with the new server alone."""
        tallies, last = [], False
        while not last:
            last = "ready" in moments
            tallies.append(await saturate(server, answers, dtype, seconds, clients, seed=100 + len(tallies)))
        return tallies

    _, tallies = await asyncio.gather(fault(), load())
    killed, ready = moments["killed"], moments["ready"]
    failures = [failure for tally in tallies for failure in tally.failures]
    right = [came for tally in tallies for came in tally.right]
    event.numbers = {
        "right before": sum(came < killed for came in right),
        "broken connections": len(failures),
        "seconds until ready": round(ready - killed, 1),
        "right after": sum(came > ready for came in right),
    }
    event.problems += [wrong for tally in tallies for wrong in tally.wrong]
    event.problems += [
        f"{f.kind}, which is no error of the connection" for f in failures if f.kind.startswith("status")
    ]
    event.problems += [f"{f.kind} before the kill" for f in failures if f.failed < killed]
    event.problems += [f"{f.kind} when it was ready again" for f in failures if f.sent > ready]
    event.problems += [f"{what}: none" for what, number in event.numbers.items() if not number]
    return event


async def drain(server: Server, answers: Answers, dtype: str, clients: int, seconds: float = 60) -> Event:
    """SIGTERM when so many requests are in work: each gets its right answer, and the process ends."""
    event, came = Event(), []
    connections = [await Connection.to(server.port) for _ in range(clients)]
    wanted = [[(BATCH * client + i) % len(answers.texts) for i in range(BATCH)] for client in range(clients)]

    async def answered(connection: Connection, of: list[int]) -> str:
        try:
            answer = await connection.answer()
        except (OSError, TimeoutError) as error:
            return f"lost: {type(error).__name__}: {error}"
        finally:
            connection.leave()
        came.append(time.monotonic())
        return compare(answer.body, answers, of, dtype) if answer.status == 200 else f"status {answer.status}"

    for connection, of in zip(connections, wanted, strict=True):
        await connection.send(post(texts_body([answers.texts[i] for i in of])))
    waiting = asyncio.gather(*map(answered, connections, wanted))
    # The server reads its sockets in turn: when it has answered this, it has seen the requests.
    await say(server.port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    server.terminate()
    told = time.monotonic()
    event.problems += [problem for problem in await waiting if problem]
    after = sum(when > told for when in came)
    if not after:
        event.problems.append("no answer came after the signal: this has shown nothing")
    event.numbers = {"requests in work": clients, "answered": len(came), "of these after the signal": after}
    try:
        status = await asyncio.to_thread(server.running.wait, seconds)
        if status not in ENDED:
            event.problems.append(f"ended with status {status}")
    except Exception as error:
        event.problems.append(f"does not end: {error}")
    event.numbers["seconds"] = round(time.monotonic() - told, 1)
    if await asyncio.to_thread(server.is_healthy):
        event.problems.append("it answers after its end")
    return event
