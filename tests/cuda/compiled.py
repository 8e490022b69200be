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
DEMO = Path(q35c.__file__).parent / "demo/model"


def compile_emulated(
    source: Path, output: Path, *, is_checked: bool = True, **options: Any
) -> None:
    """Compile a checkpoint for the emulated device; what is not checked is four times as fast, or more."""
    MAKERS[EMULATED] = lambda text: build(text, is_checked=is_checked).read_bytes()
    try:
        compile_model(source, output, target="cuda:emulated", **options)
    finally:
        del MAKERS[EMULATED]


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
        compile_emulated(source, output, import_graph=graph_of, **options)

    return once(output, make)


@functools.cache
def demo_artifact(precision: str, *, is_checked: bool = False) -> Path:
    """Return the demo model compiled for the emulated device."""
    name = f"demo-{precision}-{'checked' if is_checked else 'fast'}.cuda.q35c"
    output = Path(os.environ[COMPILED]) / name
    options = {"precision": precision, "context": CONTEXT, "batch": BATCH}

    def make() -> None:
        compile_emulated(DEMO, output, is_checked=is_checked, import_graph=graph_of, **options)

    return once(output, make)


def load_cuda(monkeypatch: pytest.MonkeyPatch, *key: Any, **overrides: Any) -> q35c.Model:
    """Load such a model on the emulated driver over the checking machine."""
    path = cuda_artifact(*key, **overrides)
    monkeypatch.setenv(LIBRARY, str(engine()))
    return q35c.load(path)
