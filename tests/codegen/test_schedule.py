"""Schedules: a barrier stands between two steps exactly where one needs what another touched."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from q35c.codegen.calls import Barrier, Call, Int, Nt, Pointer, Tid, Tokens
from q35c.codegen.schedule import (
    Buffer,
    Places,
    Schedule,
    StateRef,
    Step,
    StepArgument,
    View,
    WeightRef,
)

IO = {"tokens": (0, 64), "positions": (64, 192), "logits": (256, 640)}
PLACES = Places({"w": 128, "v": 4096}, IO)


def view(name: str, size: int = 64) -> View:
    """Return all rows of a buffer, or of an io field if there is one of this name."""
    return View(name if name in IO else Buffer(name, size), 8, Tokens())


def views(names: str) -> tuple[View, ...]:
    return tuple(map(view, names.split()))


def step(reads: str, writes: str, state: str = "", args: tuple[StepArgument, ...] = ()) -> Step:
    """Return a step named by what it writes."""
    return Step(f"make {writes}", args, views(reads), views(writes), tuple(state.split()))


def barriers(*steps: Step, offsets: dict[str, int] | None = None) -> list[int]:
    """Return the numbers of the steps that have a barrier before them."""
    schedule = Schedule("test", list(steps))
    plan = schedule.plan()
    if offsets is not None:
        plan.offsets.update(offsets)
    program = schedule.place(plan, PLACES)
    assert [c.kernel for c in program if isinstance(c, Call)] == [s.kernel for s in steps]
    assert not any(isinstance(a, Barrier) and isinstance(b, Barrier) for a, b in pairwise(program))
    found, number = [], 0
    for item in program:
        if isinstance(item, Barrier):
            found.append(number)
        else:
            number += 1
    return found


def apart(*names: str) -> dict[str, int]:
    """Give every buffer its own bytes, so that reuse plays no part."""
    return {name: 64 * number for number, name in enumerate(names)}


def test_reading_what_was_written_waits() -> None:
    assert barriers(step("", "a"), step("a", "b"), offsets=apart("a", "b")) == [1]


def test_independent_steps_do_not_wait() -> None:
    steps = [step("tokens", "a"), step("tokens", "b"), step("positions", "c")]
    assert barriers(*steps, offsets=apart("a", "b", "c")) == []


def test_two_readers_need_one_barrier() -> None:
    steps = [step("", "a"), step("a", "b"), step("a", "c")]
    assert barriers(*steps, offsets=apart("a", "b", "c")) == [1]


def test_a_barrier_is_not_repeated_for_what_it_already_covers() -> None:
    """Step 3 reads what step 0 wrote; the barrier before step 2 was after that."""
    steps = [step("", "a"), step("", "b"), step("b", "c"), step("a", "d")]
    assert barriers(*steps, offsets=apart("a", "b", "c", "d")) == [2]


def test_writing_what_another_step_reads_waits() -> None:
    assert barriers(step("logits", "a"), step("", "logits"), offsets=apart("a")) == [1]


def test_writing_what_another_step_wrote_waits() -> None:
    assert barriers(step("", "a"), step("", "a")) == [1]


def test_buffers_that_share_bytes_wait_for_each_other() -> None:
    """`c` takes the bytes of `a`, which a slower thread may still be reading."""
    steps = [step("", "a"), step("a", "b"), step("", "c")]
    assert barriers(*steps, offsets=apart("a", "b", "c")) == [1]
    assert barriers(*steps, offsets={"a": 0, "b": 64, "c": 0}) == [1, 2]
    assert barriers(*steps, offsets={"a": 0, "b": 64, "c": 32}) == [1, 2], "even in part"


def test_the_plan_lets_dead_buffers_be_reused_and_the_barrier_follows() -> None:
    steps = [step("tokens", "a"), step("a", "b"), step("tokens", "c"), step("b c", "logits")]
    schedule = Schedule("test", steps)
    plan = schedule.plan()
    assert plan.offsets["c"] == plan.offsets["a"] != plan.offsets["b"]
    assert barriers(*steps) == [1, 2, 3]


def test_buffers_of_other_sizes_overlap_by_their_bytes() -> None:
    """The end of a buffer counts, not only its start."""
    big = View(Buffer("big", 200), 8, Tokens())
    steps = [Step("big", (), (), (big,)), step("", "a"), step("", "b")]
    assert barriers(*steps, offsets={"big": 0, "a": 256, "b": 192}) == [2]
    assert barriers(*steps, offsets={"big": 0, "a": 256, "b": 320}) == []


def test_a_part_of_a_buffer_counts_as_the_buffer() -> None:
    part = View(Buffer("a", 64), 8, Tokens(), offset=32)
    reader = Step("read", (), (part,), views("b"))
    assert barriers(step("", "a"), reader, offsets=apart("a", "b")) == [1]


def test_steps_of_one_state_wait_and_of_two_do_not() -> None:
    first, second = step("", "a", state="keys"), step("", "b", state="keys")
    other = step("", "c", state="values delta")
    assert barriers(first, second, offsets=apart("a", "b")) == [1]
    assert barriers(first, other, offsets=apart("a", "c")) == []


def test_io_and_arena_of_equal_offsets_are_different_memory() -> None:
    assert barriers(step("", "a"), step("tokens", "b"), offsets=apart("a", "b")) == []


def test_arguments_become_places() -> None:
    x = Buffer("x", 256)
    whole, part = View(x, 16, Tokens()), View(x, 16, Tokens(), offset=64)
    last = View(x, 16, Int(1), offset=64, last_row=True)
    args = (
        WeightRef("v"), whole, part, last, View("logits", 8, Tokens()), StateRef(512), Tokens(),
        Int(7),
    )  # fmt: skip
    schedule = Schedule("test", [Step("kernel", args, (whole,), ())])
    plan = schedule.plan()
    plan.offsets["x"] = 1024
    (call,) = schedule.place(plan, PLACES)
    assert isinstance(call, Call)
    assert call.args == (
        Pointer("weights", 4096),
        Pointer("arena", 1024, 64),
        Pointer("arena", 1088, 64),
        Pointer("arena", 1088, 64, last_row=True),
        Pointer("io", 256, 32),
        Pointer("state", 512),
        Tokens(),
        Int(7),
        Tid(),
        Nt(),
    )


def test_a_buffer_lives_from_its_first_to_its_last_step() -> None:
    """`a` is read again at the end, so nothing in between may take its bytes."""
    steps = [step("", "a"), step("a", "b"), step("b", "c"), step("a c", "d")]
    plan = Schedule("test", steps).plan()
    assert plan.offsets["a"] not in {plan.offsets[name] for name in "bcd"}
    assert plan.offsets["c"] != plan.offsets["b"] and plan.bytes == 3 * 64


def random_schedule(seed: int) -> Schedule:
    """Return steps that read earlier buffers and write new ones, with states and io now and then."""
    rng = np.random.default_rng(seed)
    schedule = Schedule(f"random {seed}")
    made: list[View] = [view("tokens"), view("positions")]
    for number in range(int(rng.integers(3, 20))):
        recent = made[-5:]
        reads = [recent[i] for i in rng.integers(0, len(recent), rng.integers(0, 4))]
        out = view(f"b{number}", int(rng.choice([64, 100, 640])))
        state = tuple(rng.choice(["s0", "s1"], 1)) if rng.random() < 0.2 else ()
        schedule.steps.append(Step(f"k{number}", (), tuple(reads), (out,), state))
        made.append(out)
    return schedule


@pytest.mark.parametrize("seed", range(80))
def test_random_schedules(seed: int) -> None:
    """Steps between two barriers run in any order: none may touch what another writes."""
    schedule = random_schedule(seed)
    plan = schedule.plan()
    program = schedule.place(plan, PLACES)
    steps = {step.kernel: step for step in schedule.steps}
    groups: list[list[Step]] = [[]]
    for item in program:
        if isinstance(item, Barrier):
            groups.append([])
        else:
            groups[-1].append(steps[item.kernel])
    for group in groups:
        for number, later in enumerate(group):
            for earlier in group[:number]:
                assert not conflict(earlier, later, plan.offsets), f"seed {seed}"
    for before, after in pairwise(groups):
        is_needed = any(conflict(step, after[0], plan.offsets) for step in before)
        assert is_needed, f"seed {seed}: a barrier before {after[0].kernel} without need"


def conflict(a: Step, b: Step, offsets: dict[str, int]) -> bool:
    """Tell whether one of two steps writes a byte or state that the other touches."""
    if set(a.state) & set(b.state):
        return True
    first, second = (touched(s, offsets) for s in (a, b))
    return any(bool(first[i] & second[j]) for i, j in (("w", "w"), ("w", "r"), ("r", "w")))


def touched(step: Step, offsets: dict[str, int]) -> dict[str, set[tuple[str, int]]]:
    """Return the bytes a step reads and writes."""
    found: dict[str, set[tuple[str, int]]] = {"r": set(), "w": set()}
    for kind, group in (("r", step.reads), ("w", step.writes)):
        for item in group:
            if isinstance(item.home, Buffer):
                blob, start, size = "arena", offsets[item.home.name], item.home.bytes
            else:
                blob, (start, size) = "io", IO[item.home]
            found[kind] |= {(blob, byte) for byte in range(start, start + size)}
    return found


@pytest.mark.parametrize("seed", range(80))
def test_random_plans_keep_values_until_their_last_read(seed: int) -> None:
    """Run the steps in order over an arena of names: every reader finds what was written for it."""
    schedule = random_schedule(seed)
    plan = schedule.plan()
    arena: dict[int, str] = {}
    for current in schedule.steps:
        for item in current.reads:
            if isinstance(item.home, Buffer):
                start = plan.offsets[item.home.name]
                owners = {arena.get(start + byte) for byte in range(item.home.bytes)}
                assert owners == {item.home.name}, f"seed {seed}, {current.kernel}"
        for item in current.writes:
            assert isinstance(item.home, Buffer)
            start = plan.offsets[item.home.name]
            arena.update({start + byte: item.home.name for byte in range(item.home.bytes)})
    assert max(arena) < plan.bytes
