"""What `--roofline` adds to `q35c bench` and `q35c inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from q35c.cli.streams import say
from q35c.cli.text import table_text
from q35c.outputs import write_output
from q35c.progress import Progress


def bench_roofline(
    model: Any,
    facts: dict[str, Any],
    *,
    sizes: dict[str, Any],
    is_json: bool,
    html: Path | None,
    again: bool,
) -> None:
    """Measure every kernel of a loaded model and print how far it is from this machine's limit."""
    from q35c.roofline import find_limits, html_report, report_json, report_text, run_roofline

    with Progress() as progress:
        limits = find_limits(model, again=again, progress=progress)
        tests = run_roofline(model, **sizes, progress=progress)
    if html is not None:
        title = f"{Path(facts['artifact']).name}, {facts['precision']}, {facts['target']}"
        write_output(html, html_report(title, tests, limits, model.threads).encode())
    if is_json:
        say(json.dumps(facts | report_json(tests, limits), indent=2))
    else:
        say(report_text(tests, limits, model.threads, table_text))


def describe_roofline(manifest: Any, prompts: Sequence[int], depths: Sequence[int]) -> str:
    """Return what every kernel must do at the least; no code runs, so the limits must be known.

    Without `prompts`, one of 512 tokens, or of as many as the context has room for.
    """
    from q35c.roofline import cached_limits, predict_tests, report_text
    from q35c.runtime.targets import find_machine

    threads = find_machine(manifest).threads
    limits = cached_limits(manifest.target.name, threads)
    prompts = prompts or (max(0, min(512, manifest.context - max(depths))),)
    tests = predict_tests(manifest, prompt_tokens=prompts, new_tokens=(1,), depths=depths)
    text = report_text(tests, limits, threads, table_text)
    if limits is None:
        text += (
            f"\n\nThe limits of this machine with {threads} threads are not known yet: "
            "`q35c bench MODEL --roofline` measures and keeps them."
        )
    return text
