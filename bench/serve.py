"""Measure the engine of the server in this process, without HTTP: many streams, second turns, and a long prompt among them.

    python bench/serve.py model.q35c                          # compile with --batch 8 or more
    python bench/serve.py model.q35c --streams 1,2,4 --prompt 128 --new 32 --long 2048 --json

Three tables. Throughput: tokens per second of all streams together, over the time in which they generate, and beside it what
`decode_together` alone yields at as many rows. Second turn: seconds to the first token of a long prompt, and of one that goes on
behind it; both with the parts of the prompt that were cached. Stall: seconds between the tokens of four streams, alone
and while a long prompt comes in, and the rate of that prompt beside the rate it has alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import q35c
from q35c.cli.text import table_text
from q35c.runtime.generate import GenerationOptions
from q35c.runtime.sampling import SamplingOptions
from q35c.runtime.session import Session
from q35c.serve.engine import Engine
from q35c.serve.request import Event, Failed, Finished, Request, Token

CACHE_BYTES = 1 << 33
MEASURED_STEPS = 16  # of decode_together alone


class Stream:
    """One request: when each of its tokens came."""

    def __init__(
        self, engine: Engine, ids: Sequence[int], new_tokens: int, client: str = ""
    ) -> None:
        """Submit it."""
        options = GenerationOptions(SamplingOptions(0.0), new_tokens, (), frozenset(), 0)
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self.end: Finished | None = None
        self._error: Exception | None = None
        self._is_over = threading.Event()
        engine.submit(Request(tuple(ids), options, client=client), self._post)

    def _post(self, request: Request, events: list[Event]) -> None:
        now = time.perf_counter()
        self.times += [now for event in events if isinstance(event, Token)]
        for event in events:
            if isinstance(event, Failed):
                self._error = event.error
            if isinstance(event, Finished):
                self.end = event
            if isinstance(event, (Finished, Failed)):
                self._is_over.set()

    def wait(self) -> Stream:
        """Wait until it has ended. Raises what it failed with."""
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        return self

    @property
    def first_seconds(self) -> float:
        """Return the seconds to the first token."""
        return self.times[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        """Return the seconds between tokens."""
        return np.diff(self.times).tolist()


def random_ids(model: q35c.Model, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocab_size, count).tolist()


def rate_alone(model: q35c.Model, rows: int, prompt: int) -> float:
    """Return the tokens per second of `decode_together` alone."""
    sessions = [model.session(prompt + MEASURED_STEPS + 1) for _ in range(rows)]
    for seed, session in enumerate(sessions):
        session.prefill(random_ids(model, prompt, seed))
    begin = time.perf_counter()
    for _ in range(MEASURED_STEPS):
        Session.decode_together(sessions, [1] * rows)
    seconds = time.perf_counter() - begin
    for session in sessions:
        session.close()
    return rows * MEASURED_STEPS / seconds


def throughput(model: q35c.Model, streams: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Return rates of so many streams; the time before the last of them has its first token does not count."""
    engine = Engine(model)
    made = [
        Stream(engine, random_ids(model, prompt, seed), new_tokens, str(seed))
        for seed in range(streams)
    ]
    for stream in made:
        stream.wait()
    rows = engine.statistics().rows
    engine.close()
    # More streams than seats never generate all at once: then all of the time counts.
    is_together = streams <= model.batch
    begin = max(s.times[0] for s in made) if is_together else min(s.times[0] for s in made)
    times = sorted(at for stream in made for at in stream.times)
    end = min(s.times[-1] for s in made) if is_together else times[-1]
    count = sum(begin < at <= end for at in times)
    alone = rate_alone(model, min(streams, model.batch), prompt)
    rate = count / (end - begin) if end > begin else 0.0
    whole = len(times) / (times[-1] - min(stream.begin for stream in made))
    return {
        "streams": streams,
        "tokens_per_second": rate,
        "share_of_decode_together": rate / alone,
        "with_prefill": whole,
        "rows": {str(count): steps for count, steps in sorted(rows.items())},
    }


def second_turn(model: q35c.Model, long: int) -> dict[str, Any]:
    """Return seconds to the first token of a prompt, and of one that goes on behind it."""
    engine = Engine(model, cache_bytes=CACHE_BYTES)
    ids = random_ids(model, long, 1)
    first = Stream(engine, ids, 8).wait()
    second = Stream(engine, [*ids, *random_ids(model, 60, 2)], 8).wait()
    engine.close()
    assert second.end is not None
    return {
        "prompt_tokens": long,
        "first_turn_seconds": first.first_seconds,
        "second_turn_seconds": second.first_seconds,
        "cached_tokens": second.end.usage.cached_tokens,
        "ratio": second.first_seconds / first.first_seconds,
    }


def stall(model: q35c.Model, streams: int, prompt: int, long: int) -> dict[str, Any]:
    """Return the seconds between tokens of some streams, without and with a long prompt that comes in."""
    engine = Engine(model)
    alone = Stream(engine, random_ids(model, long, 0), 1).wait().first_seconds
    room = model.context - prompt - 1
    quiet = [
        Stream(engine, random_ids(model, prompt, s), min(48, room), str(s)) for s in range(streams)
    ]
    quiet_gaps = [gap for stream in quiet for gap in stream.wait().gaps]
    talkers = [Stream(engine, random_ids(model, prompt, s), room, str(s)) for s in range(streams)]
    while any(not stream.times for stream in talkers):
        time.sleep(0.001)
    reader = Stream(engine, random_ids(model, long, 99), 1, "reader").wait()
    busy = [
        gap
        for stream in talkers
        for at, gap in zip(list(stream.times)[1:], stream.gaps, strict=False)
        if reader.begin <= at <= reader.times[0]
    ]
    engine.close()
    return {
        "streams": streams,
        "prompt_tokens": long,
        "gap_p50_alone": percentile(quiet_gaps, 50),
        "gap_p50": percentile(busy, 50),
        "gap_p99": percentile(busy, 99),
        "prefill_tokens_per_second_alone": long / alone,
        "prefill_share": alone / reader.first_seconds,
    }


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else 0.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table."""
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    return table_text([name.replace("_", " ") for name in rows[0]], cells)


def measure(model: q35c.Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all three tables. The median of `--repeat` runs counts, by the first figure of each."""
    made: dict[str, list[dict[str, Any]]] = {"throughput": [], "second_turn": [], "stall": []}
    for streams in arguments.streams:
        runs = [
            throughput(model, streams, arguments.prompt, arguments.new)
            for _ in range(arguments.repeat)
        ]
        made["throughput"].append(middle(runs, "tokens_per_second"))
    long = min(arguments.long, model.context - 128)
    turns = [second_turn(model, long) for _ in range(arguments.repeat)]
    made["second_turn"].append(middle(turns, "ratio"))
    streams = min(4, model.batch - 1) or 1
    stalls = [stall(model, streams, arguments.prompt, long) for _ in range(arguments.repeat)]
    made["stall"].append(middle(stalls, "gap_p99"))
    return made


def middle(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the run whose figure is the lower median."""
    wanted = statistics.median_low(run[name] for run in runs)
    return next(run for run in runs if run[name] == wanted)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument("--streams", default="1,2,4,8,16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before each stream")
    parser.add_argument("--new", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--long", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    arguments.streams = [int(word) for word in arguments.streams.split(",")]
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    with q35c.load(arguments.artifact, threads=arguments.threads) as model:
        made = measure(model, arguments)
    if arguments.json:
        print(json.dumps(made))
        return
    for name, rows in made.items():
        print(f"{name.replace('_', ' ')}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
