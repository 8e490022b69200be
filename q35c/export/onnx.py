"""Write a fused graph as an ONNX model: (tokens i32 [T], positions i32 [3, T]) -> logits f32 [T, V].

Of a vision tower: (patches u8 [4 T, bytes], taps i32 [4 T, 4], tap_weights f32 [4 T, 4], places i32 [4 T, 2]) -> embeddings
f32 [T, H] of one picture; `q35c.runtime.grid` makes the last three inputs.

The whole sequence at once, from empty state, in float32, with a dynamic number of tokens (at least one).
For text, all three rows of `positions` are 0, 1, 2, ... ORT and other runtimes need nothing of q35c.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from q35c import arguments
from q35c.errors import DiskRefused, InternalError, LoweringError, OptionError
from q35c.export import picture_lowerings as picture_lowerings  # adds its rows
from q35c.export.lowerings import LOWERINGS
from q35c.export.nodes import Nodes, element_type
from q35c.frontend.checkpoint import Checkpoint, LoadFormat, open_checkpoint
from q35c.frontend.tensors import TOWER_PREFIX
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import size_bytes
from q35c.outputs import PREFIX, check_output, check_space, publish
from q35c.temporary import temporary_folder

Progress = Callable[[str, float], None]  # stage, fraction done
ReadWeight = Callable[[str], np.ndarray]
OPSET = 18
PARTS = ("text", "vision")
INLINE_BYTES = 1_500_000_000  # one protobuf message holds at most 2 GB
DATA_ALIGNMENT = 4096  # pages: runtimes map the data file


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    follow_links: bool = False,
    ignore_config: Collection[str] = (),
    part: str = "text",
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint's text model, or with `part` "vision" its vision tower, as an ONNX model and return its path.

    `source` and `load_format` to `ignore_config` are those of `open_checkpoint`. Raises its errors, OptionError
    for an output that cannot be written, DiskRefused.
    """
    from q35c.passes.pipeline import fuse

    part = arguments.choice("part", part, PARTS, "part of a model")
    report = arguments.callback("progress", progress) or (lambda stage, fraction: None)
    output = arguments.path("output", output)
    check_outputs(output, arguments.path("source", source))
    checkpoint = open_checkpoint(
        source, load_format, seed, follow_links=follow_links, ignore_config=ignore_config,
        vision=part == "vision",
    )  # fmt: skip
    report("trace", 0.0)
    graph = trace_part(checkpoint)
    report("fuse", 0.2)
    graph = fuse(graph)
    return export_onnx(
        graph,
        checkpoint.read,
        output,
        progress=lambda stage, fraction: report(stage, 0.25 + 0.75 * fraction),
    )


def trace_part(checkpoint: Checkpoint) -> Graph:
    """Trace the vision tower if it was asked for, else the text model."""
    from q35c.frontend.importer import import_program
    from q35c.frontend.trace import trace_model
    from q35c.frontend.trace_vision import trace_tower

    if checkpoint.tower is None:
        return import_program(trace_model(checkpoint.config))
    return import_program(trace_tower(checkpoint.tower), "vision", TOWER_PREFIX)


def export_onnx(
    graph: Graph,
    read_weight: ReadWeight,
    path: str | Path,
    external_data: bool = True,
    *,
    inline_bytes: int = INLINE_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a fused graph with its weights; return the path.

    `read_weight(name)` returns one weight in the graph's shape; only one is held at a time. Weights of
    more than `inline_bytes` in all go to a second file, the path plus `.data`; `external_data=False`
    refuses such models with OptionError. Raises LoweringError for an op without an ONNX form.
    """
    path = Path(path)
    check_outputs(path)
    total = sum(size_bytes(weight.type) for weight in graph.leaves("weight"))
    is_external = total > inline_bytes
    if is_external and not external_data:
        raise OptionError(
            "the weights are too large for one ONNX file",
            expected=f"at most {inline_bytes} bytes",
            got=f"{total} bytes",
            hint="allow an external data file",
        )
    check_space(path.parent, total)
    model = lower_graph(graph)
    try:
        with temporary_folder(path.parent, PREFIX, ".staging") as folder:
            place = folder / path.name
            data = folder / data_path(path).name
            tensors = read_tensors(graph, read_weight, total, progress)
            if is_external:
                with data.open("wb") as file:
                    model.graph.initializer.extend(
                        append_data(file, data.name, tensor, array) for tensor, array in tensors
                    )
                    sync(file)
            else:
                model.graph.initializer.extend(
                    numpy_helper.from_array(array, name) for name, array in tensors
                )
            publish_model(model, place, path, [data] if is_external else [])
    except OSError as error:
        raise DiskRefused(f"cannot write: {error.strerror}", where=str(path)) from error
    return path


def check_outputs(path: Path, source: str | Path = "") -> None:
    """Refuse a path where the model or its data file cannot be published. Raises OptionError."""
    inputs = [Path(source)] if source else []
    check_output(path, inputs)
    check_output(data_path(path), inputs)


def data_path(path: Path) -> Path:
    return path.parent / f"{path.name}.data"


def publish_model(model: ModelProto, place: Path, path: Path, beside: list[Path]) -> None:
    """Write the model, check it, and move it to its name after the files it refers to."""
    with place.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        sync(file)
    checker.check_model(str(place), full_check=True)
    for made in (*beside, place):
        publish(made, path.parent / made.name)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- weights ------------------------------------------------------------------------------------


def read_tensors(
    graph: Graph, read_weight: ReadWeight, total: int, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Read the weights one by one as little-endian float32, in order of first use."""
    done = 0
    for weight in graph.leaves("weight"):
        array = np.ascontiguousarray(read_weight(weight.name), "<f4")
        if array.shape != weight.type.shape:
            raise InternalError(
                "a weight does not fit the graph",
                where=str(weight),
                expected=str(weight.type),
                got=array.shape,
            )
        yield weight.name, array
        done += array.nbytes
        if progress is not None:
            progress("write weights", done / total)


def append_data(file: BinaryIO, location: str, name: str, array: np.ndarray) -> TensorProto:
    """Append an array to the data file and return the tensor that refers to it."""
    file.write(bytes(-file.tell() % DATA_ALIGNMENT))
    tensor = TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    fields = {"location": location, "offset": file.tell(), "length": array.nbytes}
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=str(value))
    file.write(array.data)
    return tensor


# --- structure ------------------------------------------------------------------------------------


def lower_graph(graph: Graph) -> ModelProto:
    """Return the model without its weights. Raises LoweringError."""
    nodes = Nodes()
    values = {v: nodes.unique(v.name) for v in (*graph.inputs, *graph.leaves("weight"))}
    for number, op in enumerate(graph.ops):
        if op.kind not in LOWERINGS:
            raise LoweringError(
                f"op {op.kind!r} has no ONNX form",
                where=f"graph {graph.name}, {op.result if len(op.results) == 1 else op.results}",
                expected=sorted(LOWERINGS),
                hint="export a graph of stage fused",
            )
        nodes.scope = scope_of(op, number)
        made = LOWERINGS[op.kind](nodes, op, *(values[v] for v in op.operands))
        values.update(zip(op.results, (made,) if isinstance(made, str) else made, strict=True))
    nodes.scope = ""
    outputs = [
        nodes.add("Identity", values[value], name=output_name(graph, index))
        for index, value in enumerate(graph.outputs)
    ]
    proto = helper.make_graph(
        nodes.nodes,
        graph.name,
        [declare(values[value], value) for value in graph.inputs],
        [declare(name, value) for name, value in zip(outputs, graph.outputs, strict=True)],
        list(nodes.constants.values()),
        doc_string=__doc__,
    )
    opset = helper.make_opsetid("", OPSET)
    version = helper.find_min_ir_version_for([opset])
    return helper.make_model(proto, producer_name="q35c", opset_imports=[opset], ir_version=version)


def scope_of(op: Op, number: int) -> str:
    """Return what names of an op's tensors begin with: where its weights are in the model, and its kind."""
    paths = [v.name.split(".")[:-1] for v in op.operands if v.kind == "weight"]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    place = ".".join(level[0] for level in levels)
    return f"{place}/{op.kind}_{number}" if place else f"{op.kind}_{number}"


def output_name(graph: Graph, index: int) -> str:
    whole = "embeddings" if graph.name == "vision" else "logits"
    return whole if len(graph.outputs) == 1 else f"output_{index}"


def declare(name: str, value: Value):
    """Return the type of a graph input or output; dynamic dims keep their names."""
    dims = [dim if isinstance(dim, int) else str(dim) for dim in value.type.shape]
    return helper.make_tensor_value_info(name, element_type(value.type.dtype, str(value)), dims)
