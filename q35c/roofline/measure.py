"""Tests of a model, step by step: what each must cost, and how long it took.

Tests are named as in `q35c.bench`. A prefill test is one prompt, which may take several calls of the entry; a decode
test is one token. A step's time is its median over the fastest quarter of all calls (decode: of all tokens), because
other work on a machine makes runs slower and never faster; the median of all whole runs stands beside the sum. Whole
runs are chosen, not steps: a step is shortest where thread 0 came late to it and had the memory for itself.

Times are those of thread 0: a step's time ends when thread 0 begins the next one, so it holds the wait at a barrier
that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from q35c.artifact.manifest import Manifest
from q35c.errors import OptionError
from q35c.roofline.cost import Cost, Work, call_cost
from q35c.roofline.machine import seconds_per_cycle
from q35c.roofline.report import Step, Test

if TYPE_CHECKING:
    from q35c.runtime import Model, Session
    from q35c.runtime.executor import Recording

Progress = Callable[[str, float], None]
Call = tuple[str, int, tuple[int, ...]]  # entry, tokens, lengths before it
Costs = dict[tuple[int, Work], Cost]  # by number of the kernel
MOST_TOKENS = 1 << 22  # no artifact has a larger context
MOST_STEPS = 1 << 20


def predict_tests(
    manifest: Manifest,
    *,
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
) -> list[Test]:
    """Return what every test costs at every depth, not measured. A size of 0 leaves a test out.

    Raises OptionError for sizes that no context holds, and if a test has more steps than can be listed.
    """
    from q35c.bench import choose_tests

    kinds, places = choose_tests(
        MOST_TOKENS, prompt_tokens=prompt_tokens, new_tokens=new_tokens, depths=depths
    )
    for _, size in kinds:
        check_steps(manifest, size)
    tests: list[Test] = []
    for depth in places:
        for kind, size in kinds:
            calls = (
                prefill_calls(manifest, depth, size)
                if kind == "pp"
                else [(manifest.text_entries.batch.name, 1, (depth,))]
            )
            costs: Costs = {}
            steps = [step for call in calls for step in steps_of(manifest, call, costs)]
            tests.append(Test(kind, size, depth, tuple(steps)))
    return tests


def check_steps(manifest: Manifest, tokens: int) -> None:
    """Refuse a prompt whose calls have too many steps, which a file may say. Raises OptionError."""
    calls = -(-tokens // manifest.text_entries.last.tokens)
    longest = max(len(entry.steps) for entry in manifest.entries)
    if calls * longest > MOST_STEPS:
        raise OptionError(
            "the test has too many steps to list them",
            expected=f"at most {MOST_STEPS}",
            got=f"{calls} calls of up to {longest} steps",
            hint="ask for fewer tokens",
        )


def prefill_calls(manifest: Manifest, depth: int, size: int) -> list[Call]:
    entries, end = manifest.text_entries, depth + size
    most = entries.last.tokens
    return [
        (entries.last.name, end - at, (at,))
        if end - at <= most
        else (entries.none.name, most, (at,))
        for at in range(depth, end, most)
    ]


def steps_of(manifest: Manifest, call: Call, costs: Costs | None = None) -> Iterator[Step]:
    """Yield the steps of one call of an entry with their costs; `costs` keeps those of earlier calls."""
    costs = {} if costs is None else costs
    name, tokens, starts = call
    entry = manifest.entry(name)
    assert entry is not None  # the call comes from this manifest
    single = set(entry.single_row_steps)
    pairs = zip(entry.steps, entry.step_weights, strict=True)
    for index, (kernel_number, weight_number) in enumerate(pairs):
        kernel = manifest.kernels[kernel_number]
        weight = manifest.weights[weight_number] if weight_number >= 0 else None
        rows = 1 if index in single else tokens
        work = Work(rows, starts, weight.bytes if weight else 0)
        cost = costs.get((kernel_number, work))
        if cost is None:
            cost = costs[kernel_number, work] = call_cost(kernel.cost, work)
        yield Step(name, kernel, weight.name if weight else "", cost)


def run_roofline(
    model: Model,
    *,
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Test]:
    """Return the tests of `predict_tests` with measured times.

    Raises OptionError if a test does not fit the context, ExecutionError if the code keeps no clock.
    """
    from q35c.bench import check_runs, choose_tests

    kinds, places = choose_tests(
        model.context, prompt_tokens=prompt_tokens, new_tokens=new_tokens, depths=depths
    )
    repetitions, seed = check_runs(repetitions, seed, progress)
    period = seconds_per_cycle(model)
    ids = np.random.default_rng(seed).integers(0, model.vocab_size, model.context).tolist()
    done, total = 0, len(places) * len(kinds) * (repetitions + 1)
    tests: list[Test] = []
    for depth in places:
        with model.session() as session:
            if depth:
                session.prefill(ids[:depth])
            start = session.snapshot()
            for kind, size in kinds:
                runs: list[list[Recording]] = []
                for _ in range(repetitions + 1):
                    if progress is not None:
                        progress(f"roofline {kind}{size} at {depth}", done / total)
                    session.restore(start)
                    runs.append(record_test(model, session, kind, ids[depth : depth + size]))
                    done += 1
                test = Test(kind, size, depth, ())
                tests.append(fill_test(model.manifest, test, runs[1:], period))
    return tests


def record_test(model: Model, session: Session, kind: str, ids: Sequence[int]) -> list[Recording]:
    with model.record() as runs:
        if kind == "pp":
            session.prefill(ids)
        else:
            for token in ids:
                session.decode(token)
    return runs


def fill_test(
    manifest: Manifest, test: Test, runs: Sequence[Sequence[Recording]], period: float
) -> Test:
    """Return the test with the steps and times of its runs: [repetition][call].

    Decoded tokens are repetitions of one call, at the depth of the middle one.
    """
    calls = list(zip(*runs, strict=True))  # [call][repetition]
    if test.kind == "tg":
        calls = [tuple(run for column in calls for run in column)]
    steps: list[Step] = []
    outside = median = 0.0
    for every in calls:
        repeated = fastest_quarter(every)
        cycles = np.stack([run.cycles for run in repeated])
        medians = np.median(np.diff(cycles, axis=1), axis=0) * period
        whole = np.array([run.seconds for run in repeated])
        outside += float(np.median(whole - (cycles[:, -1] - cycles[:, 0]) * period))
        median += float(np.median([run.seconds for run in every]))
        first, depth = repeated[0], median_start(repeated)
        call = (first.entry, first.tokens, (depth,))
        steps += [
            replace(step, seconds=float(seconds))
            for step, seconds in zip(steps_of(manifest, call), medians, strict=True)
        ]
    return replace(test, steps=tuple(steps), outside_seconds=outside, median_seconds=median)


def fastest_quarter(runs: Sequence[Recording]) -> list[Recording]:
    return sorted(runs, key=lambda run: run.seconds)[: (len(runs) + 3) // 4]


def median_start(runs: Sequence[Recording]) -> int:
    return int(np.median([run.starts[0] for run in runs]))
