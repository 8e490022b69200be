"""The number of threads gives way to neighbours, on a machine of arithmetic: no test here looks at a real clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import q35c
from q35c.runtime.cpu.pace import Pace


class Machine:
    """Run steps on a clock of its own: `seconds` of a step for a number of threads, and cores lost in it."""

    def __init__(self, count: int, seconds: Callable[[int], float]) -> None:
        self.now, self.lost = 0.0, 0.0
        self.seconds, self.loses = seconds, False
        self.used: list[int] = []
        self.pace = Pace(count, lambda: self.now, lambda: int(self.lost))

    def run(self, seconds: float) -> int:
        """Run steps for so long; return how many."""
        steps, end = 0, self.now + seconds
        while self.now < end:
            threads = self.pace.threads
            took = self.seconds(threads)
            self.now += took
            self.lost += took * 100 if self.loses else 0
            kept = 0.5 if self.loses and threads > 1 else 1.0
            self.pace.note(("decode", 1), took, took * threads * kept)
            self.used.append(threads)
            steps += 1
        return steps


def quiet(work: float) -> Callable[[int], float]:
    return lambda threads: work / threads


def jammed(work: float, at_most: int, jam: float) -> Callable[[int], float]:
    """More than so many threads wait for each other."""
    return lambda threads: work / threads if threads <= at_most else jam


@pytest.mark.parametrize("work", [0.0004, 0.09, 2.0])
def test_a_quiet_machine_always_uses_all(work: float) -> None:
    machine = Machine(2, quiet(work))
    machine.run(5000 * work)
    assert set(machine.used) == {2}


def test_short_interruptions_are_no_neighbour() -> None:
    machine = Machine(2, quiet(0.02))
    machine.pace = Pace(2, lambda: machine.now, lambda: int(100 * machine.now))
    machine.run(20)
    assert set(machine.used) == {2}


def test_longer_contexts_are_no_disturbance() -> None:
    machine = Machine(2, lambda threads: (0.0004 + 1e-7 * len(machine.used)) / threads)
    machine.run(20)
    assert set(machine.used) == {2}


@pytest.mark.parametrize(("work", "jam"), [(0.0014, 0.062), (0.0014, 0.006), (0.09, 0.4)])
@pytest.mark.parametrize("begins_quiet", [True, False])
def test_a_neighbour_leaves_most_of_one_threads_rate(
    work: float, jam: float, begins_quiet: bool
) -> None:
    machine = Machine(2, quiet(work))
    if begins_quiet:
        machine.run(100 * work)
    machine.seconds, machine.loses = jammed(work, 1, jam), True
    machine.run(2)
    seconds = 30
    assert machine.run(seconds) > 0.8 * seconds / work
    machine.seconds, machine.loses = quiet(work), False
    machine.run(10)
    machine.used.clear()
    machine.run(10)
    assert set(machine.used) == {2}, "all threads come back when the neighbour has gone"


def test_a_neighbour_after_long_quiet_is_noticed_soon() -> None:
    machine = Machine(2, lambda threads: 0.0007 if len(machine.used) % 2 else 0.002)
    machine.run(60)  # two lengths of steps: tries in vain
    assert machine.used.count(1) < 0.02 * len(machine.used)
    machine.seconds, machine.loses = jammed(0.002, 1, 0.05), True
    machine.run(0.5)
    machine.used.clear()
    machine.run(4)
    assert machine.used.count(1) > 0.9 * len(machine.used)


@pytest.mark.parametrize(("fit", "expected"), [(7, 7), (4, 4), (1, 1)])
def test_many_threads_find_how_many_fit(fit: int, expected: int) -> None:
    machine = Machine(8, jammed(0.002, fit, 0.05))
    machine.loses = True
    machine.run(20)
    machine.used.clear()
    machine.run(40)
    assert np.median(machine.used) == expected


def test_one_thread_has_no_choice() -> None:
    machine = Machine(1, lambda threads: 0.01 * (1 + len(machine.used) % 7))
    machine.run(5)
    assert set(machine.used) == {1}


def test_only_the_default_gives_way(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fake_artifact import write_fake

    write_fake(tmp_path / "m")
    monkeypatch.setattr("q35c.runtime.cpu.machine.default_threads", lambda: 2)
    monkeypatch.delenv("Q35C_THREADS", raising=False)
    with q35c.load(tmp_path / "m") as model:
        assert model._executor.device._pace is not None
        want = model.score([1, 2, 3])
        monkeypatch.setattr(Pace, "threads", 1)
        assert np.array_equal(model.score([1, 2, 3]), want)
    with q35c.load(tmp_path / "m", threads=2) as model:
        assert model._executor.device._pace is None
    monkeypatch.setenv("Q35C_THREADS", "2")
    with q35c.load(tmp_path / "m") as model:
        assert model._executor.device._pace is None
