"""Compile tiny random checkpoints once per test run, shared by all tests that ask for the same one."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import q35c
from q35c.compile import compile_model, import_model
from q35c.config import ModelConfig
from q35c.ir.graph import Graph
from q35c.ir.text import parse_graph, print_graph
from tests.conftest import COMPILED
from tests.models import eager_model, eager_model_logits, write_checkpoint

CONTEXT, BATCH = 4096, 3


def once(path: Path, make: Callable[[], object]) -> Path:
    """Return a path that `make` makes; other workers wait for the first, and use what it made."""
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make()
    return path


@functools.cache
def graph_of(config: ModelConfig) -> Graph:
    """Return the imported trace of a configuration: one worker traces, all read the text."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    path = Path(os.environ[COMPILED]) / f"graph-{digest[:12]}.txt"
    once(path, lambda: path.write_text(print_graph(import_model(config))))
    return parse_graph(path.read_text())


@functools.cache
def checkpoint(kind: str, precision: str = "f32", seed: int = 0, **overrides: Any) -> Path:
    """Return a tiny random checkpoint; bf16 ones are stored in bf16."""
    name = "-".join(
        [kind, precision, str(seed), *(f"{k}={v}" for k, v in sorted(overrides.items()))]
    )
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    path = Path(os.environ[COMPILED]) / f"{kind}-{precision}-{digest}"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Three layers, linear - full - linear: both kinds, and a last layer that is not full attention.
    shape = {"num_hidden_layers": 3, "full_attention_interval": 2, **overrides}
    return once(path, lambda: write_checkpoint(path, kind, seed, dtype=dtype, **shape))


@functools.cache
def artifact(
    kind: str,
    precision: str = "f32",
    seed: int = 0,
    *,
    kv_dtype: str = "auto",
    takes_rows: bool = False,
    **overrides: Any,
) -> Path:
    """Return the compiled artifact of `checkpoint` with the same arguments."""
    source = checkpoint(kind, precision, seed, **overrides)
    output = source.with_name(f"{source.name}.{kv_dtype}{'.rows' * takes_rows}.q35c")
    options = {"precision": precision, "kv_dtype": kv_dtype, "takes_rows": takes_rows}
    options |= {"context": CONTEXT, "batch": BATCH}
    return once(output, lambda: compile_model(source, output, import_graph=graph_of, **options))


@functools.cache
def model(kind: str, precision: str = "f32", seed: int = 0, **overrides: Any) -> q35c.Model:
    """Return the loaded artifact, on up to two threads; `overrides` may hold `kv_dtype` and `takes_rows`."""
    return q35c.load(artifact(kind, precision, seed, **overrides))


@functools.cache
def oracle(kind: str, precision: str = "f32", seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Return eager PyTorch in fp32 on the same checkpoint."""
    return eager_model(checkpoint(kind, precision, seed, **overrides))


def oracle_logits(ids: np.ndarray, *key: Any, **overrides: Any) -> np.ndarray:
    return eager_model_logits(oracle(*key, **overrides), ids)


def random_ids(count: int, vocabulary: int = 307, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)
