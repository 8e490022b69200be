"""Tracing: every size of the family, and nothing left behind in transformers."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from q35c.config import LINEAR, ModelConfig
from q35c.frontend import family
from q35c.frontend.hf_config import read_hf_config
from q35c.frontend.importer import import_program
from q35c.frontend.tensors import expected_tensors
from q35c.frontend.trace import composites, modeling_module, trace_model
from tests.compiled import graph_of
from tests.models import config_document, eager_model, eager_model_logits, write_checkpoint

PATCHED = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")


@pytest.mark.parametrize("name", family.names())
def test_every_size_traces(name: str) -> None:
    full = family.load(name)
    config = replace(full, num_hidden_layers=4, layer_types=full.layer_types[:4])
    graph = graph_of(config)
    weights = {value.name: value.type.shape for value in graph.leaves("weight")}
    assert weights == expected_tensors(config)
    kinds = [op.kind for op in graph.ops]
    assert kinds.count("delta_rule") == kinds.count("causal_conv") == 3
    assert kinds.count("attention") == 1
    assert kinds.count("experts") == kinds.count("topk") == (4 if config.is_moe else 0)
    assert [str(value.type) for value in graph.inputs] == ["i32[T]", "i32[3, T]"]
    assert [str(value.type) for value in graph.outputs] == ["f32[T, 248320]"]


def tiny(kind: str, **overrides) -> ModelConfig:
    return read_hf_config(config_document(kind, num_hidden_layers=1, **overrides))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_weights_take_no_memory(kind: str) -> None:
    assert all(tensor.is_meta for tensor in trace_model(tiny(kind)).state_dict.values())


def attention_registries() -> tuple[set[str], set[str]]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return set(ALL_ATTENTION_FUNCTIONS), set(ALL_EXPERTS_FUNCTIONS)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_transformers_is_left_as_it_was(kind: str) -> None:
    config = tiny(kind)
    module = modeling_module(config)
    before = [getattr(module, name) for name in PATCHED], attention_registries()
    trace_model(config)
    assert ([getattr(module, name) for name in PATCHED], attention_registries()) == before


def test_transformers_is_left_as_it_was_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("dense")
    module = modeling_module(config)
    before = [getattr(module, name) for name in PATCHED], attention_registries()

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no export today")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(RuntimeError, match="today"):
        trace_model(config)
    assert ([getattr(module, name) for name in PATCHED], attention_registries()) == before


def test_other_threads_keep_the_original_functions(tmp_path) -> None:
    """An eager model that runs beside a trace must not meet the opaque ops."""
    model = eager_model(write_checkpoint(tmp_path, "dense", num_hidden_layers=1))
    ids = np.arange(7)
    expected = eager_model_logits(model, ids)
    results: list[np.ndarray] = []
    with composites(modeling_module(tiny("dense"))):
        thread = threading.Thread(target=lambda: results.append(eager_model_logits(model, ids)))
        thread.start()
        thread.join()
        with pytest.raises(NotImplementedError, match="only traced"):
            eager_model_logits(model, ids)
    np.testing.assert_array_equal(results[0], expected)
    np.testing.assert_array_equal(eager_model_logits(model, ids), expected)


def test_tied_weights_share_one_name() -> None:
    graph = import_program(trace_model(tiny("dense", tie_word_embeddings=True)))
    readers = [
        op.kind for op in graph.ops if any(v.name == "embed_tokens.weight" for v in op.operands)
    ]
    assert readers == ["embedding", "linear"]
    assert "lm_head.weight" not in {value.name for value in graph.leaves("weight")}


def test_rotary_frequencies_are_real_numbers() -> None:
    config = tiny("dense", layer_types=["full_attention"], full_attention_interval=None)
    assert LINEAR not in config.layer_types
    graph = import_program(trace_model(config))
    (constant,) = [op for op in graph.ops if op.kind == "constant"]
    expected = 1e4 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(constant.attrs["values"], expected, rtol=1e-6)
