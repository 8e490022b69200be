"""Compile tiny random checkpoints once per test run, shared by all tests that ask for the same one."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import q35c
from q35c.compile import compile_model
from tests.models import eager_model, eager_model_logits, write_checkpoint

CONTEXT, BATCH = 4096, 3
_ROOT = Path(tempfile.mkdtemp(prefix="q35c-tests-"))


def clean_up() -> None:
    """Remove every checkpoint and artifact; `conftest.py` calls it when a run ends."""
    shutil.rmtree(_ROOT, ignore_errors=True)


@functools.cache
def checkpoint(kind: str, precision: str = "f32", seed: int = 0, **overrides: Any) -> Path:
    """Return a tiny random checkpoint; bf16 ones are stored in bf16."""
    name = "-".join(
        [kind, precision, str(seed), *(f"{k}={v}" for k, v in sorted(overrides.items()))]
    )
    path = _ROOT / name.replace("/", "_").replace(" ", "")[:180]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Three layers, linear - full - linear: both kinds, and a last layer that is not full attention.
    shape = {"num_hidden_layers": 3, "full_attention_interval": 2, **overrides}
    return write_checkpoint(path, kind, seed, dtype=dtype, **shape)


@functools.cache
def artifact(
    kind: str, precision: str = "f32", seed: int = 0, *, kv_dtype: str = "auto", **overrides: Any
) -> Path:
    """Return the compiled artifact of `checkpoint` with the same arguments."""
    source = checkpoint(kind, precision, seed, **overrides)
    output = source.with_suffix(f".{kv_dtype}.q35c")
    options = {"precision": precision, "kv_dtype": kv_dtype, "context": CONTEXT, "batch": BATCH}
    compile_model(source, output, **options)
    return output


@functools.cache
def model(kind: str, precision: str = "f32", seed: int = 0, **overrides: Any) -> q35c.Model:
    """Return the loaded artifact, on up to two threads; `overrides` may hold `kv_dtype`."""
    return q35c.load(artifact(kind, precision, seed, **overrides))


@functools.cache
def oracle(kind: str, precision: str = "f32", seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Return eager PyTorch in fp32 on the same checkpoint."""
    return eager_model(checkpoint(kind, precision, seed, **overrides))


def oracle_logits(ids: np.ndarray, *key: Any, **overrides: Any) -> np.ndarray:
    return eager_model_logits(oracle(*key, **overrides), ids)


def random_ids(count: int, vocabulary: int = 307, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)
