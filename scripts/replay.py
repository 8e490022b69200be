"""Compile tiny models for every target and compare what comes out with what came out before.

    python scripts/replay.py --save before.txt      # on the commit before
    python scripts/replay.py --check before.txt     # on the commit after: exit 1 if a byte differs

A commit that only moves code gives the same bytes. Each line is a case, with digests of its machine code, of its
manifest without what names the release and hashes the rest, and of its packed weights. `--quick` compiles and
compares a few of the cases. Code is compiled for each target, whatever this machine can run.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from q35c.compile import compile_model, import_model

TARGETS = ("cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:x86-64-v4-vnni", "cpu:x86-64-v4-bf16")
PRECISIONS = ("f32", "bf16", "w8", "w4", "w4-small")
PLAN_MARK = b"\nq35c-plan:"  # behind it stands a digest of the manifest
VOLATILE = ("producer", "segments")

_COMMON: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
    "hidden_act": "silu",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_DENSE = {**_COMMON, "model_type": "qwen3_5_text", "intermediate_size": 112}
MODELS: dict[str, dict[str, Any]] = {
    "dense": _DENSE,
    "moe": {
        **_COMMON,
        "model_type": "qwen3_5_moe_text",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
    },
    # Sizes are no multiples of a block, heads are not powers of two, one key head serves all query heads.
    "odd": {
        **_DENSE,
        "hidden_size": 80,
        "intermediate_size": 176,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 48,
        "linear_conv_kernel_dim": 3,
        "tie_word_embeddings": True,
        "rope_parameters": {**_COMMON["rope_parameters"], "mrope_section": [3, 2, 1]},
    },
}


graph_of = functools.cache(import_model)  # a graph depends on the model's shape alone


class Case(NamedTuple):
    """One compilation."""

    model: str
    precision: str
    target: str
    kv_dtype: str = "auto"

    def __str__(self) -> str:
        return " ".join(self)


CASES = [
    *(Case(m, p, t) for m in MODELS for p in PRECISIONS for t in TARGETS),
    *(Case("dense", "w4", target, "int8") for target in TARGETS),
]
QUICK = [
    Case("moe", "w4-small", TARGETS[0], "int8"),
    Case("dense", "bf16", TARGETS[3]),
    Case("dense", "f32", TARGETS[1]),
    Case("moe", "w4", TARGETS[2]),
]


def replay(case: Case) -> str:
    """Compile a case and return its line: the case, then the digests of code, manifest and weights."""
    with tempfile.TemporaryDirectory(prefix="q35c-replay-") as folder:
        model, output = Path(folder, "model"), Path(folder, "model.q35c")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODELS[case.model]))
        options: dict[str, Any] = {"precision": case.precision, "kv_dtype": case.kv_dtype}
        options |= {"context": 1024, "batch": 3, "load_format": "dummy", "target": case.target}
        compile_model(model, output, import_graph=graph_of, **options)
        parts = read_parts(output)
    return " ".join([str(case), *(f"{name}:{digest(data)}" for name, data in parts.items())])


def read_parts(path: Path) -> dict[str, bytes]:
    """Return code, manifest and weights of an artifact, without what depends on one another."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    manifest = json.loads(header.pop("__metadata__")["q35c"])
    first, last = header.pop("code")["data_offsets"]
    code = data[start + first : start + last].partition(PLAN_MARK)[0]
    kept = {name: value for name, value in manifest.items() if name not in VOLATILE}
    text = json.dumps(kept, sort_keys=True).encode()
    return {"code": code, "manifest": text, "weights": data[start + last :]}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def differences(before: list[str], after: list[str]) -> list[str]:
    """Return a line for each case that is new, gone or different."""
    cases = len(Case._fields)
    old, new = (
        {tuple(line.split()[:cases]): line.split()[cases:] for line in lines}
        for lines in (before, after)
    )
    found: list[str] = []
    for case in sorted(old.keys() | new.keys()):
        if case not in old or case not in new:
            found.append(f"{' '.join(case)}: only {'before' if case in old else 'after'}")
            continue
        changed = [b.partition(":")[0] for a, b in zip(old[case], new[case], strict=True) if a != b]
        if changed:
            found.append(f"{' '.join(case)}: other {', '.join(changed)}")
    return found


def main() -> int:
    """Run the cases; print, save or check their lines."""
    parser = argparse.ArgumentParser(
        description="Compare compiled bytes before and after a change."
    )
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--processes", type=int, default=2)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--save", type=Path, help="write the lines to this file")
    wanted.add_argument("--check", type=Path, help="compare them with this file's")
    arguments = parser.parse_args()
    lines: list[str] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes) as pool:
        for line in pool.imap(replay, QUICK if arguments.quick else CASES):
            print(line, flush=True)
            lines.append(line)
    print("total", digest("\n".join(lines).encode()))
    if arguments.save:
        arguments.save.write_text("".join(f"{line}\n" for line in lines))
    if arguments.check:
        before = arguments.check.read_text().splitlines()
        if arguments.quick:
            before = [
                line for line in before if line.startswith(tuple(f"{case} " for case in QUICK))
            ]
        found = differences(before, lines)
        print("\n".join(found) if found else "identical")
        return bool(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
