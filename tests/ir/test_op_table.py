"""Each row of the op table: its type rule accepts and refuses, its meaning has the inferred type."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from q35c.errors import VerifyError
from q35c.ir.interpret import run
from q35c.ir.ops import OPS
from q35c.ir.text import parse_graph, print_graph
from tests.ir.examples import FITS, REFUSED, Case, build, draw_arrays, sized

ROOT = Path(__file__).parents[2]
DTYPES = {"f32": np.float32, "i32": np.int32, "i64": np.int64}
BAD = [(kind, example) for kind, examples in REFUSED.items() for example in examples]


def test_every_row_has_examples():
    assert set(FITS) == set(REFUSED) == set(OPS)
    assert all(REFUSED.values())


@pytest.mark.parametrize("kind", OPS)
def test_reference_has_the_inferred_type(kind: str):
    graph = build(kind, FITS[kind])
    inputs, weights, state = draw_arrays(graph, np.random.default_rng(0))
    arrays = run(graph, inputs, weights, state)
    assert len(arrays) == len(graph.outputs)
    for value, array in zip(graph.outputs, arrays, strict=True):
        assert array.shape == sized(value.type)
        assert array.dtype == DTYPES.get(value.type.dtype, np.float32)  # rounded rows: their values
        assert np.isfinite(array).all()


@pytest.mark.parametrize("kind", OPS)
def test_text_round_trips(kind: str):
    graph = build(kind, FITS[kind])
    text = print_graph(graph)
    assert parse_graph(text) == graph
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize(
    ("kind", "example"), BAD, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(BAD)]
)
def test_bad_operands_are_refused(kind: str, example: Case):
    with pytest.raises(VerifyError) as caught:
        build(kind, example)
    assert f"op {kind}(" in str(caught.value)


@pytest.mark.parametrize("kind", OPS)
def test_reference_keeps_float64(kind: str):
    graph = build(kind, FITS[kind])
    if kind in (
        "constant",
        "cast",
        "rotary_table",
        "axial_rotary_table",
        "scale_pixels",
        "rounded_scale_pixels",
    ):  # their dtype does not come from an operand
        return
    inputs, weights, state = (
        {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in group.items()}
        for group in draw_arrays(graph, np.random.default_rng(0))
    )  # fmt: skip
    assert run(graph, inputs, weights, state)[0].dtype == np.float64


@pytest.mark.parametrize(
    ("kind", "macs"),  # with 5 tokens
    {
        "exp": 5 * 8,
        "linear": 5 * 8 * (3 + 5),
        "linear_swiglu": 5 * 8 * (5 + 5),
        "linear_residual": 5 * 8 * 5,
        "linear_bias": 5 * 8 * 5,
        "linear_bias_residual": 5 * 8 * 5,
        "full_attention": 2 * 4 * 5 * 5 * 8,
        "picture_attention": 2 * 2 * 5 * 5 * 4,
        "attention": 4 * 5 * 5 * 8,  # half of the scores, twice: for q k and for p v
        "delta_rule": 5 * 4 * 3 * (4 * 3),  # heads, three products with the state
        "experts": 5 * 2 * (10 * 6 + 6 * 5),
        "sparse_moe": 5 * 2 * (10 * 6 + 6 * 5),
        "sparse_moe_residual": 5 * 2 * (10 * 6 + 6 * 5),
        "quantized_moe_residual": 5 * 2 * (10 * 6 + 6 * 5),
        "folded_moe_residual": 5 * 3 * (10 * 6 + 6 * 5),
        "stateful_gated_delta_net": 5 * 4 * 3 * (4 * 4),
    }.items(),
)
def test_cost_counts_multiply_adds(kind: str, macs: float):
    op = build(kind, FITS[kind]).ops[0]
    assert OPS[kind].macs([sized(v.type) for v in op.operands], op.attrs.to_dict()) == macs


def test_documentation_is_up_to_date():
    script = ROOT / "scripts" / "generate_ir_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "docs" / "ir.md").read_text()
    assert [kind for kind in OPS if f"### `{kind}`" not in text] == []
