"""The driver: from a checkpoint to one file. `compile_model` is the whole arrow."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from q35c import arguments
from q35c.artifact.tower import MOST_TOKENS
from q35c.artifact.tower import NAME as VISION
from q35c.artifact.writer import ArtifactWriter
from q35c.codegen.backend import Backend
from q35c.codegen.generate import Generated, Limits, generate
from q35c.codegen.pack import Pack
from q35c.codegen.targets import find_target
from q35c.config import MAX_CONTEXT, ModelConfig
from q35c.errors import OptionError
from q35c.formats.registry import largest_value
from q35c.frontend.checkpoint import Checkpoint, LoadFormat, open_checkpoint
from q35c.frontend.companions import Companions, read_companions
from q35c.frontend.importer import import_program
from q35c.frontend.tensors import TOWER_PREFIX
from q35c.frontend.trace import trace_model
from q35c.frontend.trace_vision import trace_tower
from q35c.ir.graph import Graph
from q35c.ir.precision import find_policy
from q35c.outputs import check_folder, check_output, check_space
from q35c.passes.pipeline import Choices, run_pipeline
from q35c.runtime.cpu.library import Library
from q35c.runtime.cpu.machine import default_threads
from q35c.runtime.memory import peak_memory
from q35c.vision_config import VisionConfig

Progress = Callable[[str, float], None]  # stage, fraction done
CONTEXT_STEP = 64
IMAGE_STEP = 16  # tokens: patches in whole steps of attention
IMAGE_TOKENS = 1024  # of a picture of 1024 x 1024 pixels, which takes two cores some seconds


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What a compilation made and what it cost."""

    path: Path
    bytes: int
    seconds: float
    peak_bytes: int  # this process's largest resident size so far
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    notes: tuple[str, ...] = ()  # what of the checkpoint is not taken, or looks odd


def compile_model(
    source: str | Path,
    output: str | Path,
    *,
    target: str = "cpu",
    precision: str = "bf16",
    kv_dtype: str = "auto",
    context: int | None = None,
    batch: int = 4,
    dump_ir: str | Path | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    follow_links: bool = False,
    ignore_config: Collection[str] = (),
    vision: bool | None = None,
    vision_precision: str = "auto",
    max_image_tokens: int = IMAGE_TOKENS,
    progress: Progress | None = None,
    takes_rows: bool = False,
    import_graph: Callable[[ModelConfig], Graph] | None = None,
) -> CompileReport:
    """Compile a checkpoint directory, hub id or family name into the file `output`.

    `kv_dtype` is the type of keys and values: f32, bf16, int8, or auto for the precision's own.
    `context` is the most tokens of a sequence where the loader asks for no others (default: 4096, or the model's own limit
    if that is smaller), which may be up to that limit; `batch` the most sequences one decode step serves. `load_format` to `ignore_config` are those of
    `open_checkpoint`. `vision` None compiles the vision tower of a directory that has one, with `vision_precision` f32, bf16, w8,
    or auto (f32 with that precision, else bf16), for pictures of up to `max_image_tokens` tokens. Then, and with
    `takes_rows`, rows of pictures may stand in place of tokens. `import_graph` is for callers that have the graph of this configuration, which otherwise is traced. What
    of the checkpoint is not taken stands in the report's `notes`. Raises InputError subclasses for
    what the user can mend; nothing is left at `output` unless the whole file was written and verified.
    """
    clock = Clock(arguments.callback("progress", progress))
    output = arguments.path("output", output)
    dump = None if dump_ir is None else arguments.path("dump_ir", dump_ir)
    check_places(output, dump, arguments.path("source", source))
    machine = find_target(target)
    policy = find_policy(precision, kv_dtype, vision_precision)
    image_tokens = check_image_tokens(max_image_tokens)
    machine.check_tools()
    checkpoint = open_checkpoint(
        source, load_format, seed, follow_links=follow_links, ignore_config=ignore_config,
        vision=check_vision(vision, machine),
    )  # fmt: skip
    companions = read_companions(checkpoint)
    limits = check_limits(checkpoint.config, context, batch)
    limits = replace(limits, tower=checkpoint.tower, image_tokens=image_tokens)
    clock("trace", 0.0)
    graph = (import_graph or import_model)(checkpoint.config)
    tower = None if checkpoint.tower is None else import_tower(checkpoint.tower)
    clock("passes", 0.0)
    splits = functools.partial(machine.decode_splits, context=limits.max_context)
    takes_rows = takes_rows or tower is not None
    module = run_pipeline(graph, Choices(policy, splits, takes_rows), dump, tower)

    def check_weights(size: int) -> None:
        check_space(output.parent, size)

    generated = generate(module, machine, policy, limits, clock, check_weights)
    pack = machine.packer(generated.weights, Library)
    write_artifact(output, checkpoint, companions, generated, pack, clock)
    return clock.report(output, companions.notes)


def import_model(config: ModelConfig) -> Graph:
    """Trace a model of this configuration, without weights, and import the trace."""
    return import_program(trace_model(config))


def import_tower(config: VisionConfig) -> Graph:
    """Trace a vision tower of this configuration, without weights, and import the trace."""
    return import_program(trace_tower(config), VISION, TOWER_PREFIX)


def write_artifact(
    path: Path,
    checkpoint: Checkpoint,
    companions: Companions,
    generated: Generated,
    pack: Pack,
    progress: Progress,
) -> None:
    """Pack the weights slice by slice into the artifact and publish it."""
    segments = {**generated.segments, **companions.segments}
    fields = {
        **generated.fields,
        "model": checkpoint.config.to_dict(),
        "generation": companions.generation,
    }
    if generated.tower is not None:
        fields["vision"] = {
            "config": companions.vision["config"],
            "parameters": companions.vision["parameters"] | {"max_tokens": generated.tower.tokens},
            "tower": generated.tower,
        }

    def report(done: int, total: int) -> None:
        progress("weights", done / total)

    with ArtifactWriter(path, fields, segments, generated.entries, report) as writer:
        jobs = (
            (weight.name, job)
            for weight in generated.weights
            for job in weight.jobs(
                functools.partial(checkpoint.read, largest=largest_value(weight.dtype)), pack
            )
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


def check_places(output: Path, dump_ir: Path | None, source: Path) -> None:
    """Refuse what cannot be written to before minutes of work. Raises OptionError."""
    check_output(output, [source])
    if dump_ir is not None:
        if dump_ir.absolute() == output.absolute():
            raise OptionError("the output has this name too", where=str(dump_ir))
        check_folder(dump_ir, "*.txt")


def check_limits(config: ModelConfig, context: int | None, batch: int) -> Limits:
    """Return the compiled limits, or raise OptionError."""
    most = min(config.max_context, MAX_CONTEXT)
    context = arguments.integer("context", min(4096, most) if context is None else context, 1, most)
    batch = arguments.integer("batch", batch, 1, 256)
    context, most = (-(-tokens // CONTEXT_STEP) * CONTEXT_STEP for tokens in (context, most))
    return Limits(context, most, batch, config.vocab_size, config.hidden_size)


def check_image_tokens(most: int) -> int:
    """Return how many tokens a picture may have, or raise OptionError."""
    most = arguments.integer("max_image_tokens", most, IMAGE_STEP, MOST_TOKENS)
    return most // IMAGE_STEP * IMAGE_STEP


def check_vision(vision: bool | None, machine: Backend) -> bool | None:
    """Return whether to read a vision tower, none for a machine that has no kernels for it. Raises OptionError."""
    vision = None if vision is None else arguments.flag("vision", vision)
    if vision and not machine.has_towers:
        raise OptionError("this target has no vision", where="vision", got=machine.name)
    return vision if machine.has_towers else False


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

    def report(self, path: Path, notes: tuple[str, ...] = ()) -> CompileReport:
        seconds = time.perf_counter() - self._begin
        return CompileReport(path, path.stat().st_size, seconds, peak_memory(), self.stages, notes)
