"""Kernels and programs to what an artifact holds: one CUDA text, an image for each architecture, the launch tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from q35c.artifact.schema import encode
from q35c.artifact.target import CudaArgument, CudaExtent, CudaLaunch, CudaProgram
from q35c.codegen.backend import Built, KernelKey, Program, Progress
from q35c.codegen.calls import Argument, Call, Int, Pointer, Tokens
from q35c.codegen.cuda.families import FAMILIES, make_kernels
from q35c.codegen.cuda.images import Image, make_image
from q35c.codegen.cuda.text import Launched, cuda_text
from q35c.errors import InternalError, LoweringError

if TYPE_CHECKING:
    from q35c.codegen.cuda.backend import CudaBackend

_TRIED_ROWS = (1, 2, 3, 7, 8, 9, 64, 255, 256)  # for which a grid must be what TVM launches


def build(
    backend: CudaBackend,
    kernels: Mapping[KernelKey, str],
    programs: Mapping[str, Program],
    progress: Progress,
) -> Built:
    """Generate the kernels and the launch tables. Raises ToolchainError if an image cannot be compiled."""
    progress("kernels", 0.0)
    text, launched = cuda_text(make_kernels(kernels))
    described = []
    for (family, parameters), name in kernels.items():
        grid = FAMILIES[family].grid(dict(parameters))
        check_grid(name, grid, launched[name])
        described.append(describe_kernel(grid, launched[name]))
    signatures = {
        name: FAMILIES[family].signature(dict(parameters)).arguments
        for (family, parameters), name in kernels.items()
    }
    tables = [
        CudaProgram(
            tuple(launch(call, signatures, launched) for call in calls if isinstance(call, Call))
        )
        for calls in programs.values()
    ]
    images: dict[str, Image] = {}
    for number, architecture in enumerate(backend.architectures):
        progress("machine code", number / len(backend.architectures))
        images[architecture] = make_image(
            text, architecture, [one.symbol for one in launched.values()]
        )
    order = [launched[name].symbol for name in kernels.values()]
    target = {
        **backend.describe(),
        "images": [
            {
                "architecture": name,
                "sha256": hashlib.sha256(image.code).hexdigest(),
                "figures": [image.figures[symbol] for symbol in order] if image.figures else [],
            }
            for name, image in images.items()
        ],
        "kernels": described,
        "programs": encode(tables),
    }
    segments = {f"image_{name}": image.code for name, image in images.items()}
    return Built(text.encode(), [], target, segments)


def describe_kernel(grid: tuple[CudaExtent, ...], launched: Launched) -> dict[str, Any]:
    """Return the manifest's description of how a kernel is launched."""
    return {
        "symbol": launched.symbol,
        "grid": encode(grid),
        "block": list(launched.block),
        "shared_bytes": launched.shared_bytes,
        "parameters": [kind for _, kind in launched.parameters],
    }


def check_grid(name: str, grid: tuple[CudaExtent, ...], launched: Launched) -> None:
    """Compare the grid that a family states with the one that TVM would launch. Raises InternalError."""
    for rows in _TRIED_ROWS:
        said = tuple(extent.blocks(rows) for extent in grid)
        if (wanted := launched.blocks(tokens=rows)) != said:
            raise InternalError("a kernel's grid is not what its family says", where=name, expected=wanted, got=said)  # fmt: skip


def launch(
    call: Call, signatures: Mapping[str, tuple[str, ...]], launched: Mapping[str, Launched]
) -> CudaLaunch:
    """Return a row of a launch table: a call's arguments in the order of the kernel's parameters."""
    names = signatures[call.kernel]
    given = dict(zip(names, call.args, strict=False))  # behind them, the thread's number and count
    return CudaLaunch(
        tuple(
            argument_of(call, given[name], kind) for name, kind in launched[call.kernel].parameters
        )
    )


def argument_of(call: Call, argument: Argument, kind: Any) -> CudaArgument:
    """Return an argument of a launch. Raises LoweringError if it is not of the parameter's type."""
    if isinstance(argument, Pointer) and kind == "pointer":
        per_row = argument.row_bytes if argument.last_row else 0
        return CudaArgument(argument.blob, argument.byte_offset, per_row)
    if isinstance(argument, Tokens) and kind != "pointer":
        return CudaArgument(kind, 1, 1)
    if isinstance(argument, Int) and kind != "pointer":
        return CudaArgument(kind, argument.value, 0)
    raise LoweringError("a call does not fit its kernel", where=call.kernel, expected=kind, got=argument)  # fmt: skip
