"""Put a server under what the world does to one, and measure what it does then.

    python bench/serve_http.py model.q35c                      # all of it, a few minutes
    python bench/serve_http.py model.q35c overload stop        # some of it
    python bench/serve_http.py model.q35c load --clients 1 4 8

load      clients that stream one answer after the other: tokens a second, waiting times
overload  a thousand requests at once: how many are answered, how soon the others are turned away
cancel    a thousand clients that go away at any moment: what of memory, files, threads and rows is left behind
idle      connections that say half a head: how long they stay open
stop      SIGTERM during streams, again and again: do all end whole
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT_PATH = "/v1/chat/completions"
ANSWERS = 3  # of each client of `load`


@dataclass
class Answer:
    """What came of a request: its status, and when each piece of its stream came."""

    status: int = 0
    begun: float = 0.0
    headed: float = 0.0
    times: list[float] = field(default_factory=list)
    new_tokens: int = 0
    reason: str | None = None
    is_whole: bool = False


class Server:
    """`q35c serve` as a process of its own."""

    def __init__(self, artifact: Path, *options: str) -> None:
        command = [sys.executable, "-m", "q35c", "serve", str(artifact), "--port", "0"]
        command += ["--served-model-name", "m", "--log-level", "error", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def holds(self) -> dict[str, int]:
        """Return the process's memory in KiB, its open files and threads."""
        place = Path("/proc", str(self.process.pid))
        lines = (place / "status").read_text().splitlines()
        status = {name: value.split()[0] for name, _, value in (x.partition(":") for x in lines) if value.strip()}  # fmt: skip
        files = len(os.listdir(place / "fd"))
        return {"KiB": int(status["VmRSS"]), "files": files, "threads": int(status["Threads"])}


@contextmanager
def serving(artifact: Path, *options: str) -> Iterator[Server]:
    server = Server(artifact, *options)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def request(body: Any = None, path: str = CHAT_PATH) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\n"
    head += (
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    return head.encode() + b"\r\n" + data


def chat(number: int, tokens: int) -> dict[str, Any]:
    text = f"Tell me story number {number}, and do not stop before its end."
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": number,
    }


async def ask(
    port: int, body: Any, leave_after: float | None = None, path: str = CHAT_PATH
) -> Answer:
    """Send a request and read its stream, or go away after some seconds."""
    made = Answer(begun=time.perf_counter())
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(leave_after), connection(port) as (reader, writer):
            writer.write(request(body, path))
            made.status = int((await reader.readline()).split()[1])
            made.headed = time.perf_counter()
            async for line in reader:
                _note(made, line)
    return made


def _note(made: Answer, line: bytes) -> None:
    if line.startswith(b"data: [DONE]"):
        made.is_whole = True
    elif line.startswith(b"data: {"):
        event = json.loads(line[6:])
        made.new_tokens = (event.get("usage") or {}).get("completion_tokens", made.new_tokens)
        for choice in event.get("choices", ()):
            made.reason = choice["finish_reason"] or made.reason
            if choice.get("text") or choice.get("delta", {}).get("content"):
                made.times.append(time.perf_counter())


async def numbers(port: int) -> dict[str, float]:
    """Return the server's metrics."""
    async with connection(port) as (reader, writer):
        writer.write(request(None, "/metrics"))
        text = (await reader.read()).decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("q35c_"))
    return {name: float(value) for name, _, value in lines}


async def settled(port: int) -> None:
    """Wait until no row runs or waits."""
    async with asyncio.timeout(60):
        while True:
            now = await numbers(port)
            if not now["q35c_running"] and not now["q35c_waiting"]:
                return
            await asyncio.sleep(0.01)


def quantile(values: list[float], share: float) -> float:
    """Return a quantile in milliseconds."""
    ordered = sorted(values) or [0.0]
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rate_of(answers: list[Answer], seconds: float) -> float:
    """Return the tokens a second of all answers together."""
    return sum(made.new_tokens for made in answers) / seconds


async def load(server: Server, options: argparse.Namespace) -> str:
    lines: list[str] = []
    for clients in options.clients:

        async def client(first: int) -> list[Answer]:
            return [await ask(server.port, chat(first + i, options.tokens)) for i in range(ANSWERS)]

        begun = time.perf_counter()
        done = await asyncio.gather(*(client(i * ANSWERS) for i in range(clients)))
        seconds = time.perf_counter() - begun
        answers = list(itertools.chain(*done))
        gaps = [b - a for made in answers for a, b in itertools.pairwise(made.times)]
        firsts = [made.times[0] - made.begun for made in answers if made.times]
        rate = rate_of(answers, seconds)
        lines.append(
            f"{clients} clients: {rate:.1f} tok/s in all; first token {quantile(firsts, 0.5):.0f} ms, "
            f"then every {1000 * statistics.median(gaps or [0.0]):.1f} ms, p99 {quantile(gaps, 0.99):.1f} ms"
        )
    return "\n          ".join(lines)


async def overload(server: Server, options: argparse.Namespace) -> str:
    before = server.holds()
    asked = (ask(server.port, chat(i, 16)) for i in range(options.count))
    answers = await asyncio.gather(*asked)
    after = server.holds()
    statuses = Counter(made.status for made in answers)
    whole = sum(made.is_whole for made in answers)
    refused = [made.headed - made.begun for made in answers if made.status == 429]
    return (
        f"{dict(statuses)}, {whole} streams whole; turned away after {quantile(refused, 0.5):.0f} ms (median), "
        f"p99 {quantile(refused, 0.99):.0f} ms; {before['KiB']} KiB before, {after['KiB']} after"
    )


async def cancel(server: Server, options: argparse.Namespace) -> str:
    dice = random.Random(1)

    async def storm(count: int) -> None:
        for first in range(0, count, 20):
            leaving = (
                ask(server.port, chat(first + i, 500), dice.uniform(0, 0.2)) for i in range(20)
            )
            await asyncio.gather(*leaving)
        await settled(server.port)

    await storm(100)
    before = server.holds()
    await storm(options.count)
    after = server.holds()
    return f"before {before}, after {options.count} more {after}"


async def idle(server: Server, options: argparse.Namespace) -> str:
    async def half(_: int) -> float:
        begun = time.perf_counter()
        async with connection(server.port) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: lo")
            with contextlib.suppress(ConnectionError):
                await reader.read()
        return time.perf_counter() - begun

    waiting = asyncio.gather(*(half(i) for i in range(512)))
    await asyncio.sleep(1)
    begun = time.perf_counter()
    await numbers(server.port)
    other = time.perf_counter() - begun
    times = await waiting
    return f"512 closed after {min(times):.1f} to {max(times):.1f} s; another request took {1000 * other:.0f} ms"


async def stop(server: Server, options: argparse.Namespace) -> str:
    ends: Counter[str] = Counter()
    for number in range(options.runs):
        with serving(options.artifact) as other:
            asked = [asyncio.ensure_future(ask(other.port, chat(i, 300))) for i in range(14)]
            while (await numbers(other.port))["q35c_running"] == 0:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.02 * number)
            other.process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*asked)
            ends[f"exit {await asyncio.to_thread(other.process.wait, 60)}"] += 1
        for made in answers:
            is_cut = made.status == 200 and not made.is_whole
            ends["cut" if is_cut else f"{made.status} {made.reason or ''}".strip()] += 1
    return f"{options.runs} runs of 14 streams: {dict(ends)}"


SCENES = {scene.__name__: scene for scene in (load, overload, cancel, idle, stop)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("artifact", type=Path)
    parser.add_argument("scenes", nargs="*", metavar="scene", help=", ".join(SCENES))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer of load")
    parser.add_argument("--count", type=int, default=1000, help="of overload and cancel")
    parser.add_argument("--runs", type=int, default=20, help="of stop")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    options = parser.parse_args()
    unknown = set(options.scenes) - SCENES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with serving(options.artifact, "--threads", str(options.threads)) as server:
        for name in options.scenes or SCENES:
            print(f"{name:9} {asyncio.run(SCENES[name](server, options))}", flush=True)


if __name__ == "__main__":
    main()
