"""What README promises about bits, for each precision: cuts on the grid, rows of a batch, cuts elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.layouts.blobs import GRID
from q35c.runtime.prompts import pieces
from q35c.runtime.session import Session
from q35c.verify import row_kl
from tests.compiled import BATCH, artifact, random_ids

# Every precision and kind of layer; at night all pairs are run.
MODELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("dense", "f32", {}),
    ("moe", "bf16", {}),
    ("dense", "w8", {}),
    ("moe", "w4", {}),
    ("dense", "w4-small", {}),
    ("moe", "f32", {"kv_dtype": "int8"}),
)
ALL_MODELS = [
    (kind, precision, cache)
    for kind in ("dense", "moe")
    for precision, caches in {
        "f32": ("auto", "bf16", "int8"),
        "bf16": ("auto", "int8"),
        "w8": ("auto",),
        "w4": ("auto", "int8"),
        "w4-small": ("auto",),
    }.items()
    for cache in ({"kv_dtype": cache} if cache != "auto" else {} for cache in caches)
]
IDS = random_ids(600, seed=16)
STEPS = 3  # decode steps behind a prompt: they read all of the state
# Cuts that the whole sequence has, too: none; mid-chunk, with few rows of a chunk before or behind; behind a long piece.
SHARED = ((), (5,), (37, 91), (60,), (290,))


def load(key: Any) -> q35c.Model:
    """Return a model on one thread: short runs have nothing to share out."""
    kind, precision, cache = key
    return q35c.load(artifact(kind, precision, **cache), threads=1)


def run(session: Session, end: int, cuts: Iterable[int]) -> list[np.ndarray]:
    """Return the state after IDS[:end] in pieces, the logits before it, and those of a few steps behind it."""
    session.reset()
    for part in np.split(IDS[:end], sorted(cuts)):
        logits = session.prefill(part)
    state = session.snapshot().tensors
    return [*state, logits, *(session.decode(int(token)) for token in IDS[end : end + STEPS])]


def equal(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(got, want, strict=True))


def compare_cuts(session: Session, end: int, shared: Iterable[int], is_full: bool) -> None:
    """Fail unless all cuts on the grid, the first and the last alone, or each, leave what none of them leaves."""
    before = {cut for cut in shared if cut < end}
    want = run(session, end, before)
    grid = range(GRID, end, GRID)
    for cuts in (grid, *([cut] for cut in (grid if is_full else (grid[0], grid[-1])))):
        got = run(session, end, before.union(cuts))
        assert equal(got, want), f"{end} tokens, cut at {before} and {list(cuts)}"


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_a_cut_on_the_grid_changes_no_bit(key: Any) -> None:
    """What is left behind the last cut is one row, few, a part of a chunk or whole chunks."""
    with load(key).session() as session:
        for shared in SHARED:
            for end in (65, 261):
                compare_cuts(session, end, shared, is_full=False)


@pytest.mark.slow
@pytest.mark.parametrize("key", MODELS, ids=str)
def test_a_cut_on_the_grid_changes_no_bit_at_any_length(key: Any) -> None:
    with load(key).session() as session:
        for end in (*range(33, 142), 513):
            compare_cuts(session, end, SHARED[end % len(SHARED)], is_full=True)


@pytest.mark.nightly
@pytest.mark.parametrize("key", ALL_MODELS, ids=str)
def test_no_pair_of_cuts_changes_a_bit(key: Any) -> None:
    with load(key).session() as session:
        for end in (*range(33, 142), *range(508, 522)):
            for shared in ((), SHARED[end % len(SHARED)]):
                compare_cuts(session, end, shared, is_full=True)


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_scores_of_pieces_on_the_grid_are_those_of_the_whole(key: Any) -> None:
    with load(key).session() as session:
        want = session.score(IDS)
        last = run(session, len(IDS) - STEPS, ())[-STEPS - 1]
        assert np.array_equal(last, want[len(IDS) - STEPS - 1])
        session.reset()
        parts = [session.score(part) for part in np.split(IDS, [GRID, 6 * GRID, 17 * GRID])]
        assert np.array_equal(np.concatenate(parts), want)


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_a_row_of_a_batch_has_the_bits_of_the_same_row_alone(key: Any) -> None:
    compiled = load(key)
    prompts = [IDS[:length] for length in (3, 65, 300, 33)]
    assert len(prompts) > BATCH  # they take two steps
    sessions = [compiled.session() for _ in prompts]
    alone = []
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
        before = session.snapshot()
        logits = [session.decode(int(token)) for token in IDS[:8]]
        alone.append([np.stack(logits), *session.snapshot().tensors])
        session.restore(before)
    rows = [Session.decode_together(sessions, [int(token)] * len(sessions)) for token in IDS[:8]]
    for number, session in enumerate(sessions):
        got = [np.stack([row[number] for row in rows]), *session.snapshot().tensors]
        assert equal(got, alone[number])
        session.close()


def off_grid(key: Any, length: int, cuts: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of all rows behind each cut, and the same of the whole sequence; then those of decode steps."""
    got, want = [], []
    with load(key).session() as session:
        whole = session.score(IDS[:length])
        for cut in cuts:
            session.reset()
            session.prefill(IDS[:cut])
            got.append(session.score(IDS[cut:length]))
            want.append(whole[cut:])
        session.reset()
        got.append(np.stack([session.decode(int(token)) for token in IDS[:length]]))
        want.append(whole)
    return np.concatenate(got), np.concatenate(want)


def check_off_grid(key: Any, length: int, cuts: Iterable[int]) -> None:
    got, want = off_grid(key, length, cuts)
    if key[1] == "f32":
        limit = 1e-4 if key[2] else 2e-6  # a rounded cache may hold another code
        assert np.abs(got - want).max() <= limit * (want.max() - want.min())
    assert row_kl(got, want).mean() <= 2e-4


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_cuts_elsewhere_and_steps_differ_by_rounding(key: Any) -> None:
    check_off_grid(key, 100, range(1, 100, 9))


@pytest.mark.nightly
@pytest.mark.parametrize("key", ALL_MODELS, ids=str)
def test_every_cut_elsewhere_differs_by_rounding(key: Any) -> None:
    check_off_grid(key, 140, range(1, 140))


@pytest.mark.parametrize("before", [0, 1, 31, 32, 70, 255])
@pytest.mark.parametrize("most", [1, 5, 32, 40, 256])
def test_calls_end_on_the_grid_where_they_can(before: int, most: int) -> None:
    for count in (1, 2, 33, 300, 513):
        spans = list(pieces(before, count, most))
        assert spans[0][0] == 0 and spans[-1][1] == count
        assert all(0 < end - start <= most for start, end in spans)
        assert all(end == start for (_, end), (start, _) in pairwise(spans))
        if most >= GRID:
            assert all((before + end) % GRID == 0 for _, end in spans[:-1])
            assert len(spans) <= count // (most // GRID * GRID) + 2
