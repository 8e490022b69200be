"""What follows from what in a manifest: everything that other fields imply is recomputed, layouts from their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from q35c.artifact import layout as file_layout
from q35c.artifact.entries import Entry, io_layout
from q35c.artifact.launches import check_launches
from q35c.artifact.schema import encode, refuse
from q35c.artifact.target import CudaTarget
from q35c.artifact.tower import Tower, Vision, tower_io
from q35c.config import FULL, LINEAR, ModelConfig
from q35c.layouts import blobs
from q35c.layouts.cache import CELLS, STATE_DTYPES, CacheLayout, stored_shape
from q35c.layouts.rows import row_words
from q35c.layouts.weights import packed_shape
from q35c.vision_config import MERGE

if TYPE_CHECKING:
    from q35c.artifact.manifest import Manifest


def check_consistent(manifest: Manifest) -> None:
    """Recompute what follows from other fields. Raises ArtifactError naming the field."""
    _check_entries(manifest)
    if manifest.vision is not None:
        _check_vision(manifest.vision, manifest.model)
        _check_tower(manifest.vision, manifest)
    seeing = () if manifest.vision is None else (manifest.vision.tower,)
    steps = max(len(program.steps) for program in (*manifest.entries, *seeing))
    model = manifest.model
    expected_io = io_layout(manifest.entries, model.vocab_size, model.hidden_size, steps)
    _check_equal("$.io", encode(manifest.io), expected_io)
    for form, rows in manifest.row_layouts.items():
        if row_words(rows, form, 1) is None:
            raise refuse(f"$.row_layouts.{form}", "the layout holds no such rows", got=rows)
    _check_state(manifest)
    _check_weights(manifest)
    _check_segments(manifest)
    if isinstance(manifest.target, CudaTarget):
        check_launches(manifest, manifest.target)
    expected_memory = file_layout.memory_plan(
        weights=manifest.weights_bytes,
        state=manifest.state.used_bytes(manifest.max_context, manifest.context),
        arena=manifest.arena_bytes,
        io=manifest.io.bytes,
        batch=manifest.batch,
    )
    _check_equal("$.memory", encode(manifest.memory), expected_memory)
    for token in manifest.generation.stop_ids:
        if token >= manifest.model.vocab_size:
            raise refuse("$.generation.stop_ids", "id is outside the vocabulary", got=token)
    aligned = {"$.arena_bytes": manifest.arena_bytes, "$.barrier_bytes": manifest.barrier_bytes}
    for path, size in aligned.items():
        if size % blobs.ALIGNMENT:
            raise refuse(path, "size is not a multiple of 64", got=size)


def _check_vision(vision: Vision, model: ModelConfig) -> None:
    """Refuse patches that the tower does not read, and a tower of another model."""
    tower, made = vision.config, vision.parameters
    sizes = {
        "patch_size": (tower.patch_size, made.patch_size),
        "temporal_patch_size": (tower.temporal_patch_size, made.temporal_patch_size),
        "merge_size": (MERGE, made.merge_size),
    }
    for name, (read, prepared) in sizes.items():
        _check_equal(f"$.vision.parameters.{name}", prepared, read)
    _check_equal("$.vision.config.out_hidden_size", tower.out_hidden_size, model.hidden_size)
    for name in (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ):
        if (token := getattr(tower, name)) >= model.vocab_size:
            raise refuse(f"$.vision.config.{name}", "id is outside the vocabulary", got=token)


def _check_tower(vision: Vision, manifest: Manifest) -> None:
    """Recompute what a tower's program takes and returns."""
    tower = vision.tower
    _check_equal("$.vision.tower.io", encode(tower.io), tower_io(vision.config, tower.tokens))
    most = vision.parameters.max_tokens
    _check_equal("$.vision.parameters.max_tokens", most, tower.tokens)
    _check_steps("$.vision.tower", tower, manifest)
    text = [number for entry in manifest.entries for number in entry.step_weights]
    if not max(text) < tower.first_weight < len(manifest.weights):
        raise refuse(
            "$.vision.tower.first_weight", "not the first weight behind those of text",
            expected=f"{max(text) + 1} to {len(manifest.weights) - 1}", got=tower.first_weight,
        )  # fmt: skip
    if tower.arena_bytes % blobs.ALIGNMENT:
        raise refuse(
            "$.vision.tower.arena_bytes", "size is not a multiple of 64", got=tower.arena_bytes
        )


def expected_state(
    config: ModelConfig, context: int, layout: CacheLayout
) -> Counter[tuple[str, tuple[int, ...]]]:
    """Return how many state tensors of each layout and shape a model has.

    Per linear-attention layer the conv inputs f32[K-1, C] and the delta state f32[Hv, Dk, Dv]; per
    full-attention layer keys and values in this layout.
    """
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    conv = (config.linear_conv_kernel_dim - 1, 2 * key_heads * key_dim + value_heads * value_dim)
    delta = (value_heads, key_dim, value_dim)
    heads, dim = config.num_key_value_heads, config.head_dim
    keys, values = (
        tuple(stored_shape(kind, heads, dim, context, layout)) for kind in ("keys", "values")
    )
    shapes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for kind in config.layer_types:
        if kind == LINEAR:
            shapes.update([("plain", conv), ("plain", delta)])
        elif kind == FULL:
            shapes.update([(layout, keys), (layout, values)])
    return shapes


def _check_entries(manifest: Manifest) -> None:
    entries = manifest.entries
    _check_unique("$.entries", [entry.name for entry in entries])
    most = max(entry.sequences for entry in entries)
    _check_equal("$.batch", manifest.batch, most)
    text = manifest.text_entries
    # A long text is cut into calls of the one, and a last one of the other.
    if text.none.tokens != text.last.tokens:
        raise refuse(
            "$.entries",
            "calls without logits take another number of tokens",
            expected=text.last.tokens,
            got=text.none.tokens,
        )
    for index, entry in enumerate(entries):
        _check_steps(f"$.entries[{index}]", entry, manifest)


def _check_steps(path: str, entry: Entry | Tower, manifest: Manifest) -> None:
    for name, numbers, things in (
        ("steps", entry.steps, manifest.kernels),
        ("step_weights", entry.step_weights, manifest.weights),
    ):
        _check_equal(f"{path}.{name} length", len(numbers), len(entry.steps))
        if max(numbers) >= len(things):
            raise refuse(f"{path}.{name}", "no such item", expected=len(things), got=max(numbers))


def _check_state(manifest: Manifest) -> None:
    for name, size in (("context", manifest.context), ("max_context", manifest.max_context)):
        if size % CELLS:
            raise refuse(f"$.{name}", f"not a multiple of {CELLS}", got=size)
    if manifest.context > manifest.max_context:
        raise refuse(
            "$.context",
            "more than the largest",
            expected=manifest.max_context,
            got=manifest.context,
        )
    tensors = manifest.state.tensors
    offsets, total = blobs.pack_tensors((tensor.dtype, tensor.shape) for tensor in tensors)
    _check_equal("$.state.tensors offsets", [tensor.offset for tensor in tensors], offsets)
    _check_equal("$.state.bytes", manifest.state.bytes, total)
    _check_unique("$.state.tensors", [tensor.name for tensor in tensors])
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in (known := STATE_DTYPES[tensor.layout]):
            path = f"$.state.tensors[{index}].dtype"
            raise refuse(path, "not what the layout holds", expected=known, got=tensor.dtype)
    caches: set[tuple[CacheLayout, str]] = {
        (tensor.layout, tensor.dtype) for tensor in tensors if tensor.layout != "plain"
    }
    if len(caches) > 1:
        raise refuse("$.state.tensors", "keys and values lie in two ways", got=sorted(caches))
    form: CacheLayout = next(iter(caches))[0] if caches else "cells32"
    found = Counter((tensor.layout, tensor.shape) for tensor in tensors)
    expected = expected_state(manifest.model, manifest.max_context, form)
    _check_equal("$.state.tensors", found, expected)


def _check_weights(manifest: Manifest) -> None:
    weights = manifest.weights
    specs = [(weight.dtype, weight.shape) for weight in weights]
    packed = [packed_shape(weight.layout, weight.format, weight.matrix) for weight in weights]
    _check_equal("$.weights shapes", specs, packed)
    offsets, total = blobs.pack_tensors(specs)
    _check_equal("$.weights offsets", [weight.offset for weight in weights], offsets)
    sizes = [blobs.tensor_bytes(dtype, shape) for dtype, shape in specs]
    _check_equal("$.weights sizes", [weight.bytes for weight in weights], sizes)
    _check_equal("$.weights_bytes", manifest.weights_bytes, total)
    taken = [*manifest.segments, "__metadata__"]  # one table of names in the file's header
    _check_unique("$.weights", [weight.name for weight in weights] + taken)


def _check_segments(manifest: Manifest) -> None:
    for name in ("code", "weights"):
        if name not in manifest.segments:
            raise refuse("$.segments", f"segment {name!r} is missing")
    _check_equal(
        "$.segments.weights.bytes", manifest.segments["weights"].bytes, manifest.weights_bytes
    )


def _check_unique(path: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise refuse(path, "a name is used twice", got=twice[0])


def _check_equal(path: str, got: Any, expected: Any) -> None:
    if got == expected:
        return
    if isinstance(got, list):
        pairs = enumerate(zip(cast(list[Any], got), expected, strict=True))
        index, (got, expected) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        path = f"{path} [{index}]"
    raise refuse(path, "does not follow from the other fields", expected=expected, got=got)
