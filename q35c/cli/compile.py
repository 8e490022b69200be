"""`q35c compile` and `q35c export`: the commands that need PyTorch or TVM."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from q35c.cli.signals import ending_cleanly
from q35c.cli.streams import note, say
from q35c.cli.text import size_text
from q35c.errors import ArtifactError, OptionError
from q35c.progress import Progress

LOAD_FORMATS = ("auto", "safetensors", "dummy")


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that consent to what a checkpoint asks for."""
    links = click.option(
        "--follow-links", is_flag=True, help="Follow links that lead out of the model directory."
    )
    keys = click.option(
        "--ignore-config",
        metavar="KEY",
        multiple=True,
        help="Read config.json as if this key were not there; may be repeated.",
    )
    return links(keys(command))


@click.command("compile")
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file to write [<name>.q35c]."
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="cpu (this machine), or cpu:LEVEL with a level x86-64-v3 (AVX2), x86-64-v4 (AVX-512), "
    "x86-64-v4-vnni or x86-64-v4-bf16; cuda (NVIDIA devices from A100 on), or cuda:ARCHITECTURE, as cuda:sm_90a.",
)
@click.option(
    "--precision",
    default="bf16",
    show_default=True,
    help="How weights are stored: f32, bf16, w8 (8 bits), w4 (4 bits, sensitive ones 5) or w4-small "
    "(4 bits wherever possible).",
)
@click.option(
    "--kv-dtype",
    default="auto",
    show_default=True,
    help="How keys and values are stored: f32, bf16, int8 (half of bf16's memory, faster decode behind many "
    "tokens), or auto (f32 with --precision f32, else bf16).",
)
@click.option(
    "--context",
    type=int,
    help="Most tokens of a sequence where --context is not given at load [4096, or the model's own limit].",
)
@click.option(
    "--batch", type=int, default=4, show_default=True, help="Most sequences decoded together."
)
@click.option(
    "--vision/--no-vision",
    default=None,
    help="Compile the vision tower as well, or text alone [the tower of a checkpoint that has one].",
)
@click.option(
    "--vision-precision",
    default="auto",
    show_default=True,
    help="How the tower's weights are stored: f32, bf16, w8, or auto (f32 with --precision f32, else bf16).",
)
@click.option(
    "--max-image-tokens",
    type=int,
    default=1024,
    show_default=True,
    help="Most tokens of a picture, each of 32 x 32 pixels; larger ones are made smaller.",
)
@click.option(
    "--dump-ir", type=click.Path(path_type=Path), help="Write the IR after every pass there."
)
@click.option(
    "--load-format",
    type=click.Choice(LOAD_FORMATS),
    default="auto",
    show_default=True,
    help="dummy: random weights, for trying shapes and speed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the dummy weights.")
@source_options
def compile_command(source: str, output: Path | None, **options: Any) -> None:
    """Compile a checkpoint into one file that needs neither PyTorch nor TVM to run.

    SOURCE is a Hugging Face model directory, the id of a model on the hub, or, with
    `--load-format dummy`, the name of a family member such as qwen3.5-0.8b.

    \b
    Examples:
      q35c compile ./Qwen3.5-0.8B -o model.q35c --precision w4
      q35c compile ./Qwen3.5-0.8B --target cpu:x86-64-v4 --context 32768 --kv-dtype int8
      q35c compile qwen3.5-0.8b --load-format dummy -o speed.q35c
    """
    check_source(source)
    from q35c.compile import compile_model

    output = default_output(source, ".q35c") if output is None else output
    with ending_cleanly(), Progress() as progress:
        report = compile_model(source, output, progress=progress, **options)
    for text in report.notes:
        note(f"note: {text}")
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stages.items())
    say(f"{report.path}: {size_text(report.bytes)} in {report.seconds:.1f} s ({stages})")
    say(f"next: {next_command(report.path)}")


def next_command(path: Path) -> str:
    """Return what to try with a new artifact."""
    from q35c.artifact import read_artifact

    with read_artifact(path) as artifact:
        can_chat = artifact.has_segment("chat_template")
    name = shlex.quote(str(path))
    return f"q35c chat {name}" if can_chat else f'q35c generate {name} "The house was"'


@click.command("export")
@click.argument("source")
@click.option("--format", "kind", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option(
    "--part",
    type=click.Choice(["text", "vision"]),
    default="text",
    show_default=True,
    help="The text model, or the vision tower of a multimodal checkpoint.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file to write [<name>.onnx]."
)
@source_options
def export_command(source: str, kind: str, output: Path | None, **options: Any) -> None:
    """Write a checkpoint as another format: the whole text model, or vision tower, as a plain ONNX graph.

    \b
    Example:
      q35c export ./Qwen3.5-0.8B --format onnx -o model.onnx
    """
    check_source(source)
    from q35c.export.onnx import export_checkpoint

    output = default_output(source, f".{kind}") if output is None else output
    with ending_cleanly(), Progress() as progress:
        export_checkpoint(source, output, progress=progress, **options)
    say(f"{output}: {size_text(output.stat().st_size)}")


def check_source(source: str) -> None:
    """Refuse an artifact where a checkpoint is meant. Raises OptionError."""
    os.getcwd()  # fails where it is gone: PyTorch would end the process
    if not Path(source).is_file():
        return
    from q35c.artifact import read_artifact

    with contextlib.suppress(ArtifactError), read_artifact(source):
        raise OptionError(
            "is an artifact: it was compiled already",
            where=source,
            expected="a model directory, the id of a model on the hub, or a family name",
            hint=f'q35c generate {shlex.quote(source)} "The house was"',
        )


def default_output(source: str, suffix: str) -> Path:
    """Return the file name, in the current directory, for a model given by path, id or name."""
    name = Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]
    if not name:
        raise OptionError(
            "cannot derive a file name", where="source", got=source, hint="give one with -o"
        )
    return Path(name + suffix)
