"""The family's real shapes, compiled for a device without weights: what ptxas says, and how many launches a token takes."""

from __future__ import annotations

import functools
import shutil

import pytest

from q35c.codegen.cuda.images import find_wheels
from q35c.codegen.generate import Limits, generate
from q35c.codegen.targets import find_target
from q35c.frontend.checkpoint import open_checkpoint
from q35c.ir.precision import find_policy
from q35c.passes.pipeline import Choices, run_pipeline
from tests.compiled import graph_of

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        find_wheels() is None and shutil.which("nvcc") is None, reason="needs NVRTC or nvcc"
    ),
]
# Launches of a decode step: what was reached, and may not be lost.
LAUNCHES = {
    ("qwen3.5-0.8b", "w4"): 171,
    ("qwen3.5-27b", "w4"): 563,
    ("qwen3.5-27b", "bf16"): 885,
    ("qwen3.5-35b-a3b", "w4"): 403,
    ("qwen3.5-35b-a3b", "bf16"): 403,
}


@pytest.mark.parametrize(("name", "precision"), LAUNCHES)
def test_a_real_shape(name: str, precision: str) -> None:
    config = open_checkpoint(name, "dummy", 0).config
    backend, policy = find_target("cuda:sm_80"), find_policy(precision)
    splits = functools.partial(backend.decode_splits, context=4096)
    module = run_pipeline(graph_of(config), Choices(policy, splits))
    limits = Limits(4096, 4096, 4, config.vocab_size, config.hidden_size)
    made = generate(module, backend, policy, limits, lambda *_: None, lambda _: None)
    (image,) = made.fields["target"]["images"]
    kernels = made.fields["kernels"]
    spilling = [
        kernel["name"]
        for kernel, figures in zip(kernels, image["figures"], strict=True)
        if figures["spill_bytes"]
    ]
    assert spilling == []
    (decode,) = (entry for entry in made.fields["entries"] if entry.name == "decode")
    assert len(decode.steps) <= LAUNCHES[name, precision]
