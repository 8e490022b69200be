"""The tensors of a model's towers: canonical names, shapes, and the names they are stored under."""

import math
import re

from q35c.config import LINEAR, ModelConfig
from q35c.vision_config import MERGE, VisionConfig

Shape = tuple[int, ...]

# What wrappers put before a name, once or several times; canonical names have none of it.
_WRAPPERS = re.compile(r"(?:model\.|language_model\.)*")
# Other towers, and the draft layer for speculation: never read.
IGNORED_PREFIXES = ("vision_tower.", "mtp.")
TOWER_PREFIX = "visual."  # of the vision tower, which is read where it is asked for


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every tensor that the text tower has, by canonical name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (vocab, hidden)}
    for layer, kind in enumerate(config.layer_types):
        mixer = _linear_attention(config) if kind == LINEAR else _full_attention(config)
        feed_forward = _experts(config) if config.is_moe else _dense(config, "mlp")
        norms = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        for name, shape in (norms | mixer | feed_forward).items():
            shapes[f"layers.{layer}.{name}"] = shape
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def expected_tower_tensors(config: VisionConfig) -> dict[str, Shape]:
    """Return the shape of every tensor that a vision tower has, by canonical name.

    The kernel of the patches' convolution, which is as large as its input, is a matrix.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    merged = MERGE**2 * hidden
    norms = {f"norm{number}.{leaf}": (hidden,) for number in (1, 2) for leaf in ("weight", "bias")}
    block = norms | _biased("attn.qkv", 3 * hidden, hidden) | _biased("attn.proj", hidden, hidden)
    block |= _biased("mlp.linear_fc1", inner, hidden) | _biased("mlp.linear_fc2", hidden, inner)
    shapes = _biased("patch_embed.proj", hidden, config.patch_bytes)
    shapes["pos_embed.weight"] = (config.num_position_embeddings, hidden)
    for number in range(config.depth):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    shapes |= {"merger.norm.weight": (hidden,), "merger.norm.bias": (hidden,)}
    shapes |= _biased("merger.linear_fc1", merged, merged)
    shapes |= _biased("merger.linear_fc2", config.out_hidden_size, merged)
    return {TOWER_PREFIX + name: shape for name, shape in shapes.items()}


def _biased(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def stored_shape(name: str, shape: Shape) -> Shape:
    """Return a tensor's shape as the model is computed with, which may have fewer axes than what is stored."""
    is_kernel = name == f"{TOWER_PREFIX}patch_embed.proj.weight" and len(shape) == 5
    return (shape[0], math.prod(shape[1:])) if is_kernel else shape


def _linear_attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    channels = 2 * keys + values
    return {
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (channels, 1, config.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _full_attention(config: ModelConfig) -> dict[str, Shape]:
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    return {
        "self_attn.q_proj.weight": (2 * queries, hidden),  # per head: query, then gate
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
        "self_attn.o_proj.weight": (hidden, queries),
    }


def _dense(config: ModelConfig, prefix: str, width: int | None = None) -> dict[str, Shape]:
    hidden, width = config.hidden_size, width or config.intermediate_size
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def _experts(config: ModelConfig) -> dict[str, Shape]:
    hidden, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    return {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),  # gate rows first
        "mlp.experts.down_proj": (experts, hidden, width),
        **_dense(config, "mlp.shared_expert", config.shared_expert_intermediate_size),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }


def canonical_name(stored: str, *, with_tower: bool = False) -> str | None:
    """Return the canonical name of a stored tensor, or None for one that is not read.

    A name of another model keeps what is left of it; the caller compares with what it expects.
    """
    name = _WRAPPERS.sub("", stored, count=1)
    is_ignored = name.startswith(IGNORED_PREFIXES)
    is_ignored |= name.startswith(TOWER_PREFIX) and not with_tower
    return None if is_ignored else name


def parts_of(name: str, shape: Shape) -> list[dict[str, Shape]]:
    """Return, per row of axis 0, the tensors that a stacked expert tensor may be stored as.

    Hugging Face saves experts one by one, original checkpoints stack them. Empty where `name` is
    not an expert tensor. Concatenating one row's parts on axis 0 gives that row.
    """
    stem, _, leaf = name.rpartition(".")
    if not stem.endswith(".experts"):
        return []
    if leaf == "down_proj":
        return [{f"{stem}.{e}.down_proj.weight": shape[1:]} for e in range(shape[0])]
    half = (shape[1] // 2, shape[2])
    return [
        {f"{stem}.{e}.gate_proj.weight": half, f"{stem}.{e}.up_proj.weight": half}
        for e in range(shape[0])
    ]
