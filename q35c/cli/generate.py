"""`q35c generate`: text in, text out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from q35c.errors import PromptError

MAX_PROMPT_BYTES = 64 << 20


@click.command("generate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", default="-")
@click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, help="0 takes the likeliest token every time.")
@click.option("--top-k", type=int, help="Sample among the k likeliest tokens; 0: off.")
@click.option("--top-p", type=float, help="Sample among the likeliest that reach this share.")
@click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1: avoid tokens already there.")
@click.option("--presence-penalty", type=float, help="Above 0: avoid tokens already generated.")
@click.option("--seed", type=int, help="Equal seeds give equal texts [random].")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option(
    "--chat/--raw",
    default=False,
    help="Wrap the prompt in the model's chat template, or not [raw].",
)
@click.option("--threads", type=int, help="Worker threads [physical cores].")
@click.option("--context", type=int, help="Most tokens of the sequence [as compiled].")
def generate_command(
    artifact: Path,
    prompt: str,
    chat: bool,
    threads: int | None,
    context: int | None,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Continue PROMPT; without one, or with -, it is read from standard input.

    The text goes to standard output as it is made, figures go to standard error. What is not given
    is as the checkpoint's generation_config.json says.

    \b
    Examples:
      q35c generate model.q35c "The house was" -n 64
      q35c generate model.q35c --chat "Why is the sky blue?" --temperature 0
      cat letter.txt | q35c generate model.q35c - --seed 7
    """
    import q35c

    text: Any = read_prompt() if prompt == "-" else prompt
    begin = time.perf_counter()
    with q35c.load(artifact, threads, context=context) as model:
        load_seconds = time.perf_counter() - begin
        if chat:
            text = model.encode_chat([{"role": "user", "content": text}])
        result = stream_text(model, text, stop=stop, **options)
        click.echo(describe_result(result, load_seconds, model.threads), err=True)


def stream_text(model: Any, prompt: str | list[int], **options: Any) -> Any:
    """Generate to standard output piece by piece; return the `Generation`."""
    stream = model.generate(prompt, stream=True, **options)
    with ending_line():
        for piece in stream:
            click.echo(piece, nl=False)
    return stream.result


@contextmanager
def ending_line() -> Iterator[None]:
    """End the line on standard output, also where the text is cut off by Ctrl-C."""
    try:
        yield
    finally:
        if not isinstance(sys.exception(), BrokenPipeError):
            click.echo()


def describe_result(result: Any, load_seconds: float, threads: int) -> str:
    """Return one line about a generation: why it ended, its seed and speed."""
    timings = result.timings
    prefill = timings.prompt_tokens / timings.prefill_seconds if timings.prefill_seconds else 0.0
    return (
        f"[{result.finish_reason}; load {load_seconds:.2f} s; "
        f"prompt {timings.prompt_tokens} tokens at {prefill:.1f} tok/s; "
        f"new {timings.new_tokens} tokens at {timings.decode_tokens_per_second:.1f} tok/s; "
        f"threads {threads}; seed {result.seed}]"
    )


def read_prompt() -> str:
    """Return standard input as text, without its last newline. Raises PromptError."""
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError("the prompt is too large", expected=f"at most {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError("the prompt is not UTF-8", got=f"byte {error.start}") from None
