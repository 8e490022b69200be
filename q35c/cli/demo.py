"""`q35c demo`: compile the model that ships with q35c and let it write."""

from __future__ import annotations

import time

import click

from q35c.cli.generate import describe_result, stream_text
from q35c.cli.signals import ending_cleanly
from q35c.cli.streams import note, say
from q35c.cli.text import size_text
from q35c.progress import Progress


@click.command("demo")
@click.option("--prompt", help="What to continue.")
@click.option("-n", "--max-new-tokens", type=int, default=96, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Another seed, another text.")
@click.option("--threads", type=int, help="Worker threads [physical cores].")
def demo_command(prompt: str | None, max_new_tokens: int, seed: int, threads: int | None) -> None:
    """Compile the small trained model that ships with q35c, and let it write.

    The artifact is kept in the user's cache directory; the second time it is only loaded.

    \b
    Examples:
      q35c demo
      q35c demo --prompt "And the king said" --seed 7
    """
    import q35c
    from q35c.demo import PROMPT, demo_artifact

    begin = time.perf_counter()
    with ending_cleanly(), Progress() as progress:
        path, is_new = demo_artifact(progress)
    seconds = time.perf_counter() - begin
    done = f"compiled in {seconds:.1f} s" if is_new else "compiled before"
    note(f"[{done}: {path}, {size_text(path.stat().st_size)}]")

    prompt = PROMPT if prompt is None else prompt
    begin = time.perf_counter()
    with q35c.load(path, threads) as model:
        load_seconds = time.perf_counter() - begin
        say(prompt, end="")
        result = stream_text(model, prompt, max_new_tokens=max_new_tokens, seed=seed)
        note(describe_result(result, load_seconds, model))
