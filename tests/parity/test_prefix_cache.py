"""S6: with whatever is kept of earlier prompts, the logits are bit for bit those of a cold start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import q35c
from q35c.layouts.cache import CELLS
from q35c.runtime.lease import last_cut
from q35c.runtime.memory import state_bytes
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.session import Session
from tests.compiled import artifact
from tests.prompts import conversations

MODELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("moe", "bf16", {}),
    ("dense", "w4", {}),
    ("dense", "f32", {"kv_dtype": "int8"}),
)
START, STEPS = (
    306,
    3,
)  # a token that begins messages; steps behind a prompt, which read all of the state


def fill(session: Session, ids: list[int]) -> np.ndarray:
    """Fill a session as a cold server does, but for the slices, of which there may be several in a call."""
    if border := last_cut(len(ids)):
        session.extend(ids[:border])
    return session.prefill(ids[border:])


def said(session: Session, logits: np.ndarray, neighbour: Session) -> list[np.ndarray]:
    """Return the logits of a few greedy steps, made beside another row."""
    found = [logits]
    for _ in range(STEPS):
        rows = Session.decode_together([neighbour, session], [1, int(found[-1].argmax())])
        found.append(rows[1])
    return found


def check(key: Any, count: int, seed: int) -> None:
    kind, precision, options = key
    with q35c.load(artifact(kind, precision, **options), threads=1) as model:
        # Room for all, for a few, and for a single one.
        for states in (100.0, 5.0, 1.2):
            budget = int(states * state_bytes(model.manifest, 600))
            cache = PrefixCache(model.session, model.manifest, budget, START)
            found = walk(model, cache, count, seed)
            cache.close()
            assert found > (0.5 if states == 100 else 0.05), (
                f"only {found:.0%} found, {states} states"
            )


def walk(model: q35c.Model, cache: PrefixCache, count: int, seed: int) -> float:
    """Compare random prompts with a cold start; return the share of tokens that the cache had."""
    rng = np.random.default_rng(seed)
    found = total = 0
    with model.session() as session, model.session() as neighbour:
        for ids in conversations(seed, count, vocab=306, start=START, most=1200):
            neighbour.reset()
            neighbour.prefill([1, 2, 3])
            session.reset()
            want = said(session, fill(session, ids), neighbour)
            lease = cache.open(ids, len(ids) + STEPS + 1)
            found, total = found + lease.cached_tokens, total + len(ids)
            while (logits := lease.advance()) is None:
                if rng.random() < 0.02:
                    break  # cancelled
            if logits is not None:
                got = said(lease.session, logits, neighbour)
                place = f"seed {seed}: {lease.cached_tokens} of {len(ids)} tokens"
                assert np.array_equal(np.array(got), np.array(want)), place
            lease.end()
    return found / total


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_conversations_are_bit_equal_to_a_cold_start(key: Any) -> None:
    check(key, count=16, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("key", [*MODELS, ("moe", "w4-small", {})], ids=str)
def test_a_thousand_prompts(key: Any) -> None:
    check(key, count=334, seed=2)  # with each of three budgets


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_rewinding_restores_every_bit(key: Any) -> None:
    """At every length modulo a slice: what later tokens left in the blocks of keys and values is never read."""
    kind, precision, options = key
    first, second = (np.random.default_rng(i).integers(0, 306, 70).tolist() for i in range(2))
    with (
        q35c.load(artifact(kind, precision, **options), threads=1) as model,
        model.session() as session,
    ):
        for length in range(1, 70, 3):
            session.reset()
            session.prefill(first[:length])
            checkpoint, snapshot = session.checkpoint(), session.snapshot()
            want = session.prefill(second)
            session.rewind(checkpoint)
            session.prefill(first)
            session.rewind(checkpoint)
            if length % CELLS == 0:  # else the last block holds more than is in use
                assert all(map(np.array_equal, session.snapshot().tensors, snapshot.tensors))
            assert np.array_equal(session.prefill(second), want), length
