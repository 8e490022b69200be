"""Measure time and peak memory of compiling family shapes with random weights.

    python bench/compile.py                                    # the 0.8B, and 2 layers of the 397B (28 GiB)
    python bench/compile.py qwen3.5-0.8b
    python bench/compile.py qwen3.5-397b-a17b --layers 4

Each model is compiled in a process of its own, so that its peak is its own; the artifact is removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from q35c.bench import peak_memory
from q35c.cli.text import size_text, table_text
from q35c.frontend import family

DEFAULT_CASES = (("qwen3.5-0.8b", 0), ("qwen3.5-397b-a17b", 2))  # layers; 0: all
COLUMNS = (
    "model",
    "layers",
    "time",
    "artifact",
    "peak memory",
    "largest tensor in f32",
    "stages, s",
)


def measure(name: str, layers: int, directory: Path) -> dict[str, Any]:
    """Compile one shape in this process and return what it cost."""
    from q35c.compile import compile_model
    from q35c.frontend.checkpoint import open_checkpoint

    source = write_shape(name, layers, directory / "shape") if layers else name
    report = compile_model(source, directory / "model.q35c", load_format="dummy")
    checkpoint = open_checkpoint(source, load_format="dummy")
    largest = max(4 * prod(checkpoint.shape(tensor)) for tensor in checkpoint.names)
    return {
        "bytes": report.bytes,
        "seconds": report.seconds,
        "stages": report.stages,
        "peak": peak_memory(),
        "largest": largest,
    }


def write_shape(name: str, layers: int, directory: Path) -> Path:
    """Write the config of a family member cut to its first layers; return its directory."""
    whole = family.load(name)
    config = dataclasses.replace(
        whole, num_hidden_layers=layers, layer_types=whole.layer_types[:layers]
    )
    document = config.to_dict()
    document["model_type"] += "_text"
    document["eos_token_id"] = document.pop("eos_token_ids")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def describe(name: str, layers: int, found: dict[str, Any]) -> list[str]:
    """Return the table row of one measurement."""
    stages: dict[str, float] = found["stages"]
    slowest = sorted(stages, key=lambda stage: -stages[stage])[:3]
    parts = ", ".join(f"{stage} {stages[stage]:.1f}" for stage in slowest)
    sizes = [size_text(found[key]) for key in ("bytes", "peak", "largest")]
    return [name, str(layers or "all"), f"{found['seconds']:.1f} s", *sizes, parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a family name")
    parser.add_argument("--layers", type=int, default=0, help="compile the first layers only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.models) - set(family.names()):
        parser.error(f"no model {min(unknown)!r}; there are {', '.join(family.names())}")
    if options.child:
        with tempfile.TemporaryDirectory(prefix="q35c-bench-") as directory:
            print(json.dumps(measure(options.models[0], options.layers, Path(directory))))
        return
    cases = [(name, options.layers) for name in options.models] or DEFAULT_CASES
    rows: list[list[str]] = []
    for name, layers in cases:
        command = [sys.executable, __file__, "--child", name, "--layers", str(layers)]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows.append(describe(name, layers, json.loads(child.stdout)))
    print(table_text(COLUMNS, rows))


if __name__ == "__main__":
    main()
