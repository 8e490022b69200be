"""`q35c bench`: how fast an artifact is here."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from q35c.cli.text import size_text, table_text
from q35c.progress import Progress


@click.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-p", "prompts", type=int, multiple=True, default=(512,), help="Tokens of a prefill test [512]."
)
@click.option(
    "-n", "news", type=int, multiple=True, default=(128,), help="Tokens of a decode test [128]."
)
@click.option(
    "-d", "depths", type=int, multiple=True, default=(0,), help="Tokens already there [0]."
)
@click.option("-r", "--repetitions", type=int, default=5, show_default=True)
@click.option("--threads", type=int, help="Worker threads [physical cores].")
@click.option("--json", "is_json", is_flag=True, help="Print every run as JSON.")
def bench_command(
    artifact: Path,
    prompts: tuple[int, ...],
    news: tuple[int, ...],
    depths: tuple[int, ...],
    repetitions: int,
    threads: int | None,
    is_json: bool,
) -> None:
    """Measure prefill (pp) and decode (tg) rates, load time and peak memory.

    -p, -n and -d may be given several times; 0 leaves a test out. A rate is the median of the
    repetitions, ± half their range, after one run to warm up.

    \b
    Examples:
      q35c bench model.q35c
      q35c bench model.q35c -p 0 -n 64 -d 0 -d 1024 -d 3072 --json
    """
    import q35c
    from q35c.bench import peak_memory, run_benchmark

    begin = time.perf_counter()
    with q35c.load(artifact, threads) as model:
        load_seconds = time.perf_counter() - begin
        with Progress() as progress:
            found = run_benchmark(
                model,
                prompt_tokens=prompts,
                new_tokens=news,
                depths=depths,
                repetitions=repetitions,
                progress=progress,
            )
        manifest = model.manifest
        facts = {
            "artifact": str(artifact),
            "producer": manifest.producer,
            "target": manifest.target.name,
            "precision": manifest.precision,
            "weights_bytes": manifest.weights_bytes,
            "threads": model.threads,
            "load_seconds": load_seconds,
            "peak_rss_bytes": peak_memory(),
        }
    if is_json:
        tests = [asdict(item) | {"tokens_per_second": item.median} for item in found]
        click.echo(json.dumps(facts | {"tests": tests}, indent=2))
        return
    rows = [[item.test, f"{item.median:.1f} ± {item.spread:.1f}"] for item in found]
    click.echo(table_text(["test", "tok/s"], rows))
    click.echo(
        f"\n{manifest.target.name}, {manifest.precision}, {size_text(manifest.weights_bytes)} "
        f"of weights, {model.threads} threads; loaded in {load_seconds:.2f} s, "
        f"peak {size_text(peak_memory())}"
    )
