"""Time the vision tower of an artifact on pictures of some sizes, and say what share of the machine's peak its products reach.

    q35c compile qwen3.5-0.8b --load-format dummy --vision -o seeing.q35c
    python bench/pictures.py seeing.q35c --sides 512,1024 --eager float32,bfloat16

Everything is timed in turns, round by round: each system sees a picture once in a round, and the fastest round of each
counts, because other work on a machine makes it slower and never faster. Peaks are those of the artifact's own probes.
With --eager, transformers' tower of the same shape and random weights runs on as many threads; with --kernels, the
time of each family of kernels in the fastest round is listed.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import q35c
from q35c.cli.text import table_text
from q35c.roofline.machine import find_limits, seconds_per_cycle
from q35c.vision_config import VisionConfig


def operations(config: VisionConfig, patches: int) -> float:
    """Return the operations of the tower's products: two for each multiply-add."""
    hidden, inner, merged = config.hidden_size, config.intermediate_size, 4 * config.hidden_size
    block = patches * hidden * (4 * hidden + 2 * inner) + 2 * patches**2 * hidden
    merger = patches // 4 * merged * (merged + config.out_hidden_size)
    return 2.0 * (patches * config.patch_bytes * hidden + config.depth * block + merger)


def eager(config: VisionConfig, kind: str, threads: int) -> Callable[[np.ndarray, tuple[int, int]], Any]:  # fmt: skip
    """Return transformers' tower with random weights, its own attention and so many threads."""
    import torch

    from q35c.frontend.trace_vision import hf_vision_config, vision_module

    torch.set_num_threads(threads)
    settings = hf_vision_config(config)
    settings._attn_implementation = "sdpa"
    dtype = getattr(torch, kind)
    model = vision_module().Qwen3_5VisionModel(settings).to(dtype).eval()

    def run(patches: np.ndarray, grid: tuple[int, int]) -> Any:
        with torch.inference_mode():
            pixels = torch.from_numpy(patches).to(dtype) / 127.5 - 1
            return model(pixels, grid_thw=torch.tensor([[1, *grid]])).pooler_output

    return run


def timed(run: Callable[[np.ndarray, tuple[int, int]], Any], patches: np.ndarray, grid: tuple[int, int]) -> float:  # fmt: skip
    begin = time.perf_counter()
    run(patches, grid)
    return time.perf_counter() - begin


def kernel_times(model: q35c.Model, patches: np.ndarray, grid: tuple[int, int], rounds: int) -> list[list[str]]:  # fmt: skip
    """Return a row for each family: its steps, and their milliseconds in the fastest round."""
    with model.record() as runs:
        for _ in range(rounds):
            model.see(patches, grid)
    fastest = min(runs, key=lambda run: run.seconds)
    period, found = seconds_per_cycle(model), defaultdict(list)
    vision = model.manifest.vision
    for number, cycles in zip(vision.tower.steps, np.diff(fastest.cycles), strict=True):
        kernel = model.manifest.kernels[number]
        shape = " ".join(
            str(kernel.parameters[key]) for key in ("epilogue", "N", "K", "D") if key in kernel.parameters
        )  # fmt: skip
        found[f"{kernel.family} {shape}"].append(cycles * period * 1e3)
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    return [[name, str(len(times)), f"{sum(times):.1f}"] for name, times in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--sides", default="512,1024", help="pixels of square pictures")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", default="", help="types of PyTorch, such as float32,bfloat16")
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    model = q35c.load(options.artifact, threads=options.threads)
    config = model.manifest.vision.config
    limits = find_limits(model)
    systems: dict[str, Any] = {"q35c": model.see}
    systems |= {
        f"PyTorch {kind}": eager(config, kind, model.threads)
        for kind in options.eager.split(",")
        if kind
    }
    rows = []
    for side in map(int, options.sides.split(",")):
        grid = (side // config.patch_size,) * 2
        shape = (grid[0] * grid[1], config.patch_bytes)
        patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        best = dict.fromkeys(systems, float("inf"))
        for _ in range(options.rounds):
            for name, run in systems.items():
                best[name] = min(best[name], timed(run, patches, grid))
        work = operations(config, shape[0])
        for name, seconds in best.items():
            peaks = [f"{work / seconds / peak:.0%}" for peak in (limits.bf16, limits.f32)]
            rows.append([f"{side} x {side}", name, f"{seconds:.3f}", f"{work / seconds / 1e9:.0f}", *peaks])  # fmt: skip
        if options.kernels:
            print(table_text([f"{side} x {side}", "steps", "ms"], kernel_times(model, patches, grid, options.rounds)))  # fmt: skip
    print(table_text(["picture", "system", "seconds", "Gop/s", "of bf16", "of f32"], rows))


if __name__ == "__main__":
    main()
