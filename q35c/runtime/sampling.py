"""Choose the next token from logits, in the order of Hugging Face's logits processors.

repetition penalty -> presence and frequency penalty -> bias -> mask -> temperature -> top-k -> top-p -> min-p -> draw.
All over float32 logits [V]; V is 248,320, so nothing sorts or copies more than it must: the k-th largest value is bounded
from below by the k-th largest of column maxima, which leaves a handful of candidates; and where top-p ends is found in a
histogram of the weights.

Deterministic: a row draws one double per token from PCG64 seeded with its seed alone, so equal logits
and an equal seed give equal tokens, whatever else is in the batch.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from q35c import arguments
from q35c.errors import ExecutionError, OptionError

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]
Doubles = NDArray[np.float64]
# [V / 32, rounded up]: bit v % 32 of word v // 32 says whether token v is allowed.
Mask = NDArray[np.uint32]

_COLUMNS = 64  # logits are viewed as [64, V/64] for the column maxima
_MOST_SORTED = 4096  # weights; of more, those at the border of top-p are looked for first
_SPARSE = 8  # where fewer than V / 8 tokens are allowed, only those are looked at
MAX_SEED = 2**64 - 1
MOST_BIASES = 1 << 16
_MOST_ID = 2**31 - 1
_LIMITS = {
    "temperature": (0.0, 1000.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1000.0),
    "presence_penalty": (-1000.0, 1000.0),
    "frequency_penalty": (-1000.0, 1000.0),
}


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to sample. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `logit_bias` maps token ids to what is added to their logits.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = arguments.real(name, getattr(self, name), low, high)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "top_k", arguments.integer("top_k", self.top_k, 0, 2**31))
        object.__setattr__(self, "logit_bias", _check_bias(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        """Say whether the largest logit always wins; below 1e-5 a draw could not be told from it."""
        return self.temperature < 1e-5


class Sampler:
    """Sample one sequence: holds its random stream and the ids that penalties look at."""

    def __init__(self, options: SamplingOptions, seed: int, prompt: Sequence[int] = ()) -> None:
        """Start a stream. `seed` is 0..2^64-1; `prompt` counts for the repetition penalty only.

        Raises OptionError.
        """
        seed = arguments.integer("seed", seed, 0, MAX_SEED)
        ids = arguments.sequence("prompt", prompt, "a list of token ids")
        if not all(type(token) is int and 0 <= token <= _MOST_ID for token in ids):
            ids = [arguments.integer("prompt", token, 0, _MOST_ID) for token in ids]
        self._options = arguments.instance("options", options, SamplingOptions)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._prompt = np.unique(np.asarray(ids, dtype=np.intp))
        self._made: Counter[int] = Counter()
        bias = options.logit_bias
        self._biased = np.fromiter(bias.keys(), dtype=np.intp, count=len(bias))
        self._biases = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self._largest_id = int(self._prompt.max(initial=max(bias, default=0)))

    def sample(self, logits: Logits, mask: Mask | None = None) -> int:
        """Return the next token id and remember it. `logits` f32[V] is left as it is.

        With a mask, only tokens that it allows are drawn. Raises ExecutionError if a logit is NaN or +inf, all are
        -inf, or the mask allows none that is finite; OptionError if logits or mask are no such arrays, or the prompt
        holds ids outside of them.
        """
        self._check_logits(logits)
        if self._has_penalties():
            logits = self._penalize(logits)
        token = _likeliest(logits)
        allowed: Ids | None = None
        if mask is not None:
            allowed, logits = _allow(logits, mask)
            token = _likeliest(logits)
        if not self._options.is_greedy and self._options.top_k != 1:
            token = self._draw(*filter_logits(logits, self._options))
        token = token if allowed is None else int(allowed[token])
        self._made[token] += 1
        self._largest_id = max(self._largest_id, token)
        return token

    def _check_logits(self, logits: Any) -> None:
        is_array = isinstance(cast(object, logits), np.ndarray)
        is_right = is_array and logits.ndim == 1 and logits.dtype == np.float32
        if not is_right or len(logits) <= self._largest_id:
            raise OptionError(
                "not logits of this sequence",
                where="logits",
                expected=f"an array f32[V] with V > {self._largest_id}",
                got=logits,
            )

    def _has_penalties(self) -> bool:
        options = self._options
        has_own = options.presence_penalty != 0.0 or options.frequency_penalty != 0.0
        return has_own or options.repetition_penalty != 1.0 or bool(options.logit_bias)

    def _penalize(self, logits: Logits) -> Logits:
        options, logits = self._options, logits.copy()
        made = np.fromiter(self._made, dtype=np.intp, count=len(self._made))
        if options.repetition_penalty != 1.0:
            seen = np.union1d(self._prompt, made)
            penalty = np.float32(options.repetition_penalty)
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * penalty, values / penalty)
        if options.presence_penalty != 0.0:
            logits[made] -= np.float32(options.presence_penalty)
        if options.frequency_penalty != 0.0:
            times = np.fromiter(self._made.values(), dtype=np.float32, count=len(made))
            logits[made] -= np.float32(options.frequency_penalty) * times
        logits[self._biased] += self._biases
        return logits

    def _draw(self, ids: Ids | None, weights: Logits) -> int:
        """Return the id whose share of the cumulated weights holds the drawn number."""
        number = self._random.random()
        if len(weights) >= _COLUMNS**2:
            at = _draw_by_blocks(weights, number)
            return at if ids is None else int(ids[at])
        cumulated: Doubles = np.cumsum(weights, dtype=np.float64)
        at = int(cumulated.searchsorted(number * float(cumulated[-1]), side="right"))
        at = min(at, len(cumulated) - 1)
        return at if ids is None else int(ids[at])


def _check_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise OptionError(
            "value is not allowed", where="logit_bias", expected="a mapping of token ids to numbers"
        )
    items = cast(Mapping[Any, Any], bias)
    if len(items) > MOST_BIASES:
        raise OptionError("too many items", where="logit_bias", expected=f"at most {MOST_BIASES}")
    return {
        arguments.integer("logit_bias", token, 0, _MOST_ID): arguments.real(
            "logit_bias", by, -1000.0, 1000.0
        )
        for token, by in items.items()
    }


def _likeliest(logits: Logits) -> int:
    """Return the first of the largest logits. Raises ExecutionError if it is not finite, or if there is a NaN."""
    at = int(logits.argmax())  # finds NaN before any number
    if not math.isfinite(float(logits[at])):
        raise ExecutionError("logits are not finite", where="sampling", got=float(logits[at]))
    return at


def _allow(logits: Logits, mask: Mask) -> tuple[Ids | None, Logits]:
    """Return the allowed ids and their logits; or None and all logits, where those of the others are -inf."""
    is_mask = isinstance(cast(object, mask), np.ndarray) and mask.dtype == np.uint32
    if not is_mask or mask.ndim != 1 or len(mask) * 32 < len(logits):
        raise OptionError(
            "not a mask", where="mask", expected=f"an array u32[{-(-len(logits) // 32)}]", got=mask
        )
    is_allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little").view(bool)
    count = int(np.count_nonzero(is_allowed))
    if count == 0:
        raise ExecutionError("no token is allowed", where="sampling")
    if count * _SPARSE < len(logits):
        ids = np.flatnonzero(is_allowed)
        return ids, logits[ids]
    return None, np.where(is_allowed, logits, np.float32(-np.inf))


def log_shares(
    logits: Logits, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the natural logarithm of a token's share, and the `count` likeliest as (id, logarithm), descending.

    By the plain logits f32[V], before any penalty or mask; of equal ones the lower id comes first.
    """
    largest = float(logits.max())
    total = float(np.exp(logits - np.float32(largest)).sum(dtype=np.float64))
    norm = largest + math.log(total)
    count = min(count, len(logits))
    if count == 0:
        return float(logits[token]) - norm, ()
    ids = _top_k(logits, count)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
    return float(logits[token]) - norm, tuple((int(i), float(logits[i]) - norm) for i in ids)


def filter_logits(logits: Logits, options: SamplingOptions) -> tuple[Ids | None, Logits]:
    """Apply temperature, top-k, top-p and min-p.

    Returns the surviving ids, ascending, and their weights exp((x - max) / temperature); ids are None
    if all survive. Ties at the k-th largest logit all survive, as in Hugging Face.
    """
    ids: Ids | None = None
    values = logits
    if 0 < options.top_k < len(logits):
        ids = _top_k(logits, options.top_k)
        values = logits[ids]
    with np.errstate(over="ignore"):  # the far tail may become -inf, whose weight is 0
        scaled = (values - values.max()) / np.float32(options.temperature)
    weights: Logits = np.exp(scaled)
    if options.top_p < 1.0:
        kept = _top_p(weights, options.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if options.min_p > 0.0:
        kept = np.flatnonzero(weights >= np.float32(options.min_p))  # the largest weight is 1
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def _top_k(logits: Logits, k: int) -> Ids:
    """Return the ids, ascending, of all logits that are at least the k-th largest."""
    candidates: Ids | None = None
    values = logits
    width = len(logits) // _COLUMNS
    if k <= width:
        # k columns have a maximum of at least `bound`, so at least k logits do.
        maxima = logits[: width * _COLUMNS].reshape(_COLUMNS, width).max(axis=0)
        bound = np.partition(maxima, width - k)[width - k]
        candidates = np.flatnonzero(logits >= bound)
        values = logits[candidates]
    kth = np.partition(values, len(values) - k)[len(values) - k]
    kept = np.flatnonzero(values >= kth)
    return kept if candidates is None else candidates[kept]


def _top_p(weights: Logits, top_p: float) -> Ids:
    """Return the indices, ascending, of the smallest set of largest weights that reaches `top_p`.

    In ascending order everything is dropped whose cumulated share is at most 1 - top_p. Weights below
    that share divided by V are dropped in any case, so only the others are sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    spare = (1.0 - top_p) * total
    found = weights[np.flatnonzero(weights >= spare / len(weights))]
    tail = total - float(found.sum(dtype=np.float64))
    border = found
    if len(found) > _MOST_SORTED:
        border, tail = _border(found, tail, spare)
    ordered = np.sort(border)  # values alone: several times faster than sorting indices
    cumulated: Doubles = tail + np.cumsum(ordered, dtype=np.float64)
    dropped = int(cumulated.searchsorted(spare, side="right"))
    dropped = min(dropped, len(ordered) - 1)  # the largest always survives
    least = ordered[dropped]
    kept = np.flatnonzero(weights >= least)
    surplus = int(np.count_nonzero(ordered[:dropped] == least))  # equal to it, but below the border
    ties = np.flatnonzero(weights[kept] == least)[:surplus]
    return np.delete(kept, ties) if surplus else kept


def _border(weights: Logits, tail: float, spare: float) -> tuple[Logits, float]:
    """Return the weights among which the cumulated sum, from the least on, passes `spare`, and the sum below them.

    Positive floats are ordered as their bits are, so the upper bits number the cells of a histogram.
    """
    cells = weights.view(np.uint32) >> 16
    sums = tail + np.cumsum(np.bincount(cells, weights), dtype=np.float64)
    last = int(cells.max())
    cell = min(int(sums.searchsorted(spare, side="right")), last)
    below = float(sums[cell - 1]) if cell else tail
    return weights[cells == cell], below


def _draw_by_blocks(weights: Logits, number: float) -> int:
    """Draw from many weights: find the block by the blocks' sums, then the place in the block."""
    width = len(weights) // _COLUMNS
    blocks = weights[: width * _COLUMNS].reshape(width, _COLUMNS)
    rest = float(weights[width * _COLUMNS :].sum(dtype=np.float64))
    cumulated: Doubles = np.cumsum(np.append(blocks.sum(axis=1, dtype=np.float64), rest))
    wanted = number * float(cumulated[-1])
    block = min(int(cumulated.searchsorted(wanted, side="right")), len(cumulated) - 1)
    before = float(cumulated[block - 1]) if block else 0.0
    inside: Doubles = np.cumsum(
        weights[block * _COLUMNS : (block + 1) * _COLUMNS], dtype=np.float64
    )
    if len(inside) == 0:  # V is a multiple of 64 and rounding ran past the last block
        return len(weights) - 1
    at = int(inside.searchsorted(wanted - before, side="right"))
    return block * _COLUMNS + min(at, len(inside) - 1)
