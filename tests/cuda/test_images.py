"""From CUDA text to images: what is refused before any work, what the compilers say, and the same bytes twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from q35c.codegen.cuda import images
from q35c.codegen.cuda.backend import EVERY
from q35c.codegen.cuda.families import FAMILIES
from q35c.codegen.cuda.text import cuda_text
from q35c.codegen.targets import find_target
from q35c.compile import compile_model
from q35c.errors import OptionError, ToolchainError

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'
ptxas info    : Function properties for a_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 3072 bytes smem, 404 bytes cmem[0]
ptxas info    : Compiling entry function 'b_kernel' for 'sm_80'
ptxas info    : Function properties for b_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_what_ptxas_says() -> None:
    assert images.figures_of(LOG) == {
        "a_kernel": {"registers": 40, "spill_bytes": 8, "stack_bytes": 16, "shared_bytes": 3072},
        "b_kernel": {"registers": 12, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 0},
    }


def test_names_of_targets() -> None:
    assert find_target("cuda").describe()["name"] == "cuda"  # type: ignore[attr-defined]
    assert find_target("cuda:sm_90a").name == "cuda:sm_90a"
    for name in (
        "cuda:sm_75",
        "cuda:emulated",
    ):  # the tests make images of the latter, and nobody else
        with pytest.raises(OptionError, match="unknown target"):
            find_target(name)


def test_without_a_compiler_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setattr(images, "find_wheels", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    images.find_compiler.cache_clear()
    with pytest.raises(ToolchainError, match="no compiler of CUDA") as caught:
        compile_model(tmp_path / "nothing", tmp_path / "m.q35c", target="cuda")
    images.find_compiler.cache_clear()
    assert "q35c[cuda]" in str(caught.value)


needs_compiler = pytest.mark.skipif(
    images.find_wheels() is None and shutil.which("nvcc") is None, reason="needs NVRTC or nvcc"
)


@needs_compiler
@pytest.mark.slow
def test_an_image_is_the_same_twice_and_spills_nothing() -> None:
    shape = {"N": 64, "K": 128, "dtype": "i5g64", "rows": "q8g64", "epilogue": "none", "tile": 8}
    text, launched = cuda_text({"product": FAMILIES["linear"].make(**shape)})
    compiler = images.find_compiler()
    first, second = (images.run_compiler(compiler, text, "sm_80")[0] for _ in range(2))
    assert first == second and first[:4] == b"\x7fELF"
    image = images.make_image(text, "sm_80", [launched["product"].symbol])
    assert image.code == first
    assert image.figures["product_kernel"]["spill_bytes"] == 0


@needs_compiler
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", EVERY)
def test_every_architecture_compiles(architecture: str) -> None:
    norm = FAMILIES["rms_norm"].make(D=64, eps=1e-6, offset=1.0)
    text, launched = cuda_text({"norm": norm})
    assert images.make_image(text, architecture, [launched["norm"].symbol]).figures


@needs_compiler
def test_what_does_not_compile_is_a_typed_error() -> None:
    with pytest.raises(ToolchainError, match="failed"):
        images.run_compiler(images.find_compiler(), "__global__ void f() { g(); }", "sm_80")
