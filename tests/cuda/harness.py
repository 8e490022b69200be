"""CUDA kernels on the machine: called by the names of their arguments, in every order of threads and blocks.

    kernels = CudaKernels({"norm": RMS_NORM.row(D=64, eps=1e-6, offset=1.0)})
    y = kernels.run("norm", rows=3, outputs={"y": (3, 64)}, x=x, w=w)["y"]

Every array has a buffer of its exact size, outputs are NaN before, and any finding fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from q35c.codegen.cuda.families import FAMILIES
from q35c.codegen.cuda.text import cuda_text
from tests.cuda.machine import Machine, Same, Traffic, build

_machine: list[Machine] = []
Outputs = Mapping[str, tuple[int, ...] | np.ndarray]
_KERNEL = 'extern "C" __global__'
FEW: tuple[str | int, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Request:
    """A kernel: its family, and what the generator takes."""

    family: str
    parameters: Mapping[str, Any]


def request(family: str, **parameters: Any) -> Request:
    return Request(family, parameters)


def machine() -> Machine:
    if not _machine:
        _machine.append(Machine())
    return _machine[0]


class CudaKernels:
    """Kernels by name, compiled as one text."""

    def __init__(self, requests: Mapping[str, Request]) -> None:
        self.requests = dict(requests)
        made = {name: FAMILIES[one.family].make(**one.parameters) for name, one in requests.items()}
        self.text, self.launched = cuda_text(made)
        self.image = build(self.text)

    def run(
        self, name: str, rows: int, outputs: Outputs, *, orders: tuple[str | int, ...] = FEW, **arguments: Any
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Run a kernel for so many rows in these orders; every order must give the same bits. Returns the outputs.

        An output is a shape of f32, or an array with what it holds before. Strides `ld_x` follow from x. Fails on findings.
        """
        results = []
        for order in orders:
            made = {
                key: np.array(value) if isinstance(value, np.ndarray) else np.full(value, np.nan, np.float32)
                for key, value in outputs.items()
            }  # fmt: skip
            findings = self.find(name, rows, order=order, **arguments, **made)
            assert findings == []
            results.append(made)
        for other in results[1:]:
            for key, value in other.items():
                np.testing.assert_array_equal(_words(value), _words(results[0][key]))
        return results[0]

    def find(
        self, name: str, rows: int, *, order: str | int = "forward", image: Any = None, traffic: dict | None = None, **arguments: Any
    ) -> list[str]:  # fmt: skip
        """Run a kernel once on these arrays, which it changes, and return the findings."""
        one, launched = self.requests[name], self.launched[name]
        family = FAMILIES[one.family]
        given = {"tokens": rows} | _strides(arguments) | arguments
        grid = tuple(extent.blocks(rows) for extent in family.grid(one.parameters))
        written = family.signature(one.parameters).writes
        names = [key for key, _ in launched.parameters]
        values = [
            Same(names.index(value.as_argument), value.kind) if isinstance(value, Same) else value
            for value in (given[key] for key in names)
        ]
        constants = [
            number
            for number, (key, kind) in enumerate(launched.parameters)
            if kind == "pointer" and key not in written and key not in _shared(given)
        ]
        return machine().run(
            image or self.image, launched.symbol, grid, launched.block, values,
            shared_bytes=launched.shared_bytes, order=order, constants=constants,
            traffic=traffic,
        )  # fmt: skip

    def traffic(self, name: str, rows: int, **arguments: Any) -> dict[str, Traffic]:
        """Return what a kernel moves of each argument, and of shared memory as "shared"."""
        found: dict[int, Traffic] = {}
        assert self.find(name, rows, traffic=found, **arguments) == []
        names = [key for key, _ in self.launched[name].parameters]
        return {names[number] if number >= 0 else "shared": one for number, one in found.items()}

    def alone(self, name: str) -> tuple[str, str]:
        """Return the text before all kernels, and the definition of one."""
        start = self.text.rindex(f" {self.launched[name].symbol}(")
        start = self.text.rindex(_KERNEL, 0, start)
        end = self.text.find("\n}\n", start) + 3
        return self.text[: self.text.index(_KERNEL)], self.text[start:end]


BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);")


def without_barriers(kernels: CudaKernels, name: str) -> list[str]:
    """Return the text of a kernel alone once for each of its barriers, without that barrier."""
    before, body = kernels.alone(name)
    places = [match.span() for match in BARRIER.finditer(body)]
    return [before + body[:start] + body[end:] for start, end in places]


def unseen_barriers(kernels: CudaKernels, name: str, rows: int, **arguments: Any) -> int:
    """Return how many barriers of a kernel can be removed one by one without a finding in any of a few orders."""
    texts = without_barriers(kernels, name)
    assert texts, "there is no barrier"
    unseen = 0
    for text in texts:
        image = build(text)
        copies = (
            {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
            for _ in range(3)
        )
        unseen += not any(
            kernels.find(name, rows, order=order, image=image, **values)
            for order, values in zip(("forward", "backward", 1), copies, strict=True)
        )
    return unseen


def _shared(given: Mapping[str, Any]) -> set[str]:
    return {str(value.as_argument) for value in given.values() if isinstance(value, Same)}


def _strides(arguments: Mapping[str, Any]) -> dict[str, int]:
    return {
        f"ld_{key}": value.shape[-1]
        for key, value in arguments.items()
        if isinstance(value, np.ndarray) and value.ndim > 1
    }


def _words(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32) if array.dtype == np.float32 else array
