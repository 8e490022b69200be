"""`q35c tokenize` and `q35c perplexity`: a text as the model sees it, and how well it predicts it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from q35c.artifact import read_artifact
from q35c.cli.options import model_options
from q35c.cli.streams import say
from q35c.cli.text import table_text
from q35c.cli.texts import argument_or_file
from q35c.errors import TokenizerError, printable
from q35c.progress import Progress


@click.command("tokenize")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("text", default="-")
@click.option("--file", "path", type=click.Path(path_type=Path), help="Read the text from there.")
@click.option("--ids", "is_plain", is_flag=True, help="Print the ids alone, on one line.")
@click.option("--json", "is_json", is_flag=True, help="Print ids and pieces as JSON.")
def tokenize_command(
    artifact: Path, text: str, path: Path | None, is_plain: bool, is_json: bool
) -> None:
    """Show the tokens of TEXT; without one, or with -, it is read from standard input.

    The artifact's code is not run, so that it may be for another machine.

    \b
    Examples:
      q35c tokenize model.q35c "The house was"
      q35c tokenize model.q35c --file letter.txt --ids | wc -w
    """
    from q35c.runtime.tokenizer import Tokenizer

    whole = argument_or_file(text, path)
    with read_artifact(artifact) as opened:
        if not opened.has_segment("tokenizer"):
            raise TokenizerError("the artifact holds no tokenizer", where=str(artifact))
        tokenizer = Tokenizer(opened.segment("tokenizer"))
    ids = tokenizer.encode(whole)
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    if is_json:
        say(json.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False))
    elif is_plain:
        say(" ".join(map(str, ids)))
    else:
        rows = [
            [printable(repr(piece)), str(token)] for token, piece in zip(ids, pieces, strict=True)
        ]
        say(table_text(["piece", "id"], rows))
        say(f"\n{len(ids)} tokens, {len(whole)} characters, {len(whole.encode())} bytes")


@click.command("perplexity")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--window", type=int, help="Most tokens a prediction stands on [the context].")
@model_options
@click.option("--json", "is_json", is_flag=True, help="Print the figures as JSON.")
def perplexity_command(
    artifact: Path,
    file: Path,
    window: int | None,
    threads: int | None,
    device: str | None,
    context: int | None,
    is_json: bool,
) -> None:
    """Measure how well a model predicts the text in FILE (-: standard input).

    A text that is longer than the window is read in windows that overlap by half. Compare models of one tokenizer by
    perplexity, others by bits a byte.

    \b
    Examples:
      q35c perplexity model.q35c held_out.txt
      q35c perplexity model.q35c held_out.txt --window 512 --json
    """
    import q35c
    from q35c.runtime.perplexity import measure_perplexity

    text = argument_or_file("-", None if str(file) == "-" else file)
    with (
        q35c.load(artifact, threads, context=context, device=device) as model,
        Progress() as progress,
    ):

        def show(done: int, count: int) -> None:
            progress("predict", done / count)

        found = measure_perplexity(model, text, window, show)
    if is_json:
        figures = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
        say(json.dumps(figures | asdict(found), indent=2))
        return
    low, high = (found.perplexity * factor for factor in (1 - found.deviation, 1 + found.deviation))
    say(
        f"perplexity {found.perplexity:.4f} ({low:.4f} to {high:.4f}), {found.bits_per_byte:.4f} bits a byte; "
        f"{found.tokens} tokens at {found.tokens_per_second:.1f} tok/s"
    )
