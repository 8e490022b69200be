"""Measure q35c beside llama.cpp, onnxruntime-genai and eager PyTorch on the same shape, in one run.

    python bench/peers.py --quick                  # a first look: prefill 512 and decode, two rounds
    python bench/peers.py                          # the tables of docs/measurements.md, about an hour
    python bench/peers.py --only llama,ort         # some of the systems
    python bench/peers.py --precision bf16,w4-small --long
    python bench/peers.py --artifact fast.q35c     # an artifact as it is, instead of compiling
    python bench/peers.py --prepare                # only install, build and write what is missing

The first run needs a package index, gcc and cmake: it makes an environment for the peers, builds
llama.cpp from the source in llama-cpp-python (about 6 minutes on 2 cores), and writes models with random
weights; all of it stays in the cache directory. A peer that cannot be had is skipped, with the reason.

Every sample is a process of its own, and only one runs at a time; the systems take turns. Before and
after each, a probe measures what this machine can do at that moment. A sample beside a probe under 85 %
of the run's median, or during which other processes used the processor, is taken again; a figure for which
that does not help is marked with ~. A decode sample beside a probe of 125 % is taken again too: memory that
was twice as fast for one system says nothing about the others. Only ratios within one run are findings.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peer import report, systems
from peer.install import Cache, default_cache
from peer.machine import Probe
from peer.rounds import Rounds, machine_facts, make_plan
from peer.systems import Maker, System, Test

from q35c.ir.precision import POLICIES
from q35c.progress import Progress
from q35c.runtime.cpu.machine import default_threads

GROUPS = ("q35c", "llama", "ort", "eager")
_CONTEXT_STEP = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """How many rounds of which tests."""

    rounds: int
    deep_rounds: int
    is_quick: bool
    is_long: bool

    def tests(self) -> list[tuple[Test, int]]:
        """Return the tests, each with its number of rounds."""
        short = [Test("pp512", prompt=512), Test("tg32", decode=32)]
        if self.is_quick:
            return [(test, self.rounds) for test in short]
        start = Test(systems.START, prompt=16, repeats=1, is_warm=False)
        short = [start, Test("pp128", prompt=128), *short]
        # long ones are their own warm-up
        deep = [
            Test("pp4096", prompt=4096, repeats=1, is_warm=False),
            Test("tg32 @ d4096", decode=32, depth=4096, repeats=1, is_warm=False),
        ]
        found = [(test, self.rounds) for test in short]
        found += [(test, self.deep_rounds) for test in deep]
        if self.is_long:
            found.append(
                (Test("tg32 @ d32768", decode=32, depth=32768, repeats=1, is_warm=False), 1)
            )
        return found


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="qwen3.5-0.8b", help="a family name [qwen3.5-0.8b]")
    add(
        "--cache",
        type=Path,
        default=default_cache(),
        help="where peers and models stay; $Q35C_PEERS_CACHE",
    )
    add("--only", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}")
    add("--precision", help="q35c's, as a list [all but f32]")
    add("--artifact", type=Path, action="append", default=[], help="measure this file of q35c")
    add("--llama-types", default="Q4_0,Q4_K_M,Q8_0", help="llama.cpp's quantizations")
    add("--rounds", type=int, help="of each short test [5; 2 with --quick]")
    add("--deep-rounds", type=int, default=2, help="of tests with 4,096 tokens [2]")
    add("--quick", action="store_true", help="prefill 512 and decode only")
    add("--long", action="store_true", help="also decode behind 32,768 tokens")
    add("--threads", type=int, default=default_threads(), help="[physical cores]")
    add("--retries", type=int, default=3, help="of disturbed samples [3]")
    add("--patience", type=float, default=60, help="seconds to wait for a quiet moment [60]")
    add("--prepare", action="store_true", help="make what is missing and stop")
    add("-o", "--output", type=Path, default=Path("peers.md"), help="and .json [peers.md]")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(GROUPS):
        parser.error(f"--only: no system {min(unknown)!r}; there are {', '.join(GROUPS)}")
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.cache = options.cache.resolve()
    return options


def choose_makers(
    options: argparse.Namespace, cache: Cache, tests: Sequence[Test]
) -> list[tuple[str, Maker]]:
    """Return the systems asked for, each as a function that makes what it needs."""
    model, only = options.model, options.only.split(",")
    makers: list[tuple[str, Maker]] = []
    if "q35c" in only:
        makers += [(str(path), partial(systems.ours, path)) for path in options.artifact]
        default = [] if options.artifact else [name for name in POLICIES if name != "f32"]
        precisions = options.precision.split(",") if options.precision else default
        context = max(test.context for test in tests)
        context = -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
        for name in precisions:
            makers.append((f"q35c {name}", partial(compile_ours, cache, model, name, context)))
    if "llama" in only:
        for kind in options.llama_types.split(","):
            for is_repacked in (True, False):
                make = partial(systems.llama_system, cache, model, kind, is_repacked)
                makers.append((f"llama.cpp {kind}", make))
    if "ort" in only:
        makers.append(("onnxruntime-genai", partial(systems.ort_system, cache, model)))
    if "eager" in only:
        makers.append(("eager PyTorch", partial(systems.eager_system, cache, model)))
    return makers


def compile_ours(cache: Cache, model: str, precision: str, context: int) -> System:
    """Compile the model, unless this source compiled it before."""
    return systems.ours(cache.artifact(model, precision, context))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    options = read_options()
    cache = Cache(options.cache, say)
    plan = Plan(options.rounds, options.deep_rounds, options.quick, options.long)
    tests = plan.tests()
    makers = choose_makers(options, cache, [test for test, _ in tests])
    found, skipped = systems.make_systems(makers, say)
    if options.prepare or not found:
        say(f"ready: {', '.join(system.name for system in found) or 'nothing'}")
        sys.exit(0 if found else 1)
    rounds = Rounds(
        Probe(cache.root, options.threads), options.threads, options.patience, options.retries
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = {"model": options.model, "threads": options.threads, **machine_facts()}
    try:
        with Progress() as progress:
            rounds.run(make_plan(found, tests), progress)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not cost the report
            signal.signal(number, signal.SIG_IGN)
        say("stopped: the report has what was measured so far")
    finally:
        rounds.probe.close()
    if not rounds.samples:
        sys.exit(
            f"no sample: in {options.patience:.0f} s of waiting for each, other processes never left "
            "this machine alone; stop them, or take disturbed samples with --patience 0 --retries 0"
        )
    facts["versions"] = cache.versions()
    notes = {f"skipped {name}": why for name, why in skipped.items()} | rounds.failures
    config = systems.read_config(options.model)
    results = report.Results(config, found, rounds.samples)
    names = [test for test, _ in tests]
    text = report.write_markdown(results, names, rounds.samples, facts, notes)
    document = report.write_json(results, names, rounds.samples, facts, notes)
    options.output.write_text(text)
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
