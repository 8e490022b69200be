"""The fake model as a CUDA artifact, with kernels written for the emulated driver's host machine."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from q35c.artifact import Manifest
from q35c.artifact.entries import EntrySpec
from tests.cuda.emulated import HERE, shared_object
from tests.fake_artifact import (
    BATCH,
    CHAT_TEMPLATE,
    CONTEXT,
    VOCAB,
    entry_specs,
    manifest_fields,
    numbers,
    tokenizer,
    write_fake,
)

_ONE = {"count": 1, "times": 0, "over": 1}
_LOGITS = {"count": 1, "times": VOCAB, "over": 64}


@functools.cache
def image(context: int = CONTEXT, batch: int = BATCH) -> bytes:
    """Compile the kernels."""
    defines = [f"-D{name}={value}" for name, value in numbers(context, batch, 2).items()]
    return shared_object([HERE / "fake_kernels.cpp"], defines).read_bytes()


def write_fake_cuda(path: Path, *, architecture: str = "emulated", **changes: Any) -> Manifest:
    """Write the artifact; arguments as of `write_fake`."""
    context = max(changes.get("context", CONTEXT), changes.get("max_context", CONTEXT))
    batch = changes.get("batch", BATCH)
    texts = {"tokenizer": tokenizer(), "chat_template": CHAT_TEMPLATE.encode()}
    segments = {**texts, f"image_{architecture}": image(context, batch)}
    fields = cuda_fields(architecture, context, batch)
    return write_fake(path, with_code=False, segments=segments, **fields, **changes)


def cuda_fields(architecture: str, context: int, batch: int) -> dict[str, Any]:
    """Return the manifest's fields that differ from the fake model's on the CPU."""
    places = numbers(context, batch, 2)
    (cost,) = (kernel["cost"] for kernel in manifest_fields()["kernels"])
    kernels = [{"name": name, "family": name, "parameters": {}, "cost": cost} for name in ("append", "logits")]  # fmt: skip
    specs = entry_specs(batch)
    steps = {spec.name: [0] if spec.logits == "none" else [0, 1] for spec in specs}
    entries = [
        {
            **{name: getattr(spec, name) for name in ("name", "sequences", "tokens", "inputs", "logits")},
            "symbol": spec.name,
            "steps": steps[spec.name],
            "step_weights": [-1, 0][: len(steps[spec.name])],
            "single_row_steps": [1] if spec.logits == "last" else [],
        }
        for spec in specs
    ]  # fmt: skip
    figures = {"registers": 32, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 0}
    data = image(context, batch)
    target = {
        "backend": "cuda",
        "name": "cuda",
        "images": [
            {
                "architecture": architecture,
                "sha256": hashlib.sha256(data).hexdigest(),
                "figures": [] if architecture == "emulated" else [figures, figures],
            }
        ],
        "kernels": [
            # As much shared memory as must be asked for.
            _kernel("append", [_ONE] * 3, 65536, ["pointer"] * 7 + ["i32"] * 2),
            _kernel("logits", [_LOGITS, _ONE, _ONE], 0, ["pointer"] * 5 + ["i64", "i32"]),
        ],
        "programs": [{"launches": _launches(spec, places)} for spec in specs],
    }
    return {"target": target, "kernels": kernels, "entries": entries, "max_threads": 1, "probes": []}  # fmt: skip


def _kernel(name: str, grid: list[Any], shared: int, parameters: list[str]) -> dict[str, Any]:
    symbol = f"{name}_kernel"
    return {"symbol": symbol, "grid": grid, "block": [64, 1, 1], "shared_bytes": shared, "parameters": parameters}  # fmt: skip


def _launches(spec: EntrySpec, places: dict[str, int]) -> list[dict[str, Any]]:
    io = [_argument("io", places[name]) for name in ("TOKENS", "POSITIONS", "SLOTS", "STARTS")]
    noise, rows = _argument("weights", places["NOISE"]), _argument("i32", 1, 1)
    hashes = _argument("arena", 0)
    is_batch = _argument("i32", int(spec.sequences > 1))
    append = [_argument("state", 0), hashes, *io, noise, rows, is_batch]
    if spec.logits == "none":
        return [{"arguments": append}]
    is_last = spec.logits == "last"
    written = [_argument("i64", 0, int(is_last)), _argument("i32", 1) if is_last else rows]
    bigram, logits = _argument("weights", 0), _argument("io", places["LOGITS"])
    return [{"arguments": append}, {"arguments": [bigram, noise, hashes, io[0], logits, *written]}]


def _argument(of: str, start: int, per_row: int = 0) -> dict[str, Any]:
    return {"of": of, "start": start, "per_row": per_row}


def bigrams(seed: int = 0) -> np.ndarray:
    """Return a table of random logits."""
    return np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)).astype(np.float32)
