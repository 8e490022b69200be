"""Take samples round by round, each alone between two probes, and repeat those that were disturbed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peer.machine import ChildError, Disturbed, Limits, Probe, run_child, wait_until_quiet
from peer.systems import System, Test

_ENOUGH = 0.85  # of the run's median probe
_TOO_MUCH = (
    1.25  # of its bandwidth: some machines read twice as fast for minutes, for one system only
)
_OTHERS_SHARE = 0.06  # of the machine that others may use during a sample
_GIVE_UP_SHARE = 0.15  # a sample that is disturbed more is not even finished
_NOISY_SECONDS = 90.0  # for a sample on a machine that did not fall quiet: it will not count
_TOKEN_WEIGHTS = (1.0, 6.0, 800.0)  # prefill token, decode token, start of a process: for progress


@dataclass(slots=True)
class Sample:
    """One system's result of one test, and the machine's limits before and after it."""

    system: str
    test: str
    seconds: list[float]
    load_seconds: float | None
    start_seconds: float
    peak_bytes: int
    others_share: float
    before: Limits
    after: Limits
    tokens: int
    is_decode: bool = False
    is_clean: bool = True

    @property
    def rate(self) -> float:
        """Return tokens per second: the median of the repetitions."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def limits(self) -> Limits:
        """Return the mean of the two probes."""
        return Limits(
            (self.before.bandwidth + self.after.bandwidth) / 2,
            (self.before.int8 + self.after.int8) / 2,
        )

    @property
    def worst(self) -> Limits:
        return Limits(
            min(self.before.bandwidth, self.after.bandwidth), min(self.before.int8, self.after.int8)
        )


@dataclass(slots=True)
class Rounds:
    """The samples of a run."""

    probe: Probe
    threads: int
    patience: float
    retries: int
    timeout: float = 1800
    samples: list[Sample] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def run(
        self, plan: Sequence[tuple[System, Test]], report: Callable[[str, float], None]
    ) -> None:
        """Take every sample of the plan in its order, then repeat the disturbed ones, a few times."""
        for attempt in range(self.retries + 1):
            total = sum(_weight(test) for _, test in plan)
            begin, done = time.monotonic(), 0.0
            for system, test in plan:
                left = (time.monotonic() - begin) * (total - done) / done if done else None
                report(_progress_text(attempt, system, test, left), done / total)
                self._take(system, test, is_last=attempt == self.retries)
                done += _weight(test)
            plan = self._disturbed(plan)
            if not plan:
                return

    def _take(self, system: System, test: Test, is_last: bool) -> None:
        """Add a sample, if the machine falls quiet; the last attempt takes one in any case."""
        key = f"{system.name}: {test.name}"
        if key in self.failures:
            return
        is_quiet = wait_until_quiet(self.patience, _OTHERS_SHARE)
        if not is_quiet and not is_last:
            return
        before = self.probe.measure()
        try:
            result = run_child(
                system.command(test, self.threads),
                system.environment,
                self.timeout if is_quiet else _NOISY_SECONDS,
                _GIVE_UP_SHARE if is_quiet else 1.0,
            )
            seconds, load = system.seconds(result.line)
        except Disturbed as error:
            if is_last:
                self.failures[key] = f"no sample: {error}"
            return  # it is taken again in the next attempt
        except (ChildError, KeyError, ValueError) as error:
            self.failures[key] = str(error)
            return
        self.samples.append(
            Sample(
                system.name,
                test.name,
                seconds,
                load,
                result.first_output,
                result.peak_bytes,
                result.others_share,
                before,
                self.probe.measure(),
                test.tokens,
                is_decode=bool(test.decode),
            )
        )

    def _disturbed(self, plan: Sequence[tuple[System, Test]]) -> list[tuple[System, Test]]:
        """Mark the samples taken in slow moments; return what has to be taken again."""
        mark_clean(self.samples)
        lacking: list[tuple[System, Test]] = []
        for system, test in plan:
            wanted = sum(item == (system, test) for item in plan)
            got = sum(
                sample.is_clean and (sample.system, sample.test) == (system.name, test.name)
                for sample in self.samples
            )
            already = sum(item == (system, test) for item in lacking)
            is_possible = f"{system.name}: {test.name}" not in self.failures
            if is_possible and already < wanted - got:
                lacking.append((system, test))
        return lacking


def _progress_text(attempt: int, system: System, test: Test, left: float | None) -> str:
    again = f", attempt {attempt + 1}" if attempt else ""
    remaining = "" if left is None else f", {left / 60:.0f} min left in this pass"
    return f"{system.name} {test.name}{again}{remaining}"


def mark_clean(samples: Iterable[Sample]) -> None:
    """Decide which samples count, by the median probe of all of them and by who else was running."""
    samples = list(samples)
    if not samples:
        return
    limits = median_limits(samples)
    for sample in samples:
        is_slow = (
            sample.worst.bandwidth < _ENOUGH * limits.bandwidth
            or sample.worst.int8 < _ENOUGH * limits.int8
        )
        # prefill hardly feels how fast memory is, decoding feels little else
        fastest = max(sample.before.bandwidth, sample.after.bandwidth)
        is_fast = sample.is_decode and fastest > _TOO_MUCH * limits.bandwidth
        sample.is_clean = not is_slow and not is_fast and sample.others_share <= _OTHERS_SHARE


def median_limits(samples: Sequence[Sample]) -> Limits:
    """Return the run's median probe."""
    probes = [probe for sample in samples for probe in (sample.before, sample.after)]
    return Limits(
        statistics.median(probe.bandwidth for probe in probes),
        statistics.median(probe.int8 for probe in probes),
    )


def make_plan(
    systems: Sequence[System], tests: Sequence[tuple[Test, int]]
) -> list[tuple[System, Test]]:
    """Return the order of samples: round by round, in a round test by test, in a test all systems."""
    plan: list[tuple[System, Test]] = []
    for at in range(max(rounds for _, rounds in tests)):
        for test, rounds in tests:
            # every round starts with another system, so that none always follows the same one
            shift = at % len(systems)
            for system in [*systems[shift:], *systems[:shift]]:
                is_wanted = not system.is_prefill_only or test.is_prefill
                if at < rounds and is_wanted:
                    plan.append((system, test))
    return plan


def machine_facts() -> dict[str, Any]:
    """Return what kind of machine this is, without its name."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "load_average": os.getloadavg()[0],
    }


def _weight(test: Test) -> float:
    prefill, decode, start = _TOKEN_WEIGHTS
    runs = test.repeats + test.is_warm
    return start + runs * (prefill * (test.prompt + test.depth) + decode * test.decode)
