"""The code of a whole model: what it imports and exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from q35c.artifact import read_artifact
from tests.compiled import artifact
from tests.elf import dynamic_symbols


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_only_programs_are_exported_and_only_memory_functions_imported(
    kind: str, tmp_path: Path
) -> None:
    with read_artifact(artifact(kind, "w4")) as opened:
        (tmp_path / "code.so").write_bytes(opened.code())
        manifest = opened.manifest
    imported, exported = dynamic_symbols(tmp_path / "code.so")
    assert imported <= {"memset", "memcpy"}
    programs = [item.symbol for item in (*manifest.entries, *manifest.probes)]
    assert exported == {f"__tvm_ffi_{name}" for name in programs}
