"""`q35c verify`: does an artifact compute what its checkpoint says?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from q35c.cli.compile import LOAD_FORMATS, check_source, source_options
from q35c.cli.group import EXIT_INPUT
from q35c.cli.options import machine_options
from q35c.cli.streams import note, say
from q35c.errors import OptionError
from q35c.progress import Progress


@click.command("verify")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--text", help="Text to compare on [a psalm; 128 random ids without a tokenizer].")
@click.option("--tokens", type=int, help="Compare on this many random ids instead.")
@click.option("--ids", help="Compare on these token ids instead, such as 1,2,3.")
@click.option("--load-format", type=click.Choice(LOAD_FORMATS), default="auto", show_default=True)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of random ids and dummy weights."
)
@source_options
@machine_options
@click.option("--json", "is_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def verify_command(
    context: click.Context,
    artifact: Path,
    source: str,
    ids: str | None,
    is_json: bool,
    **options: Any,
) -> None:
    """Compare ARTIFACT with eager PyTorch in float32 running SOURCE, what it was compiled from.

    Exits with 1 where the promise of the artifact's precision is not kept: f32 within 1e-3 of the
    logits' range and the same likeliest tokens outside ties, bf16 and w8 a mean KL of at most 1e-3 nats,
    w4 0.02 and w4-small 0.06 on text of the kind that the model knows; and prefill and decode must agree
    with scoring the whole sequence at once. Of an artifact with a vision tower a picture of random pixels is compared as well:
    its rows, to 1e-4 of their range in f32, a cosine of 0.999 in bf16 and 0.99 in w8, and the logits behind it.

    \b
    Examples:
      q35c verify model.q35c ./Qwen3.5-0.8B
      q35c verify model.q35c ./Qwen3.5-0.8B --text "The house was" --json
    """
    check_source(source)
    from q35c.verify import verify_artifact

    with Progress() as progress:
        report = verify_artifact(artifact, source, ids=parse_ids(ids), progress=progress, **options)
    if is_json:
        say(json.dumps(asdict(report), indent=2))
    else:
        found = report.against_oracle
        say(
            f"{report.precision}, {report.tokens} tokens\n"
            f"  max difference / range   {found.difference:.2e}\n"
            f"  mean KL (largest), nats  {found.mean_kl:.2e} ({found.max_kl:.2e})\n"
            f"  same likeliest token     {found.agreement:.1%}"
            f" ({found.clear_disagreements} differ outside ties)\n"
            f"  prefill + decode - score {report.path_difference:.2e} of the range"
        )
        if (seen := report.picture) is not None:
            say(
                f"a picture of {seen.grid[0]} x {seen.grid[1]} patches, tower in {seen.precision}\n"
                f"  max difference / range   {seen.difference:.2e}\n"
                f"  least cosine of a row    {seen.least_cosine:.6f}\n"
                f"  logits behind it / range {seen.logits_difference:.2e}"
            )
    for failure in report.failures:
        note(f"promise broken: {failure}")
    if report.failures:
        context.exit(EXIT_INPUT)


def parse_ids(text: str | None) -> list[int] | None:
    """Return comma-separated token ids. Raises OptionError."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            "not token ids", where="ids", expected="such as 1,2,3", got=text
        ) from None
