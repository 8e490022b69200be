"""Print the weight bytes that decoding one token reads from a peer's model file.

    python -m peer.weight_bytes model.gguf --routed 0.03125
    python -m peer.weight_bytes ort-directory

Experts count by the routed share; an embedding that is only looked up does not count, one that is also
the head does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_LOOKUPS = ("Gather", "GatherBlockQuantized")


def gguf_bytes(path: Path, routed: float) -> tuple[float, dict[str, float]]:
    """Return the bytes a token reads, and the bytes of each type in the file."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    has_head = any(tensor.name == "output.weight" for tensor in tensors)
    total, types = 0.0, dict[str, float]()
    for tensor in tensors:
        share = routed if "_exps." in tensor.name else 1.0
        is_lookup = tensor.name == "token_embd.weight" and has_head
        total += 0.0 if is_lookup else share * int(tensor.n_bytes)
        kind = tensor.tensor_type.name
        types[kind] = types.get(kind, 0.0) + int(tensor.n_bytes)
    return total, types


def onnx_bytes(directory: Path) -> tuple[float, dict[str, float]]:
    """Return the same of an ONNX model; the tables of cosines are looked up too."""
    import onnx

    graph: Any = onnx.load(directory / "model.onnx", load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    total, types = 0.0, dict[str, float]()
    for tensor in graph.initializer:
        size = _tensor_bytes(tensor)
        is_lookup = "cos_cache" in tensor.name or "sin_cache" in tensor.name
        is_lookup |= readers.get(tensor.name, set()) <= set(_LOOKUPS)
        total += 0.0 if is_lookup else size
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        types[kind] = types.get(kind, 0.0) + size
    return total, types


def _tensor_bytes(tensor: Any) -> float:
    import onnx

    count = 1
    for size in tensor.dims:
        count *= size
    bits = {"UINT4": 4, "INT4": 4, "INT64": 64, "FLOAT": 32, "FLOAT16": 16, "INT32": 32}
    return count * bits.get(onnx.TensorProto.DataType.Name(tensor.data_type), 8) / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--routed", type=float, default=1.0, help="share of the experts chosen")
    options = parser.parse_args()
    is_onnx = options.model.is_dir()
    total, types = (
        onnx_bytes(options.model) if is_onnx else gguf_bytes(options.model, options.routed)
    )
    print(json.dumps({"token_bytes": total, "type_bytes": types}))


if __name__ == "__main__":
    main()
