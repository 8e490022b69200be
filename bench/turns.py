"""Compare the speed of two source trees, in turns: what else the machine does falls on both.

    python bench/turns.py --base ../before                                 # the demo model, as each tree compiles it
    python bench/turns.py --base ../before --model qwen3.5-0.8b --precision w4
    python bench/turns.py --base ../before --artifact model.q35c           # one file for both: the runtime alone

Each run is a process of its own with its tree first on the path; the tree that begins changes from turn to turn. Printed are
the medians, and the ratio here / base of each turn's pair: its median, and the middle half of all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from q35c.cli.text import table_text
from q35c.frontend import family

HERE = Path(__file__).resolve().parents[1]
COLUMNS = ("test", "base, tok/s", "here, tok/s", "here / base", "middle half")
DEMO = "q35c/demo/model"  # in each tree


def python(tree: Path, *arguments: str) -> str:
    """Run Python with a source tree; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def make(tree: Path, model: str, precision: str, output: Path) -> Path:
    """Compile a model with a tree: the demo, a family member with random weights, or a directory."""
    if model == "demo":
        source = [str(tree / DEMO), "--context", "2048"]
    else:
        source = [model, "--load-format", "dummy"] if model in family.names() else [model]
    python(tree, "-m", "q35c", "compile", *source, "-o", str(output), "--precision", precision)
    return output


def rates(tree: Path, artifact: Path, arguments: list[str]) -> dict[str, float]:
    """Return the tokens per second of each test, in a process of its own."""
    document = json.loads(python(tree, "-m", "q35c", "bench", str(artifact), "--json", *arguments))
    return {test["test"]: test["tokens_per_second"] for test in document["tests"]}


def row_of(test: str, base: list[float], here: list[float]) -> list[str]:
    """Return the table row of one test."""
    ratios = [new / old for new, old in zip(here, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    middle = [f"{statistics.median(found):.1f}" for found in (base, here)]
    return [test, *middle, f"{statistics.median(ratios):.4f}", f"{low:.4f} to {high:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="the other source tree")
    parser.add_argument("--model", default="demo", help="demo, a family name, or a directory")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--artifact", type=Path, help="run this file with both trees")
    parser.add_argument("--turns", type=int, default=9, help="pairs of runs; at least 2")
    parser.add_argument("-p", type=int, default=256, help="tokens of the prefill")
    parser.add_argument("-n", type=int, default=128, help="tokens that are decoded")
    parser.add_argument("-r", type=int, default=3, help="repetitions within a run")
    parser.add_argument("--threads", type=int, help="by default as q35c chooses")
    options = parser.parse_args()
    if options.turns < 2:
        parser.error("a spread needs two turns")
    base = options.base.resolve()
    arguments = [part for name in "pnr" for part in (f"-{name}", str(getattr(options, name)))]
    if options.threads:
        arguments += ["--threads", str(options.threads)]
    with tempfile.TemporaryDirectory(prefix="q35c-bench-") as directory:
        artifacts = {
            tree: options.artifact.resolve()
            if options.artifact
            else make(tree, options.model, options.precision, Path(directory) / f"{number}.q35c")
            for number, tree in enumerate((base, HERE))
        }
        found: dict[Path, dict[str, list[float]]] = {base: {}, HERE: {}}
        for turn in range(options.turns):
            for tree in (base, HERE)[:: 1 if turn % 2 == 0 else -1]:
                for test, rate in rates(tree, artifacts[tree], arguments).items():
                    found[tree].setdefault(test, []).append(rate)
    rows = [row_of(test, found[base][test], found[HERE][test]) for test in found[base]]
    print(table_text(COLUMNS, rows))


if __name__ == "__main__":
    main()
