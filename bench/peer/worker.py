"""Measure one thing of one system in this process and print it as one line of JSON.

    python -m peer.worker ort MODEL-DIRECTORY --prompt 512
    python -m peer.worker q35c model.q35c --decode 32 --depth 4096
    python -m peer.worker eager CHECKPOINT --prompt 16 --repeats 1 --no-warmup

A prefill test appends `--prompt` tokens to an empty sequence at once; a decode test appends `--decode`
tokens one by one behind `--depth` tokens that are not counted. No system samples or makes text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

ENGINES = ("q35c", "ort", "eager")


class Engine(Protocol):
    """One loaded model and one sequence."""

    vocabulary: int

    def reset(self) -> None: ...

    def prefill(self, ids: Sequence[int]) -> None: ...

    def decode(self, token: int) -> None: ...

    def facts(self) -> dict[str, Any]: ...


def measure(engine: Engine, options: argparse.Namespace) -> list[float]:
    """Return the seconds of every repetition, without the one to warm up."""
    draw = random.Random(0)
    size = options.prompt or options.decode
    ids = [draw.randrange(engine.vocabulary) for _ in range(options.depth + size)]
    seconds: list[float] = []
    for _ in range(options.repeats + options.warmup):
        engine.reset()
        if options.depth:
            engine.prefill(ids[: options.depth])
        begin = time.perf_counter()
        if options.prompt:
            engine.prefill(ids)
        else:
            for token in ids[options.depth :]:
                engine.decode(token)
        seconds.append(time.perf_counter() - begin)
    return seconds[int(options.warmup) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prefill test")
    parser.add_argument("--decode", type=int, default=0, help="tokens of a decode test")
    parser.add_argument("--depth", type=int, default=0, help="tokens there before a decode test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-warmup", dest="warmup", action="store_false")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if bool(options.prompt) == bool(options.decode):
        parser.error("give either --prompt or --decode")
    module = importlib.import_module(f"peer.engine_{options.engine}")
    context = options.depth + max(options.prompt, options.decode) + 1
    begin = time.perf_counter()
    engine: Engine = module.load(options.model, options.threads, context)
    loaded = time.perf_counter() - begin
    seconds = measure(engine, options)
    print(json.dumps({"load_seconds": loaded, "seconds": seconds, "facts": engine.facts()}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
