"""Pack what a day on a machine with an NVIDIA GPU needs, here where the compiler is: see gpu_day.py.

    python scripts/gpu_pack.py gpu                               # for an H100 or H200, about 15 minutes on two cores
    python scripts/gpu_pack.py gpu --architecture sm_80
    python scripts/gpu_pack.py dry --architecture emulated --shape demo --tests tests/cuda/test_norm_linear.py

Writes a directory of at most some tens of MB: the demo model compiled, and what eager PyTorch says of it; models of the family's
shapes without their weights; calls of kernels with arguments and results, recorded from the tests on the checking machine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from q35c.artifact import layout, read_artifact  # noqa: E402
from q35c.artifact.target import EMULATED  # noqa: E402
from q35c.artifact.writer import complete_manifest  # noqa: E402
from q35c.codegen.cuda.images import MAKERS, make_image  # noqa: E402
from q35c.codegen.generate import generate  # noqa: E402
from q35c.codegen.targets import find_target  # noqa: E402
from q35c.compile import check_limits, compile_model, import_model  # noqa: E402
from q35c.frontend.checkpoint import open_checkpoint  # noqa: E402
from q35c.frontend.companions import read_companions  # noqa: E402
from q35c.ir.precision import find_policy  # noqa: E402
from q35c.layouts import blobs  # noqa: E402
from q35c.passes.pipeline import Choices, run_pipeline  # noqa: E402
from q35c.runtime.tokenizer import Tokenizer  # noqa: E402
from q35c.verify import PARAGRAPH, load_oracle, oracle_logits  # noqa: E402
from tests.cuda.machine import build  # noqa: E402
from tests.cuda.recorder import FOLDER  # noqa: E402

DEMO = ROOT / "q35c/demo/model"
DEMO_PRECISIONS = ("bf16", "w4")  # f32 would take 40 MB
SHAPES = ("qwen3.5-0.8b", "qwen3.5-35b-a3b")
TESTS = ("norm_linear", "tiles", "rows", "mixers", "prologues")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("output", type=Path)
    parser.add_argument("--architecture", default="sm_90a")
    parser.add_argument("--shape", action="append", choices=("demo", "none", *SHAPES), help="default: 0.8B and 35B-A3B")  # fmt: skip
    parser.add_argument("--precision", default="w4", help="of the shapes")
    parser.add_argument("--context", type=int, default=4096, help="of the shapes")
    parser.add_argument("--tests", action="append", help="whose kernels are recorded")
    options = parser.parse_args()
    if options.architecture == EMULATED:
        MAKERS[EMULATED] = lambda text: build(text, is_checked=False).read_bytes()
    options.output.mkdir(parents=True, exist_ok=True)
    target = f"cuda:{options.architecture}"
    pack_demo(options.output, target)
    for shape in options.shape or SHAPES:
        if shape != "none":
            pack_shape(options.output, shape, target, options.precision, options.context)
    tests = options.tests or [str(ROOT / f"tests/cuda/test_{name}.py") for name in TESTS]
    pack_cases(options.output / "cases", tests, options.architecture)
    print(f"{sum(p.stat().st_size for p in options.output.rglob('*')) / 2**20:.1f} MB")


# --- the demo model -------------------------------------------------------------------------------


def pack_demo(output: Path, target: str) -> None:
    """Compile the demo model, and keep what eager PyTorch says of a text."""
    for precision in DEMO_PRECISIONS:
        path = output / f"demo-{precision}.q35c"
        compile_model(DEMO, path, target=target, precision=precision)
    with read_artifact(path) as artifact:
        ids = Tokenizer(artifact.segment("tokenizer")).encode(PARAGRAPH)
    np.savez(output / "demo.npz", ids=ids, logits=oracle_logits(load_oracle(DEMO), ids))


# --- shapes without weights -----------------------------------------------------------------------


def pack_shape(output: Path, name: str, target: str, precision: str, context: int) -> None:
    """Compile a shape and write its file as far as the weights begin."""
    backend, policy = find_target(target), find_policy(precision, "auto")
    source, form = (DEMO, "auto") if name == "demo" else (name, "dummy")
    checkpoint = open_checkpoint(str(source), form)
    companions = read_companions(checkpoint)
    limits = check_limits(checkpoint.config, context, 4)
    module = run_pipeline(
        import_model(checkpoint.config),
        Choices(policy, lambda heads: backend.decode_splits(heads, limits.max_context)),
    )
    made = generate(module, backend, policy, limits, lambda *_: None, lambda _: None)
    fields = {
        **made.fields,
        "model": checkpoint.config.to_dict(),
        "generation": companions.generation,
    }
    head = head_of(fields, {**made.segments, **companions.segments}, made.entries)
    (output / f"{name}.head").write_bytes(head)


def head_of(fields: Mapping[str, Any], segments: Mapping[str, bytes], weights: Sequence[Any]) -> bytes:  # fmt: skip
    """Return a file up to its first weight; the hash of the weights is zero."""
    manifest, segments = complete_manifest(fields, segments, weights)
    text = manifest.to_json()
    digest = hashlib.sha256(text).hexdigest()
    parts = [layout.build_header(text, digest, manifest.segments, manifest.weights)]
    for name in layout.segment_order(segments):
        data = segments[name]
        parts += [data, bytes(blobs.align(len(data)) - len(data))]
    return b"".join(parts)


# --- calls of kernels -----------------------------------------------------------------------------


def pack_cases(folder: Path, tests: Iterable[str], architecture: str) -> None:
    """Run tests of kernels, and keep their calls and the images that serve them."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", "--durations=0", "-p", "tests.cuda.recorder", *tests]  # fmt: skip
    environment = {**os.environ, FOLDER: str(folder), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for text in folder.glob("*.cu"):
        image = make_image(text.read_text(), architecture, [])
        text.with_suffix(".image").write_bytes(image.code)
        text.unlink()


if __name__ == "__main__":
    main()
