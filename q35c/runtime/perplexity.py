"""How well a model predicts a text: its perplexity, which is e to the mean surprise of a token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from q35c import arguments
from q35c.errors import PromptError
from q35c.runtime.device import Logits
from q35c.runtime.prompts import check_ids
from q35c.runtime.sampling import log_shares

if TYPE_CHECKING:
    from q35c.runtime.model import Model

STEP = 64  # tokens scored at once: their logits are what takes memory
Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Figures of a text; surprise is the negative natural logarithm of a token's share.

    tokens          those that were predicted: all but the first
    surprise        mean over them, and `deviation` is the standard deviation of that mean
    text_bytes      those of the tokens that were predicted
    window          most tokens that a prediction stands on
    """

    tokens: int
    surprise: float
    deviation: float
    text_bytes: int
    window: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Return e to the mean surprise; 1 for a model that knows every token beforehand."""
        return math.exp(min(self.surprise, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Return what a byte of the text costs, which models with other tokens can be compared by."""
        return (
            self.surprise * self.tokens / math.log(2) / self.text_bytes if self.text_bytes else 0.0
        )

    @property
    def tokens_per_second(self) -> float:
        """Return the rate at which tokens were predicted."""
        return self.tokens / self.seconds if self.seconds else 0.0


def measure_perplexity(
    model: Model, text: str, window: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Return how well a model predicts a text of at least two tokens.

    `window`, by default the model's context, is the most tokens that a prediction stands on. A longer text is read in
    windows that overlap by half: all but the first half of the text is predicted from half a window at least. Raises
    PromptError, OptionError, TokenizerError, MemoryRefused.
    """
    arguments.callback("progress", progress)
    width = model.context if window is None else window
    width = arguments.integer("window", width, 2, model.context)
    ids = model.tokenizer.encode(arguments.text("text", text))
    if len(ids) < 2:
        raise PromptError("the text is too short", expected="at least 2 tokens", got=len(ids))
    check_ids(ids, model.vocab_size, len(ids))
    begin, found = time.perf_counter(), list[float]()
    with model.session(min(width, len(ids))) as session:
        for start, first, end in windows(len(ids), width):
            session.reset()
            skipped = (first - 1 - start) // STEP * STEP  # tokens whose logits nobody needs
            if skipped:
                session.extend(ids[start : start + skipped])
            for low in range(start + skipped, end, STEP):
                high = min(low + STEP, end)
                logits = session.score(ids[low:high])
                known = max(
                    low, first - 1
                )  # what is known then, the first token that counts is predicted from
                found += surprises(logits[known - low :], ids[known + 1 : min(high + 1, end)])
                if progress is not None:
                    progress(len(found), len(ids) - 1)
    decoded = model.tokenizer.decode(ids[1:], skip_special_tokens=False)
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    return Perplexity(
        tokens=len(found),
        surprise=math.fsum(found) / len(found),
        deviation=spread / math.sqrt(len(found)),
        text_bytes=len(decoded.encode()),
        window=width,
        seconds=time.perf_counter() - begin,
    )


def windows(count: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first token that is predicted, end) of each window; every token but the first is predicted once."""
    start, first = 0, 1
    while first < count:
        end = min(start + width, count)
        yield start, first, end
        start, first = start + width // 2, end


def surprises(logits: Logits, targets: list[int]) -> list[float]:
    """Return the surprise at each token, of logits f32[S, V] with S at least the number of tokens."""
    return [-log_shares(row, token, 0)[0] for row, token in zip(logits, targets, strict=False)]
