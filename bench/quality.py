"""Compare what quantization costs in q35c and in llama.cpp: KL to fp32 on a text, and bits a weight.

    python bench/quality.py q35c/demo/model heldout.txt
    python bench/quality.py q35c/demo/model heldout.txt --precision w8,w4 --llama-types Q8_0,Q4_K_M

The text's documents are separated by form feeds; of each the first tokens are read, up to --window. The
oracle is eager PyTorch in float32 on the same checkpoint. llama.cpp gets the same weights as a GGUF file,
and its f32 file tells how much of a difference is arithmetic, not quantization. Where a row of a matrix
is no multiple of a type's block, llama-quantize takes another type: the last column says what it stored.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from peer import sizes
from peer.install import Cache, Unavailable, open_manifest
from tokenizers import Tokenizer

from q35c.cli.text import table_text
from q35c.errors import Q35CError
from q35c.frontend.checkpoint import open_checkpoint
from q35c.ir.precision import POLICIES
from q35c.verify import load_oracle, oracle_logits, row_kl

HEADER = ("system", "mean KL", "99 %", "same first", "bits a weight", "file MB", "stored as")


def read_ids(model: Path, text: Path, documents: int, window: int) -> list[list[int]]:
    """Return the first tokens of the first documents."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    whole = text.read_text().split("\f")[:documents]
    return [tokenizer.encode(document).ids[:window] for document in whole]


def llama_row(
    cache: Cache, model: str, kind: str, ids: Sequence[Sequence[int]], want: np.ndarray
) -> list[str]:
    """Return the row of one GGUF type."""
    path = cache.gguf(model, kind)
    with tempfile.TemporaryDirectory() as directory:
        listed, out = Path(directory) / "ids.json", Path(directory) / "logits.npy"
        listed.write_text(json.dumps(ids))
        cache.llama()
        cache.call(
            "peer.llama_logits", str(path), str(listed), str(out), "--home", str(cache.llama_home)
        )
        got = np.load(out)
    types = cache.ask("peer.weight_bytes", str(path))["type_bytes"]
    assert isinstance(types, dict)
    stored = ", ".join(f"{name} {size / sum(types.values()):.0%}" for name, size in types.items())
    return row(f"llama.cpp {kind}", got, want, sum(types.values()), path, stored, model)


def our_row(path: Path, ids: Sequence[Sequence[int]], want: np.ndarray, model: str) -> list[str]:
    """Return the row of one artifact."""
    import q35c

    with q35c.load(path) as loaded:
        got = np.concatenate([loaded.score(sequence) for sequence in ids])
    manifest = open_manifest(path)
    size = sizes.stored_bytes(manifest)
    return row(f"q35c {manifest.precision}", got, want, size, path, "", model)


def row(
    name: str,
    got: np.ndarray,
    want: np.ndarray,
    size: float,
    path: Path,
    stored: str,
    model: str,
) -> list[str]:
    """Compare logits [S, V] with the oracle's."""
    kl = row_kl(got, want)
    same = float((got.argmax(-1) == want.argmax(-1)).mean())
    checkpoint = open_checkpoint(model)
    weights = sum(math.prod(checkpoint.shape(tensor)) for tensor in checkpoint.names)
    figures = [f"{kl.mean():.5f}", f"{np.quantile(kl, 0.99):.4f}", f"{same:.3f}"]
    return [name, *figures, f"{8 * size / weights:.2f}", f"{path.stat().st_size / 1e6:.2f}", stored]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = os.environ.get("Q35C_PEERS_CACHE", Path.home() / ".cache/q35c-peers")
    add("model", type=Path, help="a checkpoint directory with a tokenizer")
    add("text", type=Path, help="documents separated by form feeds")
    add("--cache", type=Path, default=default, help="as in bench/peers.py; $Q35C_PEERS_CACHE")
    add("--precision", default=",".join(POLICIES), help="q35c's, as a list; empty for none")
    add("--artifact", type=Path, action="append", default=[], help="compare this file of q35c too")
    add("--llama-types", default="f32,bf16,Q8_0,Q4_K_M,Q4_0", help="a list; empty for none")
    add("--documents", type=int, default=12, help="how many [12]")
    add("--window", type=int, default=512, help="tokens of each [512]")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    cache = Cache(Path(options.cache).resolve(), lambda text: print(text, file=sys.stderr))
    model = str(options.model)
    ids = read_ids(options.model, options.text, options.documents, options.window)
    oracle = load_oracle(model)
    want = np.concatenate([oracle_logits(oracle, sequence) for sequence in ids])
    rows: list[list[str]] = []
    for kind in filter(None, options.llama_types.split(",")):
        try:
            rows.append(llama_row(cache, model, kind, ids, want))
        except Unavailable as error:
            print(f"skipped: llama.cpp {kind}: {error}", file=sys.stderr)
    artifacts = list(options.artifact)
    for precision in filter(None, options.precision.split(",")):
        try:
            artifacts.append(cache.artifact(model, precision, options.window))
        except Unavailable as error:
            print(f"skipped: q35c {precision}: {error}", file=sys.stderr)
    for path in artifacts:
        try:
            rows.append(our_row(path, ids, want, model))
        except Q35CError as error:
            print(f"skipped: {path}: {error}", file=sys.stderr)
    print(f"{len(want)} tokens of {len(ids)} documents\n\n{table_text(HEADER, rows)}")


if __name__ == "__main__":
    main()
