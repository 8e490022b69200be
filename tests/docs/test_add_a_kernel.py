"""The kernel that docs/add-a-kernel.md adds: its code, its row and its rule work as they stand there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q35c.codegen.calls import Int, Tokens
from q35c.codegen.cpu.families import FAMILIES, make_kernel
from q35c.codegen.cpu.isa.x86 import V3
from q35c.codegen.requests import Lowering, Shared
from q35c.codegen.schedule import Buffer, View
from q35c.codegen.targets import find_target
from q35c.ir.graph import Attrs, Graph, Op, Value
from q35c.ir.types import SymDim, TensorType
from tests.codegen.test_families import stored
from tests.kernels.harness import assert_close, build_kernels, guard

DOC = Path(__file__).parents[2] / "docs" / "add-a-kernel.md"
HEAD = """
from tvm.script import tirx as T
from tvm.tirx import PrimFunc
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import Family, elementwise
from q35c.codegen.cpu.kernels.vectors import ramp, share, splat
from q35c.codegen.requests import Lowering, width
from q35c.ir.graph import Op
"""


@pytest.fixture
def doc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the document's code as a module, its family in the table."""
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    parts = [
        block
        for block in blocks
        if "def relu" in block or "Family(" in block or "def lower" in block
    ]
    assert len(parts) == 3
    path = tmp_path / "documented.py"
    path.write_text("\n\n".join([HEAD, *parts]))
    spec = importlib.util.spec_from_file_location("documented", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES, "relu", module.RELU)
    return module


def test_the_kernel_does_what_its_head_says(doc: Any) -> None:
    kernel = make_kernel("relu", (("D", 64),), V3)
    assert stored(kernel) == {"y"}
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    y = guard(np.zeros_like(x), poison=True)
    build_kernels({"relu64": kernel}, V3).call("relu64", guard(x), y, 5, 64, 64, threads=2)
    assert_close(y, np.maximum(x, 0))


def test_the_rule_calls_it(doc: Any) -> None:
    x, y = (Value(name, TensorType("f32", (SymDim("T"), 64))) for name in "xy")
    op = Op("relu", (x,), Attrs.of({}), (y,))
    shared = Shared(find_target("cpu:x86-64-v3"), 64, 8, {})
    low = Lowering(Graph("test", "lowered", (), (op,), (y,)), shared, 8)
    low.views[x] = View(Buffer("x", 2048), 64, Tokens())
    doc.lower_relu(low, op)
    (step,) = low.schedule.steps
    assert step.args == (low.views[x], low.views[y], Tokens(), Int(64), Int(64))
    assert (step.reads, step.writes) == ((low.views[x],), (low.views[y],))
