"""Keep the calls of kernels that tests make on the machine, with what they take and leave: `pytest -p tests.cuda.recorder`.

The folder is that of Q35C_RECORD. Each call is a file of arrays `before0`, `after0`, and a row of cases.json; each text is kept by
its hash. scripts/gpu_pack.py has them replayed on a device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "Q35C_RECORD"
MOST_CASES = 400


class Recorder:
    """Collect calls of kernels of known texts, each shape of one once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts: dict[Path, str] = {}  # image -> hash of its text
        self.cases: list[dict[str, Any]] = []
        self.seen: set[tuple[Any, ...]] = set()

    def know(self, image: Path, text: str) -> None:
        self.texts[image] = hashlib.sha256(text.encode()).hexdigest()[:16]
        (self.folder / f"{self.texts[image]}.cu").write_text(text)

    def keep(self, call: dict[str, Any], before: Sequence[Any], after: Sequence[Any]) -> None:
        from tests.cuda.machine import Same

        key = (call["text"], call["symbol"], *(getattr(value, "shape", value) for value in before))
        if key in self.seen or len(self.cases) == MOST_CASES:
            return
        self.seen.add(key)
        arrays: dict[str, np.ndarray] = {}
        kinds: list[Any] = []
        for index, (value, result) in enumerate(zip(before, after, strict=True)):
            if isinstance(value, np.ndarray):
                arrays[f"before{index}"], arrays[f"after{index}"] = value, result
            kinds.append("array" if isinstance(value, np.ndarray) else {"same": value.as_argument} if isinstance(value, Same) else int(value))  # fmt: skip
        file = f"{len(self.cases)}.npz"
        np.savez(self.folder / file, **arrays)
        self.cases.append({**call, "file": file, "arguments": kinds})

    def write(self) -> None:
        (self.folder / "cases.json").write_text(json.dumps(self.cases))


_recorders: list[Recorder] = []


def pytest_configure() -> None:
    from tests.cuda.harness import CudaKernels
    from tests.cuda.machine import Machine

    recorder = Recorder(Path(os.environ[FOLDER]))
    _recorders.append(recorder)
    make, run = CudaKernels.__init__, Machine.run

    def making(self: CudaKernels, requests: Any) -> None:
        make(self, requests)
        recorder.know(self.image, self.text)

    def running(self: Machine, image: Path, name: str, grid: Any, block: Any, arguments: Sequence[Any], **options: Any) -> list[str]:  # fmt: skip
        before = [np.array(a) if isinstance(a, np.ndarray) else a for a in arguments]
        findings = run(self, image, name, grid, block, arguments, **options)
        if not findings and image in recorder.texts and options.get("order") == "forward":
            shape = {"grid": list(grid), "block": list(block), "shared": options["shared_bytes"]}
            call = {"text": recorder.texts[image], "symbol": name, **shape}
            recorder.keep(call, before, arguments)
        return findings

    CudaKernels.__init__ = making  # type: ignore[method-assign]
    Machine.run = running  # type: ignore[method-assign]


def pytest_unconfigure() -> None:
    for recorder in _recorders:
        recorder.write()
