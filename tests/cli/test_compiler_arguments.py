"""The functions behind the commands that compile, called with every kind of wrong argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q35c.codegen.targets import find_target
from q35c.compile import compile_model
from q35c.demo import demo_artifact
from q35c.errors import OptionError, Q35CError
from q35c.export.onnx import export_checkpoint
from q35c.frontend.checkpoint import open_checkpoint
from q35c.ir.precision import find_policy
from q35c.verify import verify_artifact
from tests.compiled import checkpoint

WRONG: list[Any] = [
    True, -1, 10**30, 10**5000, 1.5, math.nan, math.inf, "", "absent", "\0", "a\udcff", "x" * 100_000, "x" * 300,
    b"cpu", [], ["cpu"], {}, {"a": 1}, set(), object(), 1j, Decimal(1), np.float32(1), np.bool_(True),
    np.array([1, 2]), iter([1]), ...,
]  # fmt: skip


def compiled(tmp_path: Path, **changes: Any) -> Any:
    options = {"source": checkpoint("dense"), "output": tmp_path / "x.q35c", **changes}
    return compile_model(options.pop("source"), options.pop("output"), **options)


CALLS: dict[str, Callable[[Path, Any], Any]] = {
    **{
        f"compile_model {name}": lambda place, value, name=name: compiled(place, **{name: value})
        for name in ("source", "target", "precision", "kv_dtype", "context", "batch", "load_format", "progress")
    },
    "compile_model seed": lambda place, value: compiled(place, seed=value, load_format="dummy", batch=0),
    "compile_model output": lambda place, value: compiled(place, output=value, batch=0),
    "compile_model dump_ir": lambda place, value: compiled(place, dump_ir=value, batch=0),
    "open_checkpoint": lambda place, value: open_checkpoint(value),
    "export source": lambda place, value: export_checkpoint(value, place / "x.onnx"),
    "export load_format": lambda place, value: export_checkpoint(checkpoint("dense"), place / "x", load_format=value),
    "export progress": lambda place, value: export_checkpoint("absent", place / "x.onnx", progress=value),
    "export output": lambda place, value: export_checkpoint("absent", value),
    "verify artifact": lambda place, value: verify_artifact(value, checkpoint("dense")),
    "verify source": lambda place, value: verify_artifact(place / "absent", value),
    "verify progress": lambda place, value: verify_artifact(place / "x", "absent", progress=value),
    "find_target": lambda place, value: find_target(value),
    "find_policy": lambda place, value: find_policy(value),
    "find_policy cache": lambda place, value: find_policy("w4", value),
    "demo progress": lambda place, value: demo_artifact(value),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_raise_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """None of these values is right for any of these parameters."""
    monkeypatch.chdir(tmp_path)
    for value in WRONG:
        with pytest.raises(Q35CError) as caught:
            CALLS[name](tmp_path, value)
        assert len(str(caught.value)) < 5000
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", "cpu:x86"),
        ("precision", 4),
        ("kv_dtype", None),
        ("context", "4096"),
        ("context", np.float64(64)),
        ("batch", True),
        ("load_format", b"dummy"),
        ("seed", -1),
        ("output", b"x"),
        ("dump_ir", 5),
        ("progress", "yes"),
        ("source", None),
    ],
)
def test_the_error_names_the_argument(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        compiled(tmp_path, **{name: value})
    assert caught.value.where == name
