"""What one token must read and compute, from the model's shape alone."""

from __future__ import annotations

from math import prod

from q35c.artifact.manifest import Manifest
from q35c.config import FULL, LINEAR, ModelConfig
from q35c.frontend.tensors import expected_tensors


def linear_parameters(config: ModelConfig) -> float:
    """Return the weights that one token is multiplied by in the layers' linears, without the head.

    Prefill runs the head for the last token only, so twice this number is a token's operations.
    """
    total = 0.0
    for name, shape in expected_tensors(config).items():
        is_matrix = len(shape) > 1 and name.startswith("layers.") and "conv1d" not in name
        total += prod(shape) * routed_share(config, name) if is_matrix else 0.0
    return total


def routed_share(config: ModelConfig, name: str) -> float:
    """Return the fraction of a tensor that one token needs: of experts only the chosen ones."""
    is_routed = ".experts." in name or "_exps." in name
    return config.num_experts_per_tok / config.num_experts if is_routed else 1.0


def state_bytes(config: ModelConfig) -> int:
    """Return the f32 delta-rule and convolution state of one sequence, which each token reads and writes."""
    heads, dim = config.linear_num_value_heads, config.linear_value_head_dim
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    delta = heads * dim * config.linear_key_head_dim
    conv = (config.linear_conv_kernel_dim - 1) * (2 * keys + heads * dim)
    return 4 * config.layer_types.count(LINEAR) * (delta + conv)


def cache_elements(config: ModelConfig) -> int:
    """Return the keys and values that one position holds in all layers together."""
    return 2 * config.layer_types.count(FULL) * config.num_key_value_heads * config.head_dim


def artifact_token_bytes(manifest: Manifest) -> float:
    """Return the weight bytes that decoding one token reads from an artifact."""
    config = manifest.model
    routed = config.num_experts_per_tok / config.num_experts if config.is_moe else 1.0
    total = 0.0
    for weight in manifest.weights:
        is_lookup = weight.name == "embed_tokens" and not config.tie_word_embeddings
        share = routed if weight.layout.startswith("experts") else 1.0
        total += 0.0 if is_lookup else share * weight.bytes
    return total


def artifact_cache_bytes(manifest: Manifest) -> float:
    """Return the bytes of keys and values that one position holds in an artifact's state."""
    grown = sum(tensor.bytes for tensor in manifest.state.tensors if tensor.growth == "context")
    return grown / manifest.context


def stored_bytes(manifest: Manifest) -> int:
    """Return the bytes of all weights in an artifact."""
    return sum(weight.bytes for weight in manifest.weights)
