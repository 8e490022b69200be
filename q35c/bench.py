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

from q35c.errors import OptionError

if TYPE_CHECKING:
    from q35c.runtime import Model, Session

Progress = Callable[[str, float], None]


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

    A size of 0 leaves a test out. Raises OptionError if a test does not fit the model's context.
    """
    tests = [("pp", size) for size in prompt_tokens if size]
    tests += [("tg", size) for size in new_tokens if size]
    check_sizes(model.context, [size for _, size in tests], depths, repetitions)
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


def _prefill(session: Session, ids: Sequence[int]) -> None:
    session.prefill(ids)


def _decode(session: Session, ids: Sequence[int]) -> None:
    for token in ids:
        session.decode(token)


def check_sizes(
    context: int, sizes: Sequence[int], depths: Sequence[int], repetitions: int
) -> None:
    """Raise OptionError if tests of these sizes make no sense or do not fit the context."""
    for name, values, low in (
        ("-p, -n", sizes, 1),
        ("-d", depths, 0),
        ("--repetitions", [repetitions], 1),
    ):
        if not values or min(values) < low:
            raise OptionError(
                "nothing to measure" if not values else "value is not allowed",
                where=name,
                expected=f"{low} or more",
                got=list(values),
            )
    if max(sizes) + max(depths) > context:
        raise OptionError(
            "a test does not fit the context",
            where="-p, -n, -d",
            expected=f"at most {context} tokens with the depth",
            got=max(sizes) + max(depths),
            hint="measure less, or compile with a larger --context",
        )
