"""Random well-typed graphs over views, elementwise ops, reductions, linears and norms.

    graph, inputs, weights = random_graph(seed)

Every op is evaluated when it is drawn and dropped if its values would not be tame, so that before and
after a pass can be compared with a tolerance. Some steps draw what passes look for, whole or with one
detail changed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from q35c.ir import Builder, Graph, SymDim, TensorType, Value
from q35c.ir.interpret import concrete
from q35c.ir.ops import OPS

T = SymDim("T")
TAME = 1e3  # largest magnitude a value may have
UNARY = ("neg", "exp", "sigmoid", "silu", "softplus", "rsqrt", "cos", "sin")
SHAPES = ((T, 8), (T, 2, 4), (T * 2, 4), (4, T, 2), (T, 1, 8), (T * 8,), (2, 2, T * 2))


class Untamed(Exception):
    """The drawn op has no operands that fit, or values that are not finite or too large."""


class Draw:
    """A builder that evaluates as it goes."""

    def __init__(self, seed: int, stage: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokens = int(self.rng.integers(1, 8))
        self.builder = Builder(f"random_{seed}", stage)
        self.inputs: dict[str, np.ndarray] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.arrays: dict[Value, np.ndarray] = {}
        for name in ("x", "y"):
            value = self.builder.input(name, TensorType("f32", (T, 8)))
            self.inputs[name] = self.arrays[value] = self.normal((self.tokens, 8))
        self.pool = list(self.arrays)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def pick(self, *items):
        return items[self.rng.integers(len(items))]

    def value(self) -> Value:
        """Pick an earlier value; later ones more often, so that graphs get deep."""
        recent = self.pool[-4:] if self.rng.random() < 0.6 else self.pool
        return recent[self.rng.integers(len(recent))]

    def rows(self) -> Value:
        """Return a value with a static last axis: an earlier one, or a view of one."""
        value = self.value()
        last = value.type.shape[-1]
        if isinstance(last, int) and last > 1:
            return value
        shape = self.reshaped(value, ((T, 8), (T, 2, 4)))
        if not isinstance(shape[-1], int) or shape[-1] == 1:
            raise Untamed
        return self.emit("reshape", value, shape=shape)

    def reshaped(self, value: Value, shapes) -> tuple:
        """Pick a shape for a value's elements; its own if none of `shapes` has as many."""
        size = self.arrays[value].size
        count = size // self.tokens
        fit = [
            s for s in shapes if np.prod(concrete(s, {"T": 1})) == count and size % self.tokens == 0
        ]
        is_symbolic = any(isinstance(dim, SymDim) for dim in value.type.shape)
        return self.pick(*fit) if fit and is_symbolic else value.type.shape

    def weight(self, *shape: int) -> Value:
        """Return a new weight, or now and then an old one of this shape."""
        same = [n for n, w in self.weights.items() if w.shape == shape]
        is_new = not same or self.rng.random() < 0.7
        name = f"layers.{len(self.weights)}.weight" if is_new else self.pick(*same)
        if is_new:
            self.weights[name] = self.normal(shape) / np.float32(np.sqrt(shape[-1]))
        value = self.builder.weight(name, TensorType("f32", shape))
        self.arrays[value] = self.weights[name]
        return value

    def emit(self, kind: str, *operands: Value, **attrs) -> Value:
        """Emit an op with one result, unless its values are untamed."""
        symbols = {"T": self.tokens}
        now = {name: concrete(attr, symbols) for name, attr in attrs.items()}
        with np.errstate(all="ignore"):
            array = OPS[kind].reference(*(self.arrays[v] for v in operands), **now)
        if not np.isfinite(array).all() or np.abs(array).max() > TAME:
            raise Untamed
        value = self.builder.emit(kind, *operands, **attrs)
        self.arrays[value] = array
        return value


# --- one op ---------------------------------------------------------------------------------------


def draw_unary(d: Draw) -> Value:
    return d.emit(d.pick(*UNARY), d.value())


def draw_scalar(d: Draw) -> Value:
    kind = d.pick("add_scalar", "mul_scalar")
    return d.emit(kind, d.value(), value=d.pick(0.0, 1.0, -0.5, 1e-6, 2.0))


def draw_binary(d: Draw) -> Value:
    a = d.value()
    same = [v for v in d.pool if v.type == a.type]
    kind = d.pick("add", "add", "mul", "div")
    if d.rng.random() < 0.3 and isinstance(a.type.shape[-1], int):
        return d.emit(kind, a, d.weight(a.type.shape[-1]))
    return (
        d.emit(kind, a, d.pick(*same)) if d.rng.random() < 0.5 else d.emit(kind, d.pick(*same), a)
    )


def draw_reshape(d: Draw) -> Value:
    x = d.value()
    return d.emit("reshape", x, shape=d.reshaped(x, SHAPES))


def draw_transpose(d: Draw) -> Value:
    x = d.value()
    return d.emit("transpose", x, perm=tuple(int(i) for i in d.rng.permutation(x.type.rank)))


def draw_slice(d: Draw) -> Value:
    x = d.rows()
    size = x.type.shape[-1]
    start = int(d.rng.integers(0, size))
    stop = int(d.rng.integers(start, size)) + 1
    axis = d.pick(-1, x.type.rank - 1)
    return d.emit("slice", x, axis=axis, start=start, stop=stop, step=d.pick(1, 1, 2))


def draw_update(d: Draw) -> Value:
    """Overwrite every second element of a row by elements of the same row."""
    x = d.rows()
    size = x.type.shape[-1]
    part = d.emit("slice", x, axis=-1, start=0, stop=(size + 1) // 2, step=1)
    return d.emit("slice_update", x, part, axis=-1, start=0, step=2)


def draw_concat(d: Draw) -> Value:
    x = d.rows()
    same = [v for v in d.pool if v.type.shape[:-1] == x.type.shape[:-1]]
    others = [v for v in same if isinstance(v.type.shape[-1], int)] or [x]
    if x.type.shape[-1] > 16:
        raise Untamed
    return d.emit("concat", x, d.pick(*others), axis=-1)


def draw_reduction(d: Draw) -> Value:
    x = d.value()
    kind = d.pick("mean", "sum", "softmax")
    return d.emit(kind, x, axis=int(d.rng.integers(-x.type.rank, x.type.rank)))


def draw_cast(d: Draw) -> Value:
    return d.emit("cast", d.value(), dtype="f32")


def draw_linear(d: Draw) -> Value:
    x = d.rows()
    return d.emit("linear", x, d.weight(d.pick(4, 8, 8), x.type.shape[-1]))


def draw_fused_norm(d: Draw) -> Value:
    x = d.rows()
    return d.emit("rms_norm", x, d.weight(x.type.shape[-1]), eps=1e-6, offset=d.pick(0.0, 1.0))


def draw_layer_norm(d: Draw) -> Value:
    x = d.rows()
    size = x.type.shape[-1]
    return d.emit("layer_norm", x, d.weight(size), d.weight(size), eps=1e-3)


# --- what passes look for -------------------------------------------------------------------------


def draw_norm(d: Draw) -> Value:
    """x * rsqrt(mean(x^2) + eps) * (offset + w), perhaps times silu(gate), perhaps with a wrong detail."""
    x = d.rows()
    wrong = d.pick(None, None, None, "axis", "exponent", "source", "gate")
    square = d.emit("pow_scalar", x, exponent=4 if wrong == "exponent" else 2)
    mean = d.emit("mean", square, axis=0 if wrong == "axis" else -1)
    scale = d.emit("rsqrt", d.emit("add_scalar", mean, value=1e-6))
    normed = d.emit("mul", square if wrong == "source" else x, scale)
    factor = d.weight(x.type.shape[-1])
    is_gated = d.rng.random() < 0.5
    if not is_gated:
        factor = d.emit("add_scalar", factor, value=1.0)
    normed = d.emit("mul", *d.pick((normed, factor), (factor, normed)))
    if not is_gated:
        return normed
    gate = d.emit("sigmoid" if wrong == "gate" else "silu", x)
    return d.emit("mul", normed, gate)


def draw_swiglu(d: Draw) -> Value:
    """silu(x gate^T) * (x up^T), perhaps of two inputs, perhaps with a factor read elsewhere."""
    x = d.rows()
    size = x.type.shape[-1]
    same = [v for v in d.pool if v.type == x.type] or [x]
    gate = d.emit("linear", x, d.weight(8, size))
    up = d.emit("linear", x if d.rng.random() < 0.7 else d.pick(*same), d.weight(8, size))
    activated = d.emit("silu", gate)
    d.pool += [v for v in (gate, up) if d.rng.random() < 0.2]
    return d.emit("mul", *d.pick((activated, up), (up, activated)))


def draw_residual(d: Draw) -> Value:
    """residual + x weight^T, perhaps with a product read elsewhere."""
    x = d.rows()
    same = [v for v in d.pool if v.type == x.type] or [x]
    product = d.emit("linear", x, d.weight(x.type.shape[-1], x.type.shape[-1]))
    if d.rng.random() < 0.2:
        d.pool.append(product)
    residual = d.pick(*same)
    return d.emit("add", *d.pick((residual, product), (product, residual)))


def draw_bias(d: Draw) -> Value:
    """x weight^T + bias and what may follow it, perhaps with a bias of another form, perhaps with a sum read elsewhere."""
    x = d.rows()
    size, shape = x.type.shape[-1], d.pick((), (), (1,))
    product = d.emit("linear", x, d.weight(size, size))
    made = d.emit("add", product, d.weight(*shape, size))
    d.pool += [v for v in (product, made) if d.rng.random() < 0.2]
    follower = d.pick("gelu", "add", "nothing")
    if follower == "gelu":
        return d.emit("gelu", made, form=d.pick("erf", "tanh"))
    same = [v for v in d.pool if v.type == made.type] or [x]
    return d.emit("add", d.pick(*same), made) if follower == "add" else made


def draw_twice(d: Draw) -> Value:
    """Compute one thing twice."""
    x = d.value()
    kind = d.pick("sigmoid", "cos", "silu")
    return d.emit("add", d.emit(kind, x), d.emit(kind, x))


STEPS: tuple[Callable[[Draw], Value], ...] = (
    *(draw_unary, draw_scalar, draw_binary, draw_binary, draw_reshape, draw_reshape),
    *(draw_transpose, draw_transpose, draw_slice, draw_update, draw_concat, draw_reduction),
    *(draw_cast, draw_linear, draw_fused_norm, draw_norm, draw_norm, draw_swiglu, draw_residual),
    *(draw_twice, draw_layer_norm, draw_bias),
)


def random_graph(
    seed: int, stage: str = "traced", steps: int = 14
) -> tuple[Graph, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a graph, its inputs and its weights; the same for the same seed. Some ops are dead."""
    d = Draw(seed, stage)
    while steps:
        steps -= 1
        try:
            d.pool.append(d.pick(*STEPS)(d))
        except Untamed:
            continue
    outputs = dict.fromkeys([d.pool[-1], d.value()])
    return d.builder.finish(outputs), d.inputs, d.weights
