"""Tiny models for the emulated device: compiled once, loaded through the runtime's own path."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

import q35c
from q35c.artifact.target import EMULATED
from q35c.codegen.cuda.images import MAKERS
from q35c.compile import compile_model
from q35c.runtime.cuda.driver import LIBRARY
from tests.compiled import BATCH, checkpoint, graph_of, once
from tests.conftest import COMPILED
from tests.cuda.machine import build, engine

CONTEXT = 512


def emulated_image(text: str) -> bytes:
    """Return the image of CUDA text for the emulated device."""
    return build(text).read_bytes()


@functools.cache
def cuda_artifact(
    kind: str, precision: str = "f32", *, kv_dtype: str = "auto", **overrides: Any
) -> Path:
    """Return a tiny random model compiled for the emulated device."""
    source = checkpoint(kind, precision, **overrides)
    output = Path(os.environ[COMPILED]) / f"{source.name}.{precision}.{kv_dtype}.cuda.q35c"
    options: dict[str, Any] = {"precision": precision, "kv_dtype": kv_dtype}
    options |= {"context": CONTEXT, "batch": BATCH}

    def make() -> None:
        MAKERS[EMULATED] = emulated_image
        try:
            compile_model(source, output, target="cuda:emulated", import_graph=graph_of, **options)
        finally:
            del MAKERS[EMULATED]

    return once(output, make)


def load_cuda(monkeypatch: pytest.MonkeyPatch, *key: Any, **overrides: Any) -> q35c.Model:
    """Load such a model on the emulated driver over the checking machine."""
    path = cuda_artifact(*key, **overrides)
    monkeypatch.setenv(LIBRARY, str(engine()))
    return q35c.load(path)
