"""Folders beside an output: those of the dead are removed, those of the living are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from q35c.temporary import sweep_stale, temporary_folder
from tests.export.test_onnx import draw_normal, export_onnx, linear_graph

KILLED = """
import os, signal, sys
from pathlib import Path
from q35c.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1]), ".q35c-", ".staging") as folder:
    (folder / "m.onnx").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_is_swept_by_the_next(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert child.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    graph = linear_graph()
    export_onnx(graph, draw_normal(graph, 1)[1].__getitem__, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_folder_in_use_stays(tmp_path: Path) -> None:
    (tmp_path / ".q35c-other.partial").write_bytes(b"of an artifact writer")
    names = tmp_path, ".q35c-", ".staging"
    with temporary_folder(*names) as first, temporary_folder(*names) as second:
        sweep_stale(*names)
        assert first.is_dir() and second.is_dir() and first != second
    assert os.listdir(tmp_path) == [".q35c-other.partial"]
