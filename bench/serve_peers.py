"""Put `q35c serve` and llama-server under the same load, in turns, on the same shape.

    python bench/serve_peers.py                        # 0.8B, w4 beside Q4_K_M; builds and writes what is missing
    python bench/serve_peers.py streams --rounds 3     # one scene, more often

streams   clients that stream one answer after the other: tokens a second in all, at 1 to 16 clients
turn      the first token of a long prompt, and of the same prompt with 200 tokens more
gaps      the time between the pieces of a stream while another client's long prompt comes in

Prompts are token ids, the same for both. Both servers are started anew for each scene, with the same room for
sequences; what comes first changes from round to round.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from peer.install import Cache, default_cache
from serve_http import ANSWERS, Answer, ask, quantile, rate_of

Figures = dict[str, float]
START_SECONDS = 300
TURN_TOKENS = 200
GAP_PROMPT = 4096


def ids(seed: int, count: int) -> list[int]:
    """Return token ids that no other seed's begin with."""
    dice = random.Random(seed)
    return [dice.randrange(300, 4000) for _ in range(count)]


def completion(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "cache_prompt": True,
    }


async def send(port: int, prompt: list[int], tokens: int) -> Answer:
    made = await ask(port, completion(prompt, tokens), path="/v1/completions")
    if made.status != 200 or made.new_tokens < tokens:
        raise SystemExit(f"status {made.status}, {made.new_tokens} of {tokens} tokens")
    return made


async def streams(port: int, options: argparse.Namespace) -> Figures:
    """Return the tokens a second of all clients together, by their number."""
    found = {}
    for clients in options.clients:

        async def client(number: int, of: int) -> list[Answer]:
            seeds = (1000 * of + ANSWERS * number + i for i in range(ANSWERS))
            return [await send(port, ids(seed, 32), options.tokens) for seed in seeds]

        begun = monotonic()
        done = await asyncio.gather(*(client(i, clients) for i in range(clients)))
        answers = list(itertools.chain(*done))
        found[f"{clients} clients, tok/s"] = rate_of(answers, monotonic() - begun)
    return found


async def turn(port: int, options: argparse.Namespace) -> Figures:
    """Return the seconds to the first token of both turns."""
    prompt = ids(1, options.prompt)
    found = {}
    for name in ("first turn, s", "second turn, s"):
        made = await send(port, prompt, 8)
        found[name] = made.times[0] - made.begun
        prompt = prompt + ids(2, TURN_TOKENS)
    return found


async def gaps(port: int, options: argparse.Namespace) -> Figures:
    """Return the gaps of a stream from when another prompt is sent to its first token."""
    stream = asyncio.ensure_future(send(port, ids(3, 32), 400))
    await asyncio.sleep(2)
    other = await send(port, ids(4, GAP_PROMPT), 8)
    times = [time for time in (await stream).times if other.begun <= time <= other.times[0]]
    between = [b - a for a, b in itertools.pairwise([other.begun, *times, other.times[0]])]
    seconds = other.times[0] - other.begun
    return {
        "gap p50, ms": quantile(between, 0.5),
        "gap p99, ms": quantile(between, 0.99),
        "longest gap, ms": quantile(between, 1),
        "prompt meanwhile, tok/s": GAP_PROMPT / seconds,
    }


Scene = Callable[[int, argparse.Namespace], Coroutine[Any, Any, Figures]]
# Scene -> sequences at once, and the tokens that each may hold.
SCENES: dict[str, tuple[Scene, int, Callable[[argparse.Namespace], int]]] = {
    "streams": (streams, 16, lambda options: 1024),
    "turn": (turn, 2, lambda options: options.prompt + 1024),
    "gaps": (gaps, 2, lambda options: GAP_PROMPT + 1024),
}


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Start a server and wait until it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = monotonic() + START_SECONDS
        while not is_ready(port):
            if process.poll() is not None or monotonic() > end:
                raise SystemExit(f"no server: {' '.join(command)}")
            sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def commands(
    cache: Cache, options: argparse.Namespace
) -> dict[str, Callable[[int, int], list[str]]]:
    """Return how each server is started for so many sequences of so many tokens."""
    checkpoint = str(cache.checkpoint(options.model))
    artifact = str(cache.artifact(checkpoint, options.precision, 4096, batch=16))
    model, program = str(cache.gguf(checkpoint, options.llama_type)), cache.llama() / "llama-server"
    port, threads = str(options.port), str(options.threads)

    def ours(sequences: int, tokens: int) -> list[str]:
        command = [sys.executable, "-m", "q35c", "serve", artifact, "--port", port]
        command += ["--served-model-name", "m"]
        return [*command, "--context", str(tokens), "--threads", threads]

    def theirs(sequences: int, tokens: int) -> list[str]:
        command = [str(program), "-m", model, "--port", port, "-t", threads, "-fa", "on"]
        return [*command, "-np", str(sequences), "-c", str(sequences * tokens), "--no-webui"]

    return {"q35c": ours, "llama-server": theirs}


def print_figures(found: dict[str, list[Figures]]) -> None:
    for name in found["q35c"][0]:
        medians = {
            server: statistics.median(figures[name] for figures in rounds)
            for server, rounds in found.items()
        }
        ours, theirs = medians.values()
        print(f"{name:26} {ours:10.3g} {theirs:14.3g} {ours / theirs:8.3g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("scenes", nargs="*", metavar="scene", help=", ".join(SCENES))
    parser.add_argument("--model", default="qwen3.5-0.8b")
    parser.add_argument("--precision", default="w4")
    parser.add_argument("--llama-type", default="Q4_K_M")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer of streams")
    parser.add_argument("--prompt", type=int, default=16384, help="tokens of the first turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8097)
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    unknown = set(options.scenes) - SCENES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    servers = commands(Cache(options.cache, lambda text: print(text, flush=True)), options)
    print(f"{'':26} {'q35c':>10} {'llama-server':>14} {'ratio':>8}")
    for name in options.scenes or SCENES:
        scene, sequences, room = SCENES[name]
        found: dict[str, list[Figures]] = {server: [] for server in servers}
        for number in range(options.rounds):
            for server in sorted(servers, reverse=bool(number % 2)):
                with running(servers[server](sequences, room(options)), options.port):
                    found[server].append(asyncio.run(scene(options.port, options)))
        print_figures(found)


if __name__ == "__main__":
    main()
