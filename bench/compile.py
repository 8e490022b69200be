"""Time and peak memory of compiling with dummy weights: the 0.8B whole, the 397B with a few layers.

    python bench/compile.py                       # both, bf16
    python bench/compile.py --only qwen3.5-0.8b

Each compilation runs in its own process, so that its peak memory is its own; the artifact is removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {"qwen3.5-0.8b": None, "qwen3.5-397b-a17b": 4}  # layers; None: all


def measure(name: str, layers: int | None, directory: Path) -> dict[str, object]:
    """Compile one shape in this process and return what it cost."""
    from q35c import family
    from q35c.compile import compile_model

    source: str | Path = name
    if layers is not None:
        whole = family.load(name)
        config = dataclasses.replace(
            whole, num_hidden_layers=layers, layer_types=whole.layer_types[:layers]
        )
        source = directory / "shape"
        source.mkdir()
        document = config.to_dict()
        document["model_type"] += "_text"
        document["eos_token_id"] = document.pop("eos_token_ids")
        (source / "config.json").write_text(json.dumps(document))
    report = compile_model(source, directory / "model.q35c", load_format="dummy")
    largest = max_tensor_bytes(source)
    return {
        "model": name,
        "layers": layers or "all",
        "seconds": round(report.seconds, 1),
        "peak_mib": report.peak_bytes >> 20,
        "file_mib": report.bytes >> 20,
        "largest_tensor_f32_mib": largest >> 20,
        "stages": {stage: round(seconds, 1) for stage, seconds in report.stages.items()},
    }


def max_tensor_bytes(source: str | Path) -> int:
    """Return the bytes in f32 of the largest tensor of the checkpoint."""
    from math import prod

    from q35c.frontend.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source, load_format="dummy")
    return max(4 * prod(checkpoint.shape(name)) for name in checkpoint.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory(prefix="q35c-bench-") as directory:
            result = measure(options.child, CASES[options.child], Path(directory))
        print(json.dumps(result))
        return
    for name in [options.only] if options.only else CASES:
        subprocess.run([sys.executable, __file__, "--child", name], check=True)


if __name__ == "__main__":
    main()
