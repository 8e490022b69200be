"""Plant faults, one at a time, in a scratch copy of the tree, and tell which of them its tests find.

    python scripts/plant.py                          # all of them: minutes for each, as kernels are built again
    python scripts/plant.py --only residual --only "scale of"
    python scripts/plant.py --tests e6e40c5          # by the tests of another revision

Exit 1 if one is not found. A test that was made cheaper must still find what it found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CPU = "q35c/codegen/cpu"
# Files of one subject; those that a revision has are run.
PRODUCTS = (
    "rounded_rows", "products", "rounded_products", "embedding", "linear", "bf16", "quantized",
)  # fmt: skip


class Plant(NamedTuple):
    """A line of a file that is replaced, and the files of tests/kernels that should see it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = PRODUCTS


PLANTS = (
    Plant("bf16 rows: the last value is left out", "rows/round_bf16.py",
          "with T.serial(width - whole * isa.lanes) as i:", "with T.serial(width - whole * isa.lanes - 1) as i:"),
    Plant("bf16 rows: NaN is rounded like a number", "rows/round_bf16.py",
          "return T.Select(is_nan, splat_int(0x7FC00000, lanes), nearest)", "return nearest"),
    Plant("bf16 rows: ties are rounded up", "rows/round_bf16.py",
          "splat_int(0x7FFF, lanes) + odd)", "splat_int(0x8000, lanes))"),
    Plant("bf16 rows: no zero behind an odd last value", "rows/round_bf16.py", "T.uint16(0)", "T.uint16(0x3F80)"),
    Plant("int8 rows: a group of zeros divides by zero", "rows/round_int8.py",
          "T.Select(top == T.float32(0), T.float32(0), T.float32(127) / top)", "T.float32(127) / top"),
    Plant("int8 rows: the scale of 128 steps", "rows/round_int8.py", "top * T.float32(1 / 127)", "top * T.float32(1 / 128)"),
    Plant("int8 rows: sums of the last 32 values alone", "rows/round_int8.py",
          "whole = _sum(total[0, ramp(0, L)])", "whole = _sum(total[1, ramp(0, L)])"),
    Plant("products: the residual is dropped", "products/product.py",
          "value = value + operands.r[row, columns]", "pass"),
    Plant("products: gate and up are exchanged", "products/product.py", "gate, up = sums", "up, gate = sums"),
    Plant("products: a narrow last block is written whole", "products/product.py",
          "with T.If(operands.column_block < product.blocks - 1):", "with T.If(operands.column_block < product.blocks):"),
    Plant("f32 tile: no short tile of one row with AVX-512", "../isa/x86.py", "float_rows=(8, 4, 2, 1)", "float_rows=(8, 4, 2)"),
    Plant("f32 tile: an odd last input is left out", "products/float_tile.py",
          "    if matmul.K % 2:\n        words", "    if matmul.K % 4 == 3:\n        words"),
    Plant("bf16 tile: the last pair is left out", "products/pair_tile.py",
          "with T.serial(product.pairs) as pair:", "with T.serial(product.pairs - 1) as pair:"),
    Plant("int8 tile: the row's scale of its first group", "products/integer_tile.py",
          "x[row, rows.scales + group], dtype", "x[row, rows.scales], dtype"),
    Plant("int8 tile: the offset of 8 bits is taken once", "products/integer_tile.py",
          "return start << splat_int(factor.bit_length() - 1, size) if factor > 1 else start", "return start"),
    Plant("int8 tile, AVX2: signs are not moved", "products/integer_tile.py",
          "return word ^ splat_int(_SIGN_BITS, product.isa.lanes) if product.moves_signs else word", "return word"),
    Plant("int8 tile: one row of a shared panel is left out", "products/integer_tile.py",
          "tiles = T.Bind(T.min(count - turn * together, T.int64(together)))",
          "tiles = T.Bind(T.min(count - turn * together, T.int64(together - 1)))"),
    Plant("16-bit sums, no VNNI: a scale of another column", "products/narrow_sums.py",
          "narrow[*at], scales[at[1]])", "narrow[*at], scales[0])"),
    Plant("5 bits without VBMI: the sign of the last part", "products/integer_weights.py",
          "if part < 7 else lines[0], lanes)", "if part < 6 else lines[0], lanes)"),
    Plant("5 bits with VBMI: the fifth bit of part 4 alone", "products/integer_weights.py", "if part != 4:", "if part > 4:"),
    Plant("experts: the last block of each", "experts/products.py", "T.int64(blocks))", "T.int64(blocks - 1))"),
    Plant("experts: the row of another token", "experts/products.py",
          "T.truncdiv(pair(position), pairs_per_row)", "T.truncmod(pair(position), pairs_per_row)"),
    Plant("experts: the weights of those before an idle one", "experts/products.py", "_wide(active[a]) * blocks", "a * blocks"),
    Plant("experts: one pair of each is lost", "experts/products.py",
          "T.Bind(_wide(offsets[a + 1]))", "T.Bind(_wide(offsets[a + 1]) - 1)"),
    Plant("experts: the number of one is wrong", "experts/routing.py",
          "places[ids[p]] = places[ids[p]] + 1\n            used", "places[ids[p]] = 1\n            used"),
    Plant("rounded products: a cut group is never complete", "products/rounded_blocks.py",
          'counter, *counts)) != 0', 'counter, *counts)) > 1'),
    Plant("embedding: one column past an odd row", "linear/embedding.py",
          "with T.If(column + 1 < end), T.Then():", "with T.If(column < end), T.Then():"),
    Plant("embedding: the first level of eight", "linear/embedding.py", "code < first, found", "code <= first, found"),
    Plant("norm: the last column", "rows/norm.py", "for d in T.serial(D - vectors * L):",
          "for d in T.serial(D - vectors * L - 1):", ("norm",)),
    Plant("conv: a row of the state too few", "delta/conv.py",
          "row < self.taps - 1,", "row < self.taps - 2,", ("conv", "gated_delta")),
    Plant("attention: values of the first head", "attention/f32.py",
          "shape.cache.value(base, kv_head, step * STEP)", "shape.cache.value(base, T.int64(0), step * STEP)", ("attention",)),
    Plant("attention: a token does not see itself", "attention/f32.py",
          "1, lanes) <= T.broadcast(last_cell", "1, lanes) < T.broadcast(last_cell", ("attention",)),
)  # fmt: skip


def copy_tree(scratch: Path, tests: str | None) -> None:
    """Copy what tests need; tests themselves from a revision, if one is given."""
    for name in ("q35c", "tests"):
        shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", scratch)
    if tests:
        shutil.rmtree(scratch / "tests")
        archive = subprocess.run(
            ["git", "archive", tests, "tests"], cwd=ROOT, check=True, capture_output=True
        )
        subprocess.run(["tar", "x"], cwd=scratch, input=archive.stdout, check=True)


def run_tests(scratch: Path, names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run those of the files that exist, until the first failure."""
    files = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", "--durations=0", "-p", "no:cacheprovider"]  # fmt: skip
    present = [name for name in files if (scratch / name).exists()]
    environment = {**os.environ, "PYTHONPATH": str(scratch)}
    return subprocess.run(
        [*command, *present], cwd=scratch, env=environment, capture_output=True, text=True
    )


def first_failure(output: str) -> str:
    """Return the name of the test that failed, and the beginning of why."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:160] if lines else "the process ended"


def is_found(plant: Plant, scratch: Path) -> bool:
    """Plant one, run its tests, take it out again; print what happened."""
    path = scratch / CPU / "kernels" / plant.file
    right = path.read_text()
    assert right.count(plant.right) == 1, f"{plant.name}: stands {right.count(plant.right)} times"
    path.write_text(right.replace(plant.right, plant.wrong))
    begin = time.monotonic()
    done = run_tests(scratch, plant.tests)
    path.write_text(right)
    is_seen = done.returncode == 1 or done.returncode < 0  # 0: all passed; above 1: no test ran
    what = first_failure(done.stdout) if done.returncode else "NOT FOUND"
    print(f"{plant.name} | {what} | {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode > 1:
        print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    return is_seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--tests", help="a revision whose tests are taken")
    parser.add_argument("--only", action="append", help="part of the names of the faults to plant")
    arguments = parser.parse_args()
    chosen = [p for p in PLANTS if not arguments.only or any(o in p.name for o in arguments.only)]
    with tempfile.TemporaryDirectory(prefix="q35c-plant-") as directory:
        scratch = Path(directory)
        copy_tree(scratch, arguments.tests)
        found = [is_found(plant, scratch) for plant in chosen]
    print(f"{sum(found)} of {len(found)} found")
    return 0 if found and all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
