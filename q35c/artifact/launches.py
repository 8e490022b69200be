"""What a CUDA target's launch tables must agree with: the entries, the kernels, the segments, and the blobs' sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from q35c.artifact.entries import Entry
from q35c.artifact.schema import refuse
from q35c.artifact.target import (
    EMULATED,
    MAX_BLOCK_THREADS,
    MAX_SHARED_BYTES,
    CudaArgument,
    CudaImage,
    CudaLaunch,
    CudaTarget,
)

if TYPE_CHECKING:
    from q35c.artifact.manifest import Manifest


def check_launches(manifest: Manifest, target: CudaTarget) -> None:
    """Compare images, kernels and programs with the rest of the manifest. Raises ArtifactError naming the field."""
    _check_count("$.target.kernels", target.kernels, manifest.kernels)
    _check_count("$.target.programs", target.programs, manifest.entries)
    _check_names("$.target.kernels", [kernel.symbol for kernel in target.kernels])
    _check_names("$.target.images", [image.architecture for image in target.images])
    for index, image in enumerate(target.images):
        _check_image(f"$.target.images[{index}]", image, manifest)
    for index, kernel in enumerate(target.kernels):
        if math.prod(kernel.block) > MAX_BLOCK_THREADS:
            path = f"$.target.kernels[{index}].block"
            raise refuse(path, "too many threads", expected=MAX_BLOCK_THREADS, got=kernel.block)
    places = _Places(manifest, target)
    for index, (program, entry) in enumerate(zip(target.programs, manifest.entries, strict=True)):
        path = f"$.target.programs[{index}].launches"
        _check_count(path, program.launches, entry.steps)
        for number, launch in enumerate(program.launches):
            places.check(f"{path}[{number}].arguments", launch, entry, number)


def _check_image(path: str, image: CudaImage, manifest: Manifest) -> None:
    segment = manifest.segments.get(image.segment)
    if segment is None:
        raise refuse(path, f"segment {image.segment!r} is missing")
    if segment.sha256 != image.sha256:
        raise refuse(
            f"{path}.sha256", "not the segment's", expected=segment.sha256, got=image.sha256
        )
    if image.architecture == EMULATED:
        _check_count(f"{path}.figures", image.figures, ())
        return
    _check_count(f"{path}.figures", image.figures, manifest.kernels)
    assert isinstance(manifest.target, CudaTarget)
    for index, (figures, kernel) in enumerate(
        zip(image.figures, manifest.target.kernels, strict=True)
    ):
        if (size := figures.shared_bytes + kernel.shared_bytes) > MAX_SHARED_BYTES:
            where = f"{path}.figures[{index}].shared_bytes"
            raise refuse(
                where, "with the dynamic ones too many", expected=MAX_SHARED_BYTES, got=size
            )


class _Places:
    """What arguments may be: pointers into the blobs, in calls of any number of tokens."""

    def __init__(self, manifest: Manifest, target: CudaTarget) -> None:
        self.parameters = [kernel.parameters for kernel in target.kernels]
        self.sizes = {
            "weights": manifest.weights_bytes,
            "state": manifest.state.bytes,
            "arena": manifest.arena_bytes,
            "io": manifest.io.bytes,
            "barrier": manifest.barrier_bytes,
        }

    def check(self, path: str, launch: CudaLaunch, entry: Entry, step: int) -> None:
        parameters = self.parameters[entry.steps[step]]
        given = tuple(argument.type for argument in launch.arguments)
        if given != parameters:
            raise refuse(path, "not what the kernel takes", expected=parameters, got=given)
        for index, argument in enumerate(launch.arguments):
            self._check_value(f"{path}[{index}]", argument, entry.rows)

    def _check_value(self, path: str, argument: CudaArgument, rows: int) -> None:
        last = argument.value(rows)
        if argument.type == "i32" and not -(2**31) <= min(argument.start, last) <= last < 2**31:
            raise refuse(path, "number does not fit", expected="i32", got=last)
        if argument.type == "pointer":
            size = self.sizes[argument.of]
            if not 0 <= argument.start <= last < size:
                raise refuse(
                    path, f"outside of {argument.of}", expected=f"0 to {size - 1}", got=last
                )


def _check_count(path: str, got: Sequence[object], things: Sequence[object]) -> None:
    if len(got) != len(things):
        raise refuse(path, "another number of items", expected=len(things), got=len(got))


def _check_names(path: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise refuse(path, "a name is used twice", got=names)
