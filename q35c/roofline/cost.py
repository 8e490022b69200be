"""What a kernel call must do at the least: bytes it must move, operations, and which peak bounds them.

    limit = max(memory bytes / memory bandwidth, (memory + cache bytes) / cache bandwidth, operations / peak)

- Memory bytes are those of weights, recurrent state, keys and values: too many to stay in a cache from one step to the
  next. Weights count as they are stored, scales and padding included; written bytes count like read ones. Of a small
  model all of it fits a cache: its kernels may then be faster than this limit.
- Cache bytes are those of activations, f32 or rounded: some kernel has just written them, so they are taken to come
  from the L2 cache.
- A multiplication and an addition are two operations. They are bounded by the peak of the type that is multiplied: products
  of rounded rows by int8 or bf16, those with a bf16 cache by bf16, the rest by f32. An int8 cache meets integers of 16 bits,
  at half of the int8 peak: each product counts twice. Element-wise formulas count roughly; they hardly ever bound.
- The weight of a step is the largest that it reads; norm vectors beside it are not counted.
- Of experts those that some token chose: k of E for one token, E (1 - (1 - k/E)^T) for T, as if choices were random. A
  shared expert that is one of them, and every token's choice, counts like the others.

A kernel that no rule here understands costs its weight's bytes and no operations, and says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Peak = Literal["int8", "bf16", "f32"]
Parameters = Mapping[str, Any]

# What rules read, by type; everything else in a kernel's parameters is for people.
KINDS: dict[str, type] = {
    **dict.fromkeys(("D", "Dk", "Dv", "E", "H", "Hk", "Hkv", "Hq", "Hv", "I", "K", "N", "V"), int),
    **dict.fromkeys(("group", "pairs", "splits", "top_k"), int),
    **dict.fromkeys(("epilogue", "kv_dtype", "rows"), str),
    **dict.fromkeys(("has_shared", "is_kept"), bool),
    "inv_freq": tuple,
}
_MOST_SIZE = 1 << 31
_MOST_COST = 1e30
_F32 = 4
_EXP = 12  # operations of a vectorised exponential, about
_ROTARY_ANGLE = 120  # cosine and sine in f64 count double


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes from memory, bytes from caches and operations of one kernel call."""

    memory_bytes: float
    cache_bytes: float
    operations: float
    peak: Peak
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """The size of one call: rows T, each sequence's length before it, bytes of the step's weight."""

    tokens: int
    starts: tuple[int, ...]
    weight_bytes: int

    @property
    def sequences(self) -> int:
        return len(self.starts)

    def cells(self) -> int:
        """Return the cells that attention reads, over all sequences."""
        per_sequence = self.tokens // self.sequences
        return sum(start + per_sequence for start in self.starts)

    def scores(self) -> int:
        """Return the (token, cell) pairs of causal attention, over all sequences."""
        run = self.tokens // self.sequences
        return sum(run * start + run * (run + 1) // 2 for start in self.starts)


def step_cost(family: str, parameters: Parameters, work: Work) -> Cost:
    """Return the cost of a call of a kernel; one that no rule understands is marked."""
    # Parameters come from the manifest, where they are notes for people: nothing has checked them.
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        cost = RULES[family](checked(parameters), work)
        numbers = (cost.memory_bytes, cost.cache_bytes, cost.operations)
        if all(0 <= number < _MOST_COST for number in numbers):
            return cost
    return Cost(work.weight_bytes, 0, 0, "f32", is_known=False)


def checked(parameters: Parameters) -> Parameters:
    """Return what rules read of the parameters; ValueError where one is of another type or size than they expect.

    A list or a text that is multiplied would be repeated, and could take all memory.
    """
    found = {name: value for name, value in parameters.items() if name in KINDS}
    for name, value in found.items():
        is_size = type(value) is int
        if type(value) is not KINDS[name] or (is_size and not 0 <= value < _MOST_SIZE):
            raise ValueError(name)
    return found


def peak_of(dtype: str) -> Peak:
    """Return the peak that bounds products with values stored in a format of `formats/registry.py`."""
    if dtype in ("bf16", "f32"):
        return dtype
    return "int8"


def row_bytes(width: int, dtype: str) -> float:
    """Return the bytes of an activation row: f32, bf16, or int8 with a scale and a sum for each group."""
    if peak_of(dtype) != "int8":
        return width * (2 if dtype == "bf16" else _F32)
    group = int(dtype.rpartition("g")[2])
    return width + 8 * -(-width // group)


def linear(p: Parameters, work: Work) -> Cost:
    outputs = p["N"] // 2 if p["epilogue"] == "swiglu" else p["N"]
    written = fused_rounding(p, outputs) or outputs * _F32 * (
        2 if p["epilogue"] == "residual" else 1
    )
    cache = work.tokens * (row_bytes(p["K"], p["rows"]) + written)
    return Cost(work.weight_bytes, cache, 2 * work.tokens * p["N"] * p["K"], peak_of(p["rows"]))


def embedding(p: Parameters, work: Work) -> Cost:
    read = work.tokens * work.weight_bytes / p["V"]
    return Cost(read, work.tokens * p["H"] * _F32, work.tokens * p["H"], "f32")


def rms_norm(p: Parameters, work: Work) -> Cost:
    words = p["D"] * (2 if p.get("is_kept", True) else 1) + fused_rounding(p, p["D"]) / _F32
    return elementwise(work, words, 4 * p["D"])


def quantize_rows(p: Parameters, work: Work) -> Cost:
    return rounding(p, work, f"q8g{p['group']}")


def round_rows(p: Parameters, work: Work) -> Cost:
    return rounding(p, work, "bf16")


def fused_rounding(p: Parameters, width: int) -> float:
    """Return the bytes of the row of `width` values that a kernel rounds beside what it makes, 0 if it rounds none."""
    return row_bytes(width, f"q8g{p['group']}") if p.get("group") else 0


def rounding(p: Parameters, work: Work, dtype: str) -> Cost:
    width, pairs = p["K"], p["pairs"]
    rounded = row_bytes(width, dtype)
    cache = work.tokens * pairs * (width * _F32 + rounded)
    return Cost(0, cache, 5 * work.tokens * pairs * width, "f32")


def rotary_table(p: Parameters, work: Work) -> Cost:
    angles = len(p["inv_freq"])
    return elementwise(work, 2 * angles, _ROTARY_ANGLE * angles)


def gated_delta(p: Parameters, work: Work) -> Cost:
    """Convolution and recurrence: decay, k S, the update and q S are 7 operations for each element of the state."""
    size, values = p["Hv"] * p["Dk"] * p["Dv"], p["Hv"] * p["Dv"]
    channels, taps = 2 * p["Hk"] * p["Dk"] + values, p["K"]
    state = 2 * work.sequences * (size + (taps - 1) * channels) * _F32
    row = 2 * channels + 2 * values + 2 * p["Hv"] + fused_rounding(p, values) / _F32
    operations = 7 * size + _EXP * values + channels * (2 * taps + _EXP)
    return Cost(
        work.weight_bytes + state, work.tokens * row * _F32, work.tokens * operations, "f32"
    )


def attention_prepare(p: Parameters, work: Work) -> Cost:
    queries, keys = p["Hq"] * p["D"], p["Hkv"] * p["D"]
    written = 2 * work.tokens * keys * cell_bytes(p)
    cache = work.tokens * (2 * queries + 2 * keys) * _F32
    return Cost(written, cache, 8 * work.tokens * (queries + keys), "f32")


def attention(p: Parameters, work: Work) -> Cost:
    """Scores and sums are 2 D operations each; every cell is read once for all query heads of its key head."""
    read = 2 * work.cells() * p["Hkv"] * p["D"] * cell_bytes(p)
    rows = work.tokens * p["Hq"]
    operations = work.scores() * p["Hq"] * 4 * p["D"] * (2 if p["kv_dtype"] == "int8" else 1)
    cache = 3 * rows * p["D"] * _F32 + work.tokens * fused_rounding(p, p["Hq"] * p["D"])
    return Cost(read, cache, operations, peak_of(p["kv_dtype"]))


def cell_bytes(p: Parameters) -> float:
    """Return the bytes of one dim of a key or value; of int8 each has an f32 scale."""
    return {"f32": 4, "bf16": 2, "int8": 1 + _F32 / p["D"]}[p["kv_dtype"]]


def attention_combine(p: Parameters, work: Work) -> Cost:
    size = p["Hq"] * p["D"]
    words = (p["splits"] + 2) * size + fused_rounding(p, size) / _F32
    return elementwise(work, words, (3 * p["splits"] + _EXP) * size)


def route(p: Parameters, work: Work) -> Cost:
    return elementwise(work, p["E"] + 2 * p["top_k"], 2 * p["E"] * p["top_k"])


def group_by_expert(p: Parameters, work: Work) -> Cost:
    return elementwise(work, 2 * p["top_k"], 4 * p["top_k"])


def expert_gate_up(p: Parameters, work: Work) -> Cost:
    pairs = work.tokens * p["top_k"]
    written = fused_rounding(p, p["I"]) or p["I"] * _F32
    cache = pairs * (row_bytes(p["H"], p["rows"]) + written)
    return Cost(expert_bytes(p, work), cache, 4 * pairs * p["I"] * p["H"], peak_of(p["rows"]))


def expert_down(p: Parameters, work: Work) -> Cost:
    pairs = work.tokens * p["top_k"]
    cache = pairs * (row_bytes(p["I"], p["rows"]) + p["H"] * _F32)
    return Cost(expert_bytes(p, work), cache, 2 * pairs * p["I"] * p["H"], peak_of(p["rows"]))


def expert_bytes(p: Parameters, work: Work) -> float:
    """Return the weight bytes of the experts that T tokens are expected to choose."""
    chosen = 1 - (1 - p["top_k"] / p["E"]) ** work.tokens
    return work.weight_bytes * chosen


def combine(p: Parameters, work: Work) -> Cost:
    terms = p["top_k"] + p.get("has_shared", True)
    return elementwise(work, (terms + 2) * p["H"], (2 * terms + 2) * p["H"])


def elementwise(work: Work, words: float, operations: float) -> Cost:
    """Return the cost of a formula over f32 words of each row."""
    return Cost(0, work.tokens * words * _F32, work.tokens * operations, "f32")


RULES: dict[str, Callable[[Parameters, Work], Cost]] = {
    "attention": attention,
    "attention_combine": attention_combine,
    "attention_prepare": attention_prepare,
    "combine": combine,
    "embedding": embedding,
    "expert_down": expert_down,
    "expert_gate_up": expert_gate_up,
    "gated_delta": gated_delta,
    "gated_delta_decode": gated_delta,
    "group_by_expert": group_by_expert,
    "linear": linear,
    "quantize_rows": quantize_rows,
    "rms_norm": rms_norm,
    "rotary_table": rotary_table,
    "round_rows": round_rows,
    "route": route,
}
