"""Measure a loaded model: prefill and decode rates, load time, peak memory.

Tests are named as by llama-bench: `pp512` appends 512 tokens at once, `tg128` appends 128 tokens one by
one, `@ d1024` does so behind 1024 tokens that are not counted. Sampling and text are not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from q35c import arguments
from q35c.errors import OptionError

if TYPE_CHECKING:
    from q35c.runtime import Model, Session

Progress = Callable[[str, float], None]
_MOST_REPETITIONS = 1_000_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """The runs of one test; `seconds` has one item per repetition."""

    test: str
    tokens: int
    depth: int
    seconds: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Return tokens per second of every run."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def median(self) -> float:
        """Return the median rate in tokens per second."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Return half the range of the rates."""
        return (max(self.rates) - min(self.rates)) / 2


def run_benchmark(
    model: Model,
    *,
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Run every test at every depth, once to warm up and then `repetitions` times.

    A size of 0 leaves a test out. Raises OptionError as `choose_tests`, and for other wrong arguments.
    """
    tests, depths = choose_tests(
        model.context, prompt_tokens=prompt_tokens, new_tokens=new_tokens, depths=depths
    )
    repetitions, seed = check_runs(repetitions, seed, progress)
    ids = np.random.default_rng(seed).integers(0, model.vocab_size, model.context).tolist()
    done, total = 0, len(tests) * len(depths) * (repetitions + 1)
    found: list[Measurement] = []
    for depth in depths:
        with model.session() as session:
            if depth:
                session.prefill(ids[:depth])
            start = session.snapshot()
            for kind, size in tests:
                name = f"{kind}{size}" + (f" @ d{depth}" if depth else "")
                step = _prefill if kind == "pp" else _decode
                seconds: list[float] = []
                for _ in range(repetitions + 1):
                    if progress is not None:
                        progress(f"bench {name}", done / total)
                    session.restore(start)
                    begin = time.perf_counter()
                    step(session, ids[depth : depth + size])
                    seconds.append(time.perf_counter() - begin)
                    done += 1
                found.append(Measurement(name, size, depth, tuple(seconds[1:])))
    return found


def check_runs(repetitions: int, seed: int, progress: Progress | None) -> tuple[int, int]:
    """Return how often to measure and the seed of the tokens. Raises OptionError."""
    arguments.callback("progress", progress)
    repetitions = arguments.integer("repetitions", repetitions, 1, _MOST_REPETITIONS)
    return repetitions, arguments.integer("seed", seed, 0, 2**64 - 1)


def _prefill(session: Session, ids: Sequence[int]) -> None:
    session.prefill(ids)


def _decode(session: Session, ids: Sequence[int]) -> None:
    for token in ids:
        session.decode(token)


def choose_tests(
    context: int,
    *,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[int],
    depths: Sequence[int],
) -> tuple[list[tuple[str, int]], list[int]]:
    """Return the tests as (kind, tokens), kind "pp" or "tg", and the depths; a size of 0 leaves a test out.

    Raises OptionError if a number makes no sense, a test does not fit the context, or none is left.
    """
    prompts = _sizes("prompt_tokens", prompt_tokens)
    news = _sizes("new_tokens", new_tokens)
    places = _sizes("depths", depths)
    if not places or not any(prompts + news):
        raise OptionError("nothing to measure", where="prompt_tokens" if places else "depths")
    for name, sizes in (("prompt_tokens", prompts), ("new_tokens", news)):
        if any(sizes) and max(sizes) + max(places) > context:
            raise OptionError(
                "a test does not fit the context",
                where=name,
                expected=f"at most {context} tokens with the depth",
                got=f"{max(sizes)} behind {max(places)}",
                hint="measure less, or compile with a larger context",
            )
    tests = [("pp", size) for size in prompts if size]
    return tests + [("tg", size) for size in news if size], places


def _sizes(name: str, values: Sequence[int]) -> list[int]:
    listed = arguments.sequence(name, values, "a list of numbers", most=1000)
    return [arguments.integer(name, value, 0) for value in listed]
