"""`q35c generate`: text in, text out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from q35c.cli.options import model_options, sampling_options
from q35c.cli.streams import note, say
from q35c.errors import InputError, PromptError

MAX_PROMPT_BYTES = 64 << 20
_DASH_HINT = "A prompt that begins with a dash goes behind -- at the end: -- '-5 degrees'"


class PromptCommand(click.Command):
    """A command that says what to do about a prompt which begins with a dash."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = args[: args.index("--")] if "--" in args else list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            is_unknown = isinstance(error, click.NoSuchOption) and not error.possibilities
            if is_unknown or any(word.startswith("-") and " " in word for word in given):
                raise click.UsageError(f"{error.format_message()}\n{_DASH_HINT}", ctx) from None
            raise


@click.command("generate", cls=PromptCommand)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", default="-")
@click.option(
    "-n",
    "--max-new-tokens",
    type=int,
    default=128,
    show_default=True,
    help="Tokens at most; -1: until the context is full.",
)
@sampling_options
@click.option(
    "--chat/--raw",
    default=False,
    help="Wrap the prompt in the model's chat template, or not [raw].",
)
@model_options
def generate_command(
    artifact: Path,
    prompt: str,
    chat: bool,
    threads: int | None,
    context: int | None,
    **options: Any,
) -> None:
    """Continue PROMPT; without one, or with -, it is read from standard input. One that begins with a dash goes
    behind --.

    The text goes to standard output as it is made, figures go to standard error. What is not given
    is as the checkpoint's generation_config.json says.

    \b
    Examples:
      q35c generate model.q35c "The house was" -n 64
      q35c generate model.q35c -n 200 --stop '\\n\\n' -- "- a list:"
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
        result = stream_text(model, text, **options)
        note(describe_result(result, load_seconds, model.threads))


def stream_text(model: Any, prompt: str | list[int], **options: Any) -> Any:
    """Generate to standard output piece by piece; return the `Generation`."""
    stream = model.generate(prompt, stream=True, **options)
    with ending_line():
        for piece in stream:
            say(piece, end="")
    return stream.result


@contextmanager
def ending_line() -> Iterator[None]:
    """End the line on standard output, also where the text is cut off by Ctrl-C."""
    try:
        yield
    finally:
        if not isinstance(sys.exception(), (BrokenPipeError, InputError)):
            say()


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
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise PromptError("standard input is closed", hint="give the prompt as an argument")
    if sys.stdin.isatty():
        note("reading the prompt from the terminal: end it with Ctrl-D on a line of its own")
    try:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise PromptError(f"cannot read standard input: {error.strerror}") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError("the prompt is too large", expected=f"at most {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError("the prompt is not UTF-8", got=f"byte {error.start}") from None
