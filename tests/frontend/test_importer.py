"""The importer's meaning: imported graphs run by the interpreter equal PyTorch eager."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from q35c.errors import InternalError
from q35c.frontend.checkpoint import open_checkpoint
from q35c.frontend.importer import import_program
from q35c.frontend.trace import trace_model
from q35c.ir.graph import Graph
from q35c.ir.interpret import run
from q35c.ir.text import parse_graph, print_graph
from tests.compiled import graph_of
from tests.models import (
    config_document,
    eager_logits,
    eager_model,
    eager_model_logits,
    write_checkpoint,
)

FULL_ONLY = {"layer_types": ["full_attention"], "full_attention_interval": None}
YARN_ROPE = {
    **config_document()["rope_parameters"],
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
MODELS = {
    "dense": ("dense", {}),
    "moe": ("moe", {"num_hidden_layers": 2, "full_attention_interval": 2, "vocab_size": 131,
                    "eos_token_id": 5}),
    "tied": ("dense", {"num_hidden_layers": 2, "full_attention_interval": 2,
                       "tie_word_embeddings": True}),
    "yarn": ("dense", {"num_hidden_layers": 1, **FULL_ONLY, "rope_parameters": YARN_ROPE}),
    "shapes": ("dense", {
        "num_hidden_layers": 2, "full_attention_interval": 2, "head_dim": 48,
        "num_attention_heads": 3, "num_key_value_heads": 1, "linear_num_value_heads": 6,
        "linear_key_head_dim": 48, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 2,
        "hidden_size": 80, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5,
            "mrope_section": [5, 3, 4]}}),
    "one-head": ("dense", {
        "num_hidden_layers": 2, "full_attention_interval": 2, "num_attention_heads": 1,
        "num_key_value_heads": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 1}),
}  # fmt: skip


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_imported_model_equals_eager(tmp_path: Path, name: str) -> None:
    kind, overrides = MODELS[name]
    path = write_checkpoint(tmp_path, kind, seed=11, **overrides)
    checkpoint, model = open_checkpoint(path), eager_model(path)
    graph = graph_of(checkpoint.config)
    random = np.random.default_rng(0)
    for tokens in (1, 5, 66):
        ids = random.integers(0, checkpoint.config.vocab_size, tokens).astype(np.int32)
        # Three axes that differ, as beside an image; the next test has the plain ones.
        positions = random.integers(0, 500, (3, tokens)).astype(np.int32)
        expected = eager_model_logits(model, ids, positions)
        (logits,) = run(graph, {"tokens": ids, "positions": positions}, checkpoint.read)
        assert relative_error(logits, expected) < 1e-4


def test_plain_text_positions_are_counted_from_zero(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, num_hidden_layers=1, **FULL_ONLY)
    checkpoint = open_checkpoint(path)
    graph = graph_of(checkpoint.config)
    ids = np.arange(100, 120, dtype=np.int32)
    positions = np.tile(np.arange(20, dtype=np.int32), (3, 1))
    (logits,) = run(graph, {"tokens": ids, "positions": positions}, checkpoint.read)
    assert relative_error(logits, eager_logits(path, ids)) < 1e-4


def test_text_form_round_trips(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "moe", num_hidden_layers=1))
    graph = import_program(trace_model(checkpoint.config))
    assert parse_graph(print_graph(graph)) == graph


class Program(torch.nn.Module):
    """A function of positions [3, 1, S] and one weight [8], to be exported."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.linspace(0.1, 0.9, 8))

    def forward(self, positions: Tensor) -> Tensor:
        # [3, 1, S, 8]: the batch axis is in the middle
        return self.function(positions[..., None].float() * self.weight, self.weight)


def imported(program: Program) -> Graph:
    example = torch.zeros((3, 1, 16), dtype=torch.long)
    with torch.no_grad():
        made = export(program, (example,), dynamic_shapes=({2: Dim("S", min=3, max=99)},))
    return import_program(made)


def update_in_order(x: Tensor, w: Tensor) -> Tensor:
    first = x[0]
    first[..., 1:7:2] = x[1][..., 1:7:2]
    first[..., 2:5] = x[2][..., 0:3]
    return torch.cat((first, first * 2), dim=-1)


def divide_in_place(x: Tensor, w: Tensor) -> Tensor:
    values, _ = torch.topk(x[0].exp(), 3, dim=-1)
    values /= values.sum(dim=-1, keepdim=True)
    return values


GOOD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slices updated in place": update_in_order,
    "division in place": divide_in_place,
    "negative bounds": lambda x, w: x[0][..., -3:-1],
    "negative select": lambda x, w: x[-1],
    "select of the last axis": lambda x, w: x[..., 3],
    "select of the batch": lambda x, w: x[:, 0],
    "split": lambda x, w: torch.cat(list(torch.split(x[0], [1, 5, 2], -1))[::-1], -1),
    "chunk": lambda x, w: torch.chunk(x, 2, -1)[1],
    "permute": lambda x, w: x.permute(2, 3, 1, 0),
    "transpose with the batch": lambda x, w: x.transpose(0, 1),
    "merge and part again": lambda x, w: x[0].reshape(-1, 4, 2).reshape(1, -1, 8),
    "batch merged away": lambda x, w: x[0].reshape(-1, 8) * w,
    "unsqueeze and squeeze": lambda x, w: x.unsqueeze(1).squeeze(2),
    "mean without keepdim": lambda x, w: x.mean(-1),
    "sum over the first axis": lambda x, w: x.sum(0),
    "sum with keepdim": lambda x, w: x.sum(-1, keepdim=True) * x,
    "softmax over the first axis": lambda x, w: torch.softmax(x, 0),
    "batched with unbatched": lambda x, w: x * w.reshape(1, 1, 8) + w.reshape(1, 8),
    "batch meets a real axis": lambda x, w: x[0].unsqueeze(2) * w.reshape(1, 1, 8, 1),
    "batch axis as a real axis": lambda x, w: x[:, 0, :, None] + x.transpose(1, 2).mean(-1, True),
    "scalars": lambda x, w: (x * 3 + 2) * 0.5,
    "functions": lambda x, w: torch.sigmoid(x) * torch.nn.functional.silu(-x) + x.cos() * x.sin(),
    "bias": lambda x, w: torch.nn.functional.linear(x, w[None], w[:1]),
    "unbind": lambda x, w: x.unbind(-1)[3] + x.unbind(1)[0][..., 1] + x.unbind(0)[2][..., 0],
    "layer norm": lambda x, w: torch.nn.functional.layer_norm(x, (8,), w, w * 1.0, 1e-3),
    "gelu": lambda x, w: (
        torch.nn.functional.gelu(x, approximate="tanh") + torch.nn.functional.gelu(-x)
    ),
    "cast and back": lambda x, w: x.long().float() + w,
}


@pytest.mark.parametrize("name", GOOD)
def test_small_programs_keep_their_meaning(name: str) -> None:
    program = Program(GOOD[name])
    graph = imported(program)
    for tokens in (1, 2, 7):
        positions = np.random.default_rng(tokens).integers(0, 9, (3, tokens)).astype(np.int32)
        with torch.no_grad():
            expected = program(torch.as_tensor(positions, dtype=torch.long)[:, None]).numpy()
        weights = {"weight": program.weight.detach().numpy()}
        (got,) = run(graph, {"positions": positions}, weights)
        assert got.size == expected.size, "only the batch axis of one may go"
        np.testing.assert_allclose(got.ravel(), expected.ravel(), rtol=1e-5, atol=1e-6)


def read_whole_after_update(x: Tensor, w: Tensor) -> Tensor:
    first = x[0]
    first[..., :4] = x[1][..., :4]
    return first + x.sum(0)


def read_same_index_again(x: Tensor, w: Tensor) -> Tensor:
    first = x[0]
    first[..., :4] = x[1][..., :4]
    return x[0]


def read_an_older_view(x: Tensor, w: Tensor) -> Tensor:
    first = x[0]
    older = first[..., 2:6]
    first[..., :4] = x[1][..., :4]
    return older * 1.0


def read_an_older_reshape(x: Tensor, w: Tensor) -> Tensor:
    flat = x.reshape(3, -1)
    x[..., :4] = x[..., 4:] * 2
    return flat + 1.0


def write_to_a_weight(x: Tensor, w: Tensor) -> Tensor:
    w.view(8)[:4] = 0.5 * w[4:]
    return x * w


def write_through_a_transpose(x: Tensor, w: Tensor) -> Tensor:
    x.transpose(0, 2).copy_(x.transpose(0, 2) * 2)
    return x


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "whole after update": (read_whole_after_update, "after an in-place write"),
    "same index again": (read_same_index_again, "after an in-place write"),
    "older view": (read_an_older_view, "after an in-place write"),
    "older reshape": (read_an_older_reshape, "after an in-place write"),
    "write to a weight": (write_to_a_weight, "in-place write to an input or a weight"),
    "write through a transpose": (write_through_a_transpose, "something else than a slice"),
    "unknown op": (lambda x, w: torch.erf(x), r"no import rule for op aten\.erf\.default"),
    "layer norm of two axes": (
        lambda x, w: torch.nn.functional.layer_norm(x, x.shape[2:]),
        "layer norm",
    ),
    "expand": (lambda x, w: w.expand(3, 1, 1, 8) * x, "expand that repeats data"),
    "token slice": (lambda x, w: x[:, :, 1:], "batch or token axis"),
    "token mean": (lambda x, w: x.mean((2, 3)), "several axes"),
    "smallest": (lambda x, w: torch.topk(x, 2, largest=False)[0], "top-k other than"),
    "alpha": (lambda x, w: torch.add(x, x, alpha=2), "options"),
    "half": (lambda x, w: x.half(), "element type"),
    "scalar division": (lambda x, w: x / 3, "tensor operand"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_reason(name: str) -> None:
    function, message = BAD[name]
    with pytest.raises(InternalError, match=message):
        imported(Program(function))


def test_a_refusal_names_the_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from q35c.frontend import aten_rules

    checkpoint = open_checkpoint(write_checkpoint(tmp_path, num_hidden_layers=1))
    program = trace_model(checkpoint.config)
    monkeypatch.delitem(aten_rules.RULES, "aten.softplus.default")
    with pytest.raises(InternalError) as caught:
        import_program(program)
    assert "layers.0.linear_attn" in str(caught.value) and "aten.softplus" in str(caught.value)
