"""`q35c bench`: how fast an artifact is here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from q35c.cli.options import describe_machine, machine_options
from q35c.cli.roofline import bench_roofline
from q35c.cli.streams import say
from q35c.cli.text import size_text, table_text
from q35c.errors import OptionError
from q35c.outputs import check_output
from q35c.progress import Progress

if TYPE_CHECKING:
    from q35c.bench import Measurement
    from q35c.runtime import Model


@click.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "prompt_tokens",
    type=int,
    multiple=True,
    default=(512,),
    help="Tokens of a prefill test [512].",
)
@click.option(
    "-n",
    "new_tokens",
    type=int,
    multiple=True,
    default=(128,),
    help="Tokens of a decode test [128].",
)
@click.option(
    "-d", "depths", type=int, multiple=True, default=(0,), help="Tokens already there [0]."
)
@click.option("-r", "--repetitions", type=int, default=5, show_default=True)
@machine_options
@click.option("--json", "is_json", is_flag=True, help="Print every run as JSON.")
@click.option(
    "--roofline", "is_roofline", is_flag=True, help="Measure kernels beside their limits."
)
@click.option("--html", type=click.Path(path_type=Path), help="Write the roofline as a picture.")
@click.option("--remeasure", is_flag=True, help="Measure this machine's limits again.")
def bench_command(
    artifact: Path,
    prompt_tokens: tuple[int, ...],
    new_tokens: tuple[int, ...],
    depths: tuple[int, ...],
    repetitions: int,
    threads: int | None,
    device: str | None,
    is_json: bool,
    is_roofline: bool,
    html: Path | None,
    remeasure: bool,
) -> None:
    """Measure prefill (pp) and decode (tg) rates, load time and peak memory.

    -p, -n and -d may be given several times; 0 leaves a test out. A rate is the median of the
    repetitions, ± half their range, after one run to warm up.

    --roofline times every kernel of one prompt and of one decoded token instead, beside the time that this machine's
    memory bandwidth and arithmetic allow (measured once, kept in the user's cache directory).

    \b
    Examples:
      q35c bench model.q35c
      q35c bench model.q35c -p 0 -n 64 -d 0 -d 1024 -d 3072 --json
      q35c bench model.q35c --roofline -n 16 --html roofline.html
    """
    import q35c
    from q35c.bench import run_benchmark

    if not is_roofline and (html is not None or remeasure):
        raise OptionError("belongs to --roofline", where="--html" if html else "--remeasure")
    if html is not None:
        check_output(html, [artifact])
    sizes: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "depths": depths,
        "repetitions": repetitions,
    }
    begin = time.perf_counter()
    with q35c.load(artifact, threads, device=device) as model:
        load_seconds = time.perf_counter() - begin
        if is_roofline:
            facts = facts_of(artifact, model, load_seconds)
            bench_roofline(model, facts, sizes=sizes, is_json=is_json, html=html, again=remeasure)
            return
        with Progress() as progress:
            found = run_benchmark(model, **sizes, progress=progress)
        facts = facts_of(artifact, model, load_seconds)
    if is_json:
        tests = [asdict(item) | {"tokens_per_second": item.median} for item in found]
        say(json.dumps(facts | {"tests": tests}, indent=2))
        return
    print_rates(found, facts)


def print_rates(found: Sequence[Measurement], facts: dict[str, Any]) -> None:
    rows = [[item.test, f"{item.median:.1f} ± {item.spread:.1f}"] for item in found]
    say(table_text(["test", "tok/s"], rows))
    say(
        f"\n{facts['target']}, {facts['precision']}, {size_text(facts['weights_bytes'])} "
        f"of weights, {facts['machine']}; loaded in {facts['load_seconds']:.2f} s, "
        f"peak {size_text(facts['peak_rss_bytes'])}"
    )


def facts_of(artifact: Path, model: Model, load_seconds: float) -> dict[str, Any]:
    """Return what was measured, and where."""
    from q35c.runtime.memory import peak_memory

    manifest = model.manifest
    return {
        "artifact": str(artifact),
        "producer": manifest.producer,
        "target": manifest.target.name,
        "precision": manifest.precision,
        "weights_bytes": manifest.weights_bytes,
        "threads": model.threads,
        "machine": describe_machine(model),
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_memory(),
    }
