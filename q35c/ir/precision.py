"""Precision policies as data: which storage format each role of a weight gets.

The sensitive ones are the gates (b, a, router: a small error changes what is routed or how fast memory decays), then
the head and the projections of both mixers; the feed-forward weights, most of a model, take 4 bits well. On the demo
model 5 bits for all but the feed-forward cost a third of the KL that 4 bits everywhere do (bench/quality.py). With 8-bit
weights half of what is left comes from rounding rows, most of all those of the delta net's output, whose gate makes a few
values large: w8 has groups of 32, which cost an eighth of a bit more than 64 and half of the KL. Groups of 64 with the delta
net's output in bf16 are as good, but take 0.3 bits more.
Rows that meet integers are rounded to int8, rows that meet bf16 weights to bf16, except where those are gates.
Norms, conv, A_log and dt_bias are always f32, and so is the recurrent state. Keys and values are f32, bf16 or int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from q35c import arguments
from q35c.formats.registry import integer_format

# What a weight is for; `quantize` finds it from the structure of the graph.
ROLES = (
    "embedding", "head", "delta_in", "delta_gates", "delta_out", "attention_in", "attention_out",
    "mlp_in", "mlp_out", "experts_in", "experts_out", "router", "patches", "tower",
)  # fmt: skip
GATES = ("delta_gates", "router")
# Of a vision tower: the format of what its patches meet, and of all its other linears.
TOWERS = {
    "f32": {"patches": "f32", "tower": "f32"},
    "bf16": {"patches": "bf16", "tower": "bf16"},
    "w8": {"patches": "bf16", "tower": "i8g32"},
}


@dataclass(frozen=True, slots=True)
class Policy:
    """Storage formats by role. A tied embedding has the format of the head."""

    name: str
    cache: str  # keys and values
    formats: Mapping[str, str]
    summary: str

    @property
    def picture_cache(self) -> str:
        """Return the type in which a tower keeps the keys and values of a picture's patches."""
        return "f32" if self.formats["tower"] == "f32" else "bf16"

    def rows(self, role: str) -> str:
        """Return the dtype of the rows that a role's weights are multiplied by; gates always read f32."""
        form = integer_format(self.formats[role])
        if form:
            return f"q8g{form.group}"
        return "f32" if role in GATES else self.formats[role]


def uniform(dtype: str, gates: str | None = None, **others: str) -> Mapping[str, str]:
    """Return one format for every role, another for the gates, and exceptions."""
    formats = dict.fromkeys(ROLES, dtype) | dict.fromkeys(GATES, gates or dtype)
    formats |= TOWERS["f32" if dtype == "f32" else "bf16"]
    return MappingProxyType(formats | others)


_FEED_FORWARD = ("mlp_in", "mlp_out", "experts_in", "experts_out")
_LIST = (
    Policy("f32", "f32", uniform("f32"), "everything in 32 bits: the reference"),
    Policy("bf16", "bf16", uniform("bf16"), "weights, their inputs and cache in bf16"),
    Policy(
        "w8", "bf16", uniform("i8g32", "bf16"), "8-bit weights, gates in bf16"),
    Policy(
        "w4", "bf16", uniform("i5g64", "bf16", **dict.fromkeys(_FEED_FORWARD, "i4g64")),
        "feed-forward weights in 4 bits, the others in 5, gates in bf16",
    ),
    Policy("w4-small", "bf16", uniform("i4g128", "bf16"), "4-bit weights, gates in bf16"),
)  # fmt: skip
POLICIES = {policy.name: policy for policy in _LIST}
CACHES = ("f32", "bf16", "int8")


def find_policy(name: str, cache: str = "auto", tower: str = "auto") -> Policy:
    """Return a policy by name, with another type of keys and values, and another precision of the vision tower, unless "auto".

    Raises OptionError listing the known names.
    """
    policy = POLICIES[arguments.choice("precision", name, [*POLICIES], "precision")]
    known = ("auto", *CACHES)
    cache = arguments.choice("kv_dtype", cache, known, "type of keys and values")
    tower = arguments.choice("vision_precision", tower, ("auto", *TOWERS), "precision of a tower")
    if tower != "auto":
        formats = MappingProxyType({**policy.formats, **TOWERS[tower]})
        policy = replace(policy, formats=formats)
    return policy if cache == "auto" else replace(policy, cache=cache)
