"""Trace Hugging Face's own text model on the meta device, without weights.

The four computations that `torch.export` cannot keep whole, or would unroll, become opaque custom
ops: the delta rule and the causal convolution (functions of the modeling module), attention and
experts (registries made for it). Everything else stays ATen, for the passes to match.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from q35c.config import ModelConfig
from q35c.frontend.hf_config import hf_text_config

IMPLEMENTATION = "q35c"
_EXAMPLE_TOKENS = 96
_MAX_TOKENS = 1 << 20
_lock = threading.Lock()


@torch.library.custom_op("q35c::delta_rule", mutates_args=())
def delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Stand for HF's chunked gated delta rule with l2-normalised q and k, from an empty state."""
    raise NotImplementedError("only traced")


@torch.library.custom_op("q35c::causal_conv", mutates_args=())
def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Stand for a depthwise causal convolution of x [1, C, T] by weight [C, K]."""
    raise NotImplementedError("only traced")


@torch.library.custom_op("q35c::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Stand for causal attention of [1, H, T, D] tensors; the result is [1, T, H, D]."""
    raise NotImplementedError("only traced")


@torch.library.custom_op("q35c::experts", mutates_args=())
def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Stand for the weighted sum of each token's experts."""
    raise NotImplementedError("only traced")


delta_rule.register_fake(lambda query, key, value, g, beta: torch.empty_like(value))
causal_conv.register_fake(lambda x, weight: torch.empty_like(x))
attention.register_fake(lambda query, key, value, scale: torch.empty_like(query.transpose(1, 2)))
experts.register_fake(lambda x, ids, weights, gate_up, down: torch.empty_like(x))


def trace_model(config: ModelConfig) -> ExportedProgram:
    """Export the causal language model: (tokens i64 [1, S], positions i64 [3, 1, S]) -> logits.

    Parameters are on the meta device, so this takes no weight memory; S is symbolic. The rotary
    frequencies are the only real data in the program. The rotary scaling is folded in as a number.
    """
    with _lock, composites(modeling_module(config)), torch.no_grad():
        model = _Logits(_meta_model(config)).eval()
        tokens = torch.zeros((1, _EXAMPLE_TOKENS), dtype=torch.long, device="meta")
        positions = torch.zeros((3, 1, _EXAMPLE_TOKENS), dtype=torch.long, device="meta")
        length = Dim("S", min=2, max=_MAX_TOKENS)
        return torch.export.export(
            model, (tokens, positions), dynamic_shapes=({1: length}, {2: length}), strict=False
        )


def modeling_module(config: ModelConfig) -> ModuleType:
    """Return transformers' module that defines this model."""
    kind = config.model_type
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def hf_config(config: ModelConfig, attention_implementation: str = "eager") -> Any:
    """Return transformers' text config object for a checked configuration."""
    name = "Qwen3_5MoeTextConfig" if config.is_moe else "Qwen3_5TextConfig"
    made = getattr(modeling_module(config), name)(**hf_text_config(config))
    made._attn_implementation = attention_implementation
    return made


def causal_lm_class(config: ModelConfig) -> Any:
    """Return transformers' causal language model class."""
    name = "Qwen3_5MoeForCausalLM" if config.is_moe else "Qwen3_5ForCausalLM"
    return getattr(modeling_module(config), name)


class _Logits(torch.nn.Module):
    """Give the model the signature that is traced."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(tokens, position_ids=positions, use_cache=False).logits


def _meta_model(config: ModelConfig) -> torch.nn.Module:
    """Build the model in float32 without memory; only its rotary frequencies are real."""
    settings = hf_config(config, IMPLEMENTATION)
    settings._experts_implementation = IMPLEMENTATION
    with torch.device("meta"):
        model = causal_lm_class(config)(settings).float()
    rotary = type(model.model.rotary_emb)(settings)
    model.model.rotary_emb.inv_freq = torch.nn.Buffer(rotary.inv_freq, persistent=False)
    return model


@contextmanager
def composites(module: ModuleType) -> Iterator[None]:
    """Route the four composites of one modeling module to the custom ops, for this thread only.

    Other threads that run the same module meanwhile get the original functions; afterwards
    everything is as it was.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    replaced = {
        "torch_chunk_gated_delta_rule": _delta_rule_function,
        "causal_conv1d_fn": _causal_conv_function,
    }
    originals = {name: getattr(module, name) for name in replaced}
    owner = threading.get_ident()
    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = _attention_function
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _experts_function
    for name, function in replaced.items():
        setattr(module, name, _only_in(owner, function, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]


def _only_in(owner: int, function: Callable[..., Any], original: Callable[..., Any]) -> Any:
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == owner else original)(*args, **kwargs)

    return choose


def _delta_rule_function(query, key, value, g=None, beta=None, **options):
    if not options.get("use_qk_l2norm_in_kernel") or options.get("initial_state") is not None:
        raise NotImplementedError("delta rule without l2norm or with a state")
    return delta_rule(query, key, value, g, beta), None


def _causal_conv_function(x, weight, bias=None, activation=None, **options):
    if bias is not None or activation != "silu":
        raise NotImplementedError("causal conv with a bias or without SiLU")
    return torch.nn.functional.silu(causal_conv(x, weight))


def _attention_function(module, query, key, value, mask, scaling=None, **options):
    if mask is not None or options.get("sliding_window") is not None:
        raise NotImplementedError("attention with an explicit mask")
    return attention(query, key, value, scaling), None


def _experts_function(module, x, ids, weights):
    return experts(x, ids, weights, module.gate_up_proj, module.down_proj)
