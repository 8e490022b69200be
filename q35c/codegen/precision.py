"""Precision policies as data: which element type each kind of tensor is stored in."""

from __future__ import annotations

from dataclasses import dataclass

from q35c.errors import OptionError


@dataclass(frozen=True, slots=True)
class Policy:
    """Storage types. Norms, conv, A_log and dt_bias are always f32; all arithmetic is f32."""

    name: str
    matrix: str  # projections, experts, router, embedding
    cache: str  # keys and values


POLICIES = {
    policy.name: policy for policy in (Policy("f32", "f32", "f32"), Policy("bf16", "bf16", "bf16"))
}


def find_policy(name: str) -> Policy:
    """Return a policy by name, or raise OptionError listing the known ones."""
    if name not in POLICIES:
        raise OptionError(
            "unknown precision", where="--precision", expected=", ".join(POLICIES), got=name
        )
    return POLICIES[name]
