"""`q35c inspect` and `q35c verify-file`: look at an artifact without running anything of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from q35c.cli.roofline import describe_roofline
from q35c.cli.streams import say
from q35c.cli.text import size_text, table_text
from q35c.progress import Progress

ARTIFACT = click.Path(path_type=Path)


@click.command("inspect")
@click.argument("artifact", type=ARTIFACT)
@click.option("--json", "is_json", is_flag=True, help="Print the whole manifest as JSON.")
@click.option("--kernels", is_flag=True, help="List every kernel with its parameters.")
@click.option("--weights", is_flag=True, help="List every packed weight and what it was made of.")
@click.option("--roofline", is_flag=True, help="List what every kernel must do at the least.")
@click.option(
    "-p", "prompt_tokens", type=int, multiple=True, help="Prompt tokens [512, or what fits]."
)
@click.option(
    "-d", "depths", type=int, multiple=True, default=(0,), help="Tokens already there [0]."
)
def inspect_command(
    artifact: Path,
    is_json: bool,
    kernels: bool,
    weights: bool,
    roofline: bool,
    prompt_tokens: tuple[int, ...],
    depths: tuple[int, ...],
) -> None:
    """Show what an artifact holds: model, target, entries, kernels, memory, hashes.

    The manifest is checked and the hash of every segment but the weights; no code is loaded. --roofline shows bytes and
    operations of a prompt of -p tokens and of a decoded token, behind -d tokens, with the times that this machine's
    limits allow if `q35c bench --roofline` has measured them.

    \b
    Examples:
      q35c inspect model.q35c
      q35c inspect model.q35c --json | jq .memory
      q35c inspect model.q35c --roofline -d 0 -d 4096
    """
    from q35c.artifact import read_artifact
    from q35c.artifact.schema import encode

    with read_artifact(artifact) as opened:
        opened.verify_segments()
        manifest = opened.manifest
        if is_json:
            document = {"file_bytes": opened.file_bytes, "manifest_sha256": opened.digest}
            say(json.dumps(document | encode(manifest), indent=2, sort_keys=True))
            return
        say(f"{artifact}: {size_text(opened.file_bytes)}, written by {manifest.producer}")
    say(describe_manifest(manifest))
    if kernels:
        say("\n" + describe_kernels(manifest))
    if weights:
        say("\n" + describe_weights(manifest))
    if roofline:
        say("\n" + describe_roofline(manifest, prompt_tokens, depths))


@click.command("verify-file")
@click.argument("artifact", type=ARTIFACT)
def verify_file_command(artifact: Path) -> None:
    """Check every byte of an artifact against its hashes, weights included.

    No code is loaded. Exits with 1 and names the damaged part if a byte differs.

    \b
    Example:
      q35c verify-file model.q35c
    """
    from q35c.artifact import read_artifact

    with read_artifact(artifact) as opened, Progress() as progress:
        opened.verify_segments()
        opened.verify_weights(lambda done, total: progress("hash", done / total))
        say(f"{artifact}: intact, {size_text(opened.file_bytes)}, manifest {opened.digest}")


def describe_manifest(manifest: Any) -> str:
    """Return the overview of a manifest, one fact a line."""
    config, memory = manifest.model, manifest.memory
    layers = Counter(config.layer_types)
    kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(layers.items()))
    experts = (
        f"{config.num_experts} experts, {config.num_experts_per_tok} per token"
        if config.is_moe
        else f"intermediate {config.intermediate_size}"
    )
    families = Counter(kernel.family for kernel in manifest.kernels)
    entries = [
        f"{entry.name} (up to {entry.sequences} x {entry.tokens} tokens, {entry.logits} logits)"
        for entry in manifest.entries
    ]
    hashes = [f"{name} {item.sha256[:16]}… {size_text(item.bytes)}"
              for name, item in manifest.segments.items()]  # fmt: skip
    facts = {
        "model": f"{config.model_type}, hidden {config.hidden_size}, vocabulary "
        f"{config.vocab_size}, {experts}",
        "layers": f"{config.num_hidden_layers}: {kinds}",
        "target": f"{manifest.target.name} ({describe_machine(manifest.target)})",
        "precision": f"{manifest.precision}: {describe_formats(manifest)}",
        "cache": describe_cache(manifest),
        "limits": f"{manifest.context} tokens a sequence, up to {manifest.max_context} on request, {manifest.batch} sequences, "
        f"{manifest.max_threads} threads",
        "entries": "; ".join(entries),
        "kernels": f"{len(manifest.kernels)}: "
        + ", ".join(f"{count} {family}" for family, count in sorted(families.items())),
        "weights": f"{len(manifest.weights)} tensors, {size_text(memory.weights)}",
        "memory": f"state {size_text(memory.state_per_sequence)} a sequence of {manifest.context} tokens, "
        f"arena {size_text(memory.arena)}, io {size_text(memory.io)}, "
        f"peak {size_text(memory.peak)}",
        **({"pictures": describe_tower(manifest)} if manifest.vision is not None else {}),
        "segments": "; ".join(hashes),
        "sampling": ", ".join(
            f"{name} {getattr(manifest.generation, name)}"
            for name in ("do_sample", "temperature", "top_k", "top_p", "min_p")
        ),
    }
    return "\n".join(f"  {name:<10} {fact}" for name, fact in facts.items())


def describe_tower(manifest: Any) -> str:
    """Return the shape of the vision tower, and what seeing a picture takes beside text."""
    config, tower = manifest.vision.config, manifest.vision.tower
    weights = manifest.weights[tower.first_weight :]
    formats = Counter(weight.format for weight in weights if len(weight.matrix) == 2)
    return (
        f"up to {tower.tokens} tokens; tower of {config.depth} blocks, hidden {config.hidden_size}, weights "
        f"{size_text(manifest.weights_bytes - manifest.text_weights_bytes)} ({formats.most_common(1)[0][0]}), "
        f"arena {size_text(tower.arena_bytes)}, io {size_text(tower.io.bytes)}, "
        "none of it touched before the first picture"
    )


def describe_machine(target: Any) -> str:
    """Return what code for a target needs of a machine."""
    if target.backend == "cpu":
        return " ".join(target.cpu_features)
    return "images for " + "; ".join(map(describe_image, target.images))


def describe_image(image: Any) -> str:
    """Return an architecture with the most registers of a kernel, and the kernels that spill some."""
    if not image.figures:
        return image.architecture
    most = max(figures.registers for figures in image.figures)
    spilling = sum(figures.spill_bytes > 0 for figures in image.figures)
    return f"{image.architecture}: up to {most} registers, {spilling or 'no'} kernels spill"


def describe_cache(manifest: Any) -> str:
    """Return the type of keys and values, and their size with scales."""
    growing = [tensor for tensor in manifest.state.tensors if tensor.growth == "context"]
    names = {"i8": "int8 with an f32 scale for each token and head"}
    dtype = growing[0].dtype if growing else "none"
    size = sum(tensor.bytes for tensor in growing) // manifest.max_context
    return f"keys and values {names.get(dtype, dtype)}, {size_text(size)} a token"


def describe_formats(manifest: Any) -> str:
    """Return the bits per weight, scales included, and how much is stored in each format."""
    from q35c.frontend.tensors import expected_tensors

    sizes: Counter[str] = Counter()
    text = len(manifest.weights) if manifest.vision is None else manifest.vision.tower.first_weight
    for weight in manifest.weights[:text]:
        sizes[weight.format] += weight.bytes
    count = sum(math.prod(shape) for shape in expected_tensors(manifest.model).values())
    formats = ", ".join(f"{name} {size_text(size)}" for name, size in sizes.most_common())
    return f"{8 * sum(sizes.values()) / count:.2f} bits a weight ({formats})"


def describe_kernels(manifest: Any) -> str:
    """Return a table of the kernels in the code; of images with threads of a block, and registers and shared bytes in the first."""
    columns, figures = ["kernel", "family", "parameters"], []
    if manifest.target.backend == "cuda":
        columns[2:2] = ["threads", "registers", "shared"]
        figures = manifest.target.images[0].figures
    rows = []
    for number, kernel in enumerate(manifest.kernels):
        row = [kernel.name, kernel.family]
        if len(columns) > 3:
            plan = manifest.target.kernels[number]
            said = figures[number] if figures else None
            static = said.shared_bytes if said else 0
            row += [str(math.prod(plan.block)), str(said.registers) if said else "?", str(plan.shared_bytes + static)]  # fmt: skip
        rows.append([*row, " ".join(f"{k}={v}" for k, v in kernel.parameters.items())])
    return table_text(columns, rows)


def describe_weights(manifest: Any) -> str:
    """Return a table of the packed weights."""
    rows = [
        [
            weight.name,
            f"{weight.format}[{', '.join(map(str, weight.matrix))}]",
            size_text(weight.bytes),
            weight.layout,
            " ".join(weight.sources),
        ]
        for weight in manifest.weights
    ]
    return table_text(["weight", "type", "size", "layout", "made of"], rows)
