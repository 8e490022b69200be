"""`q35c generate`: text in, text out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from q35c.cli.options import describe_machine, model_options, sampling_options
from q35c.cli.streams import note, say
from q35c.cli.texts import argument_or_file, read_json
from q35c.errors import InputError, OptionError

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
    default=None,
    help="Wrap the prompt in the model's chat template, or not [raw; with pictures or clips, chat].",
)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Picture to be shown before the prompt; may be given several times.")  # fmt: skip
@click.option("--video", "videos", multiple=True, type=click.Path(path_type=Path), help="Clip to be shown before the prompt; may be given several times.")  # fmt: skip
@click.option("--system", help="What the system says before the prompt; with --chat.")
@click.option(
    "--think",
    type=click.Choice(["on", "off"]),
    help="Let the model think first, or not; with --chat.",
)
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path),
    help="File with a JSON schema that the text obeys.",
)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from there.")
@model_options
@click.option(
    "--json", "is_json", is_flag=True, help="Print text, ids and figures as JSON, at the end."
)
@click.option("--quiet", is_flag=True, help="No figures on standard error.")
def generate_command(
    artifact: Path,
    prompt: str,
    prompt_file: Path | None,
    chat: bool | None,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    system: str | None,
    think: str | None,
    json_schema: Path | None,
    threads: int | None,
    device: str | None,
    context: int | None,
    is_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue PROMPT; without one, or with -, it is read from standard input, or from --prompt-file. One that begins
    with a dash goes behind --.

    The text goes to standard output as it is made, figures go to standard error. What is not given
    is as the checkpoint's generation_config.json says.

    \b
    Examples:
      q35c generate model.q35c "The house was" -n 64
      q35c generate model.q35c -n 200 --stop '\\n\\n' -- "- a list:"
      q35c generate model.q35c --chat "Why is the sky blue?" --temperature 0
      q35c generate model.q35c --chat --system "Answer in one word." --think off "Why is the sky blue?"
      q35c generate model.q35c "What is this?" --image photo.jpg
      q35c generate model.q35c --chat --json-schema person.json "Who wrote Faust?" -n 300
      cat letter.txt | q35c generate model.q35c - --seed 7 --json --quiet
    """
    import q35c

    if json_schema is not None:
        schema = read_json(json_schema)
        options["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    shown: dict[str, Any] = {"images": [*images] or None, "videos": [*videos] or None}
    is_chat = bool(images or videos) if chat is None else chat
    for name, value in (("--system", system), ("--think", think)):
        if value is not None and not is_chat:
            raise OptionError("belongs to --chat", where=name)
    text: Any = argument_or_file(prompt, prompt_file).removesuffix("\n" if prompt_file else "")
    begin = time.perf_counter()
    with (
        q35c.load(artifact, threads, context=context, device=device) as model,
        naming(json_schema, images, videos),
    ):
        load_seconds = time.perf_counter() - begin
        if is_chat:
            text, shown = encode_question(model, text, system, think, **shown), {}
        if is_json:
            result = model.generate(text, **shown, **options)
            say(json.dumps(figures_of(result), ensure_ascii=False))
        else:
            result = stream_text(model, text, **shown, **options)
        if not quiet:
            note(describe_result(result, load_seconds, model))


@contextmanager
def naming(
    schema: Path | None, images: Sequence[Path] = (), videos: Sequence[Path] = ()
) -> Iterator[None]:
    """Say in errors about the structure, a picture or a clip which file it came from."""
    shown = {"images": images, "videos": videos}
    files = {f"{name}[{i}]": path for name, paths in shown.items() for i, path in enumerate(paths)}
    try:
        yield
    except InputError as error:
        where = error.where or ""
        if schema is not None and where.startswith("response_format"):
            error.where = str(schema)
        elif where in files:
            error.where = str(files[where])
        raise


def encode_question(
    model: Any, question: str, system: str | None, think: str | None, **shown: Any
) -> Any:
    """Return the prompt of a conversation that is a single question, about the `images` and `videos` that are shown."""
    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    variables = {} if think is None else {"enable_thinking": think == "on"}
    return model.encode_chat(messages, **shown, **variables)


def figures_of(result: Any) -> dict[str, Any]:
    """Return a `Generation` as plain data."""
    return {
        "text": result.text,
        "ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "seed": result.seed,
        **asdict(result.timings),
    }


def stream_text(model: Any, prompt: Any, **options: Any) -> Any:
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


def describe_result(result: Any, load_seconds: float, model: Any) -> str:
    """Return one line about a generation: why it ended, its seed and speed."""
    timings = result.timings
    prefill = timings.prompt_tokens / timings.prefill_seconds if timings.prefill_seconds else 0.0
    return (
        f"[{result.finish_reason}; load {load_seconds:.2f} s; "
        f"prompt {timings.prompt_tokens} tokens at {prefill:.1f} tok/s; "
        f"new {timings.new_tokens} tokens at {timings.decode_tokens_per_second:.1f} tok/s; "
        f"{describe_machine(model)}; seed {result.seed}]"
    )
