"""The driver: from a checkpoint to one file. `compile_model` is the whole arrow."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from q35c.artifact.writer import ArtifactWriter, check_output
from q35c.bench import peak_memory
from q35c.codegen.generate import Generated, Limits, generate
from q35c.codegen.pack import Pack
from q35c.codegen.targets import find_target
from q35c.config import ModelConfig
from q35c.errors import OptionError
from q35c.frontend.checkpoint import Checkpoint, LoadFormat, open_checkpoint
from q35c.frontend.generation import chat_template, generation_defaults
from q35c.frontend.importer import import_program
from q35c.frontend.trace import trace_model
from q35c.ir.graph import Graph
from q35c.ir.precision import find_policy
from q35c.passes.pipeline import Choices, run_pipeline
from q35c.runtime.cpu import default_threads
from q35c.runtime.library import Library

Progress = Callable[[str, float], None]  # stage, fraction done
CONTEXT_STEP = 64


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What a compilation made and what it cost."""

    path: Path
    bytes: int
    seconds: float
    peak_bytes: int  # this process's largest resident size so far
    stages: dict[str, float] = field(default_factory=dict)  # seconds


def compile_model(
    source: str | Path,
    output: str | Path,
    *,
    target: str = "cpu",
    precision: str = "bf16",
    kv_dtype: str = "auto",
    context: int | None = None,
    batch: int = 4,
    dump_ir: Path | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    import_graph: Callable[[ModelConfig], Graph] | None = None,
) -> CompileReport:
    """Compile a checkpoint directory, hub id or family name into the file `output`.

    `kv_dtype` is the type of keys and values: f32, bf16, int8, or auto for the precision's own.
    `context` is the most tokens a sequence may hold (default: 4096, or the model's own limit if that is
    smaller); `batch` the most sequences one decode step serves. `import_graph` is for callers that have
    the graph of this configuration, which otherwise is traced. Raises InputError subclasses for
    what the user can mend; nothing is left at `output` unless the whole file was written and verified.
    """
    clock = Clock(progress)
    check_places(Path(output), dump_ir)
    machine, policy = find_target(target), find_policy(precision, kv_dtype)
    checkpoint = open_checkpoint(source, load_format=load_format, seed=seed)
    limits = check_limits(checkpoint.config, context, batch)
    clock("trace", 0.0)
    graph = (import_graph or import_model)(checkpoint.config)
    clock("passes", 0.0)
    splits = functools.partial(machine.decode_splits, context=limits.context)
    module = run_pipeline(graph, Choices(policy, splits), dump_ir)
    generated = generate(module, machine, policy, limits, clock)
    pack = machine.packer(generated.weights, Library)
    write_artifact(Path(output), checkpoint, generated, pack, clock)
    return clock.report(Path(output))


def import_model(config: ModelConfig) -> Graph:
    """Trace a model of this configuration, without weights, and import the trace."""
    return import_program(trace_model(config))


def write_artifact(
    path: Path, checkpoint: Checkpoint, generated: Generated, pack: Pack, progress: Progress
) -> None:
    """Pack the weights slice by slice into the artifact and publish it."""
    texts = {
        "tokenizer": checkpoint.files.get("tokenizer.json"),
        "tokenizer_config": checkpoint.files.get("tokenizer_config.json"),
        "chat_template": chat_template(checkpoint),
    }
    segments = {"code": generated.code} | {name: data for name, data in texts.items() if data}
    fields = {
        **generated.fields,
        "model": checkpoint.config.to_dict(),
        "generation": generation_defaults(checkpoint),
    }

    def report(done: int, total: int) -> None:
        progress("weights", done / total)

    with ArtifactWriter(path, fields, segments, generated.entries, report) as writer:
        jobs = (
            (weight.name, job)
            for weight in generated.weights
            for job in weight.jobs(checkpoint.read, pack)
        )
        for name, chunk in run_ahead(jobs, default_threads()):
            writer.write(name, chunk)
        progress("verify", 0.0)
        writer.commit()
    progress("done", 1.0)


def run_ahead(
    jobs: Iterable[tuple[str, Callable[[], Any]]], threads: int
) -> Iterator[tuple[str, Any]]:
    """Yield the results of jobs in order while threads work at the next few."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[str, Future[Any]]] = deque()
        try:
            for name, job in jobs:
                waiting.append((name, pool.submit(job)))
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def check_places(output: Path, dump_ir: Path | None) -> None:
    """Refuse what cannot be written to before minutes of work. Raises OptionError."""
    check_output(output)
    if dump_ir is not None:
        try:
            dump_ir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"cannot make the directory: {error.strerror}", where=str(dump_ir)
            ) from None


def check_limits(config: ModelConfig, context: int | None, batch: int) -> Limits:
    """Return the compiled limits, or raise OptionError."""
    most = config.max_position_embeddings
    context = min(4096, most) if context is None else context
    if not 1 <= context <= most:
        raise OptionError(
            "context is out of range", where="--context", expected=f"1 to {most}", got=context
        )
    if not 1 <= batch <= 256:
        raise OptionError("batch is out of range", where="--batch", expected="1 to 256", got=batch)
    rounded = -(-context // CONTEXT_STEP) * CONTEXT_STEP
    return Limits(rounded, batch, config.vocab_size)


class Clock:
    """Pass progress on and keep the seconds of each stage."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._begin = self._stage_begin = time.perf_counter()
        self._stage = "open"
        self.stages: dict[str, float] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            now = time.perf_counter()
            self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._stage_begin
            self._stage, self._stage_begin = stage, now
        if self._progress is not None:
            self._progress(stage, fraction)

    def report(self, path: Path) -> CompileReport:
        seconds = time.perf_counter() - self._begin
        return CompileReport(path, path.stat().st_size, seconds, peak_memory(), self.stages)
