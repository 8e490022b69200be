"""Write llama.cpp's logits of given token ids, every position of every sequence.

    python -m peer.llama_logits model.gguf ids.json out.npy --home CACHE/llama.cpp

`ids.json` is a list of lists; the sequences are independent and their rows of logits are stacked. Runs
llama-cpp-python's plain bindings on the libraries that were built for the benchmark.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def load_bindings(home: Path) -> Any:
    """Return the module of C functions, without the package's own start, which needs more wheels."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(home / "build/bin")
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(next(home.glob("llama_cpp_python-*/llama_cpp")))]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def open_context(lib: Any, path: Path, longest: int, threads: int) -> tuple[Any, Any, int]:
    """Return the model, a context for sequences of `longest` tokens, and the vocabulary's size."""
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
    parameters.n_threads = parameters.n_threads_batch = threads
    context = lib.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp makes no context of {longest} tokens for {path}")
    return model, context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))


def sequence_logits(lib: Any, context: Any, vocabulary: int, ids: Sequence[int]) -> np.ndarray:
    """Return f32[tokens, vocabulary] of one sequence from its start."""
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at] = token, at
        batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
    if code := lib.llama_decode(context, batch):
        raise SystemExit(f"llama_decode returned {code}")
    rows = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), vocabulary)).copy()
    lib.llama_batch_free(batch)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--home", type=Path, required=True, help="where llama.cpp was built")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sequences: list[list[int]] = json.loads(options.ids.read_text())
    lib = load_bindings(options.home)
    longest = max(map(len, sequences))
    _, context, vocabulary = open_context(lib, options.model, longest, options.threads)
    rows = [sequence_logits(lib, context, vocabulary, ids) for ids in sequences]
    np.save(options.out, np.concatenate(rows))


if __name__ == "__main__":
    main()
