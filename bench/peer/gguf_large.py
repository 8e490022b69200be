"""Write a GGUF file of a shape whose float file would not fit the disk, already quantized.

    python -m peer.gguf_large qwen3.5-35b-a3b out.gguf Q4_K_M --quantize BIN/llama-quantize --donor 0.8b.gguf

llama-quantize itself says which type each tensor gets: it is asked, without writing, about a file that
has the right header and otherwise only a hole. Quantized tensors are then filled with blocks of another
file of random weights, over and over: they have the same spread, and only speed is measured with them.
What stays in floats (norms, router, gates) is drawn as for any other file.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peer.gguf_model import begin_file, list_tensors, open_source, stored_size, tensor_type
from q35c.progress import Progress

Kind = gguf.GGMLQuantizationType
_LINE = re.compile(r"\] +(\S+) +- \[.*\], type = +(\w+),.* MiB(?: \((\w+)\))?$")
_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
_DRAWN_VALUES = 1 << 22  # for types that the donor lacks


def planned_types(tool: Path, hollow: Path, kind: str) -> dict[str, Kind]:
    """Return the type that llama-quantize would give each tensor of a file."""
    command = [str(tool), "--dry-run", str(hollow), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Kind] = {}
    for line in (done.stdout + done.stderr).splitlines():
        if match := _LINE.search(line):
            name, now, then = match.groups()
            found[name] = Kind[(then or now).upper()]
    if not set(found.values()) - set(_FLOATS):
        raise ValueError(f"llama-quantize --dry-run named no quantized tensor for {kind}")
    return found


def block_pool(donor: Path, kind: Kind) -> np.ndarray:
    """Return bytes of whole blocks of a type: the donor's, or else drawn and quantized here."""
    tensors: list[Any] = gguf.GGUFReader(donor).tensors
    found = [np.asarray(item.data).reshape(-1) for item in tensors if item.tensor_type == kind]
    if found:
        return np.concatenate(found).view(np.uint8)
    values = np.random.default_rng(0).standard_normal(_DRAWN_VALUES, np.float32) * np.float32(0.02)
    return gguf.quants.quantize(values, kind).view(np.uint8).reshape(-1)


def write_large(source: str, out: Path, kind: str, tool: Path, donor: Path) -> None:
    """Write the model in the types that llama-quantize would choose."""
    checkpoint = open_source(source)
    tensors = list(list_tensors(checkpoint))
    floats = [tensor_type(tensor, Kind.BF16) for tensor in tensors]
    hollow = out.with_suffix(".hollow")
    begin_file(hollow, source, checkpoint.config, tensors, floats).close()
    with open(hollow, "r+b") as file:
        sizes = (stored_size(tensor, now) + 32 for tensor, now in zip(tensors, floats, strict=True))
        file.truncate(hollow.stat().st_size + sum(sizes))
    planned = planned_types(tool, hollow, kind)
    hollow.unlink()
    kinds = [planned[tensor.name] for tensor in tensors]
    pools = {each: block_pool(donor, each) for each in set(kinds) if each not in _FLOATS}
    writer = begin_file(out, source, checkpoint.config, tensors, kinds)
    with Progress() as progress:
        for index, (tensor, each) in enumerate(zip(tensors, kinds, strict=True)):
            progress(f"writing {out.name}", index / len(tensors))
            if each in _FLOATS:
                writer.write_tensor_data(gguf.quants.quantize(tensor.read(), each))
            else:
                # resize repeats the pool from its start; a pool is whole blocks, so all stay whole
                writer.write_tensor_data(np.resize(pools[each], stored_size(tensor, each)))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="a family name")
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", help="a type of llama-quantize, such as Q4_K_M")
    parser.add_argument("--quantize", type=Path, required=True, help="the program llama-quantize")
    parser.add_argument("--donor", type=Path, required=True, help="a GGUF file of that kind")
    options = parser.parse_args()
    write_large(options.source, options.out, options.kind, options.quantize, options.donor)


if __name__ == "__main__":
    main()
