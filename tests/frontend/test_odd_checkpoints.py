"""Odd but real checkpoints: what is read, what is refused with a hint, and what is said to be left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from q35c.errors import CheckpointError
from q35c.formats.bf16 import to_bf16
from q35c.formats.registry import largest_value
from q35c.frontend.checkpoint import Checkpoint, open_checkpoint
from q35c.frontend.companions import read_companions
from q35c.verify import load_oracle, oracle_logits
from tests.models import edit_json, multimodal_document, write_checkpoint

SHARD = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "original", "dense", 3)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to make an odd one of."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_tensors(path: Path, change: Callable[[Tensors], Tensors], **metadata: str) -> None:
    tensors = {
        name: tensor.contiguous() for name, tensor in change(load_file(path / SHARD)).items()
    }
    save_file(tensors, path / SHARD, metadata or {"format": "pt"})


def assert_same(path: Path, original: Path, **options: Any) -> Checkpoint:
    got, want = open_checkpoint(path, **options), open_checkpoint(original)
    assert got.names == want.names
    for name in want.names:
        np.testing.assert_array_equal(got.read(name), want.read(name), err_msg=name)
    return got


@pytest.mark.parametrize(
    "name", ["layers.0.linear_attn.A_log", "norm.weight", "embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(model: Path, name: str, value: float) -> None:
    def damage(tensors: Tensors) -> Tensors:
        tensor = tensors[f"model.{name}"]
        tensor[(-1,) * tensor.ndim] = value
        return tensors

    edit_tensors(model, damage)
    checkpoint = open_checkpoint(model)
    place = [size - 1 for size in checkpoint.shape(name)]
    with pytest.raises(CheckpointError, match="finite") as caught:
        checkpoint.read(name, max(0, place[0] - 1))
    assert name in str(caught.value) and str(place) in str(caught.value)
    assert str(model) in str(caught.value)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i4g64"])
def test_the_largest_value_of_each_format(model: Path, dtype: str) -> None:
    limit = largest_value(dtype)
    with np.errstate(over="ignore"):
        above = np.nextafter(np.float32(limit), np.float32(np.inf))
    assert np.isfinite(above) == (dtype != "f32")
    assert (to_bf16(np.array([limit], np.float32)) == 0x7F7F).all() == (dtype == "bf16")

    def set_two(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"][:2] = torch.tensor([float(limit), -float(above)])
        return tensors

    edit_tensors(model, set_two)
    checkpoint = open_checkpoint(model)
    assert checkpoint.read("norm.weight", 0, 1, largest=limit)[0] == np.float32(limit)
    with pytest.raises(CheckpointError, match=r"at \[1\]"):
        checkpoint.read("norm.weight", largest=limit)


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "prefix",
    ["", "language_model.model.", "model.language_model.", "model." + 3 * "language_model."],
)
def test_wrappers_of_names(model: Path, original: Path, prefix: str) -> None:
    edit_tensors(model, renamed(prefix))
    assert_same(model, original)


@pytest.mark.parametrize(
    "name",
    ["visual.x", "model.visual.x", "model.language_model.visual.x", "vision_tower.x", "mtp.fc.weight",
     "model.mtp.fc.weight", "language_model.mtp.fc.weight"],
)  # fmt: skip
def test_other_towers_are_ignored(model: Path, original: Path, name: str) -> None:
    edit_tensors(model, lambda tensors: tensors | {name: torch.zeros(2, dtype=torch.int8)})
    assert_same(model, original)


@pytest.mark.parametrize("placed", ["absent shard", "absent tensor", "not listed"])
def test_an_index_may_err_about_other_towers(model: Path, original: Path, placed: str) -> None:
    names = load_file(model / SHARD)
    mapping = dict.fromkeys(names, SHARD)
    if placed == "not listed":
        edit_tensors(model, lambda tensors: tensors | {"mtp.fc.weight": torch.zeros(1)})
    else:
        mapping["mtp.fc.weight"] = SHARD if placed == "absent tensor" else "model-mtp.safetensors"
    edit_json(model / f"{SHARD}.index.json", weight_map=mapping)
    assert_same(model, original)


def replaced(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def moved_conv(tensors: Tensors) -> Tensors:
    return {
        name: tensor.movedim(2, 1) if name.endswith("conv1d.weight") else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (replaced("in_proj_b.", "in_proj_ba."), "layers.0.linear_attn.in_proj_ba.weight"),
        (replaced("A_log", "_fp32_params.A_log"), "layers.0.linear_attn._fp32_params.A_log"),
        (replaced("lm_head.weight", "mtp.x"), "set tie_word_embeddings to true"),
        (moved_conv, "an MLX conversion"),
        (lambda tensors: tensors | {"score.weight": torch.zeros(2, 64)}, "a classifier"),
        (lambda tensors: {"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, "an adapter"),
        (lambda tensors: tensors | {"model.x.qweight": torch.zeros(1)}, "quantized"),
    ],
)
def test_hints_say_what_is_there(
    model: Path, change: Callable[[Tensors], Tensors], hint: str
) -> None:
    edit_tensors(model, change)
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("m.gguf", "GGUF files are not read"), (SHARD, "the directory that holds it"),
     ("m.q35c", "compiled already"), ("qwen3.5-7b", "qwen3.5-0.8b, qwen3.5-2b")],
)  # fmt: skip
def test_a_path_that_is_no_directory(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(tmp_path / name)


def test_shifted_norms_and_conversions_are_said(model: Path) -> None:
    def shift(tensors: Tensors) -> Tensors:
        return {n: t + 1 if n.endswith("input_layernorm.weight") else t for n, t in tensors.items()}

    edit_tensors(model, shift, format="mlx")
    said = "\n".join(read_companions(open_checkpoint(model)).notes)
    assert "norm weights have a mean of 1.0" in said and "an MLX conversion" in said


@pytest.mark.parametrize("oddity", ["renamed file", "outer tie flag", "names of MLX"])
def test_the_oracle_holds_the_checkpoints_weights(model: Path, original: Path, oddity: str) -> None:
    want = oracle_logits(load_oracle(original), range(9))
    text = json.loads((model / "config.json").read_text())
    if oddity == "renamed file":
        (model / SHARD).rename(model / "finetune.safetensors")
    elif oddity == "names of MLX":
        edit_tensors(model, lambda tensors: {f"language_model.{n}": t for n, t in tensors.items()})
        (model / "config.json").write_text(json.dumps(multimodal_document(text)))
    else:
        document = multimodal_document(text)
        del document["text_config"]["tie_word_embeddings"]
        (model / "config.json").write_text(json.dumps(document))
        edit_tensors(model, renamed("model.language_model."))
    np.testing.assert_allclose(oracle_logits(load_oracle(model), range(9)), want, atol=1e-5)
