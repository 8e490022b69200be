"""Text, images and clips against transformers' whole multimodal model; rows come from its own tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import OptionError, PromptError
from q35c.runtime.multimodal import MultimodalPrompt, Picture
from q35c.runtime.session import Session
from q35c.serve.engine import Engine
from q35c.serve.request import Started
from tests.compiled import artifact, model
from tests.parity.scenes import (
    END,
    START,
    Frames,
    Image,
    oracle_logits,
    oracle_positions,
    picture_of,
    prompt_of,
)
from tests.parity.test_parity import assert_parity
from tests.serve.talk import Answer, ask, request

KINDS = ("dense", "moe")
TALL, WIDE = Image(16, 2, seed=1), Image(6, 10, seed=2)
SCENE = (
    (5, 6, 7, START), WIDE, (END, 8, START), TALL, (END, START, 11, 12), Frames(4, 8, 3), (13, 14), Frames(4, 8, 4),
    (END, END, 15, 16, 17, 18, 19),
)  # fmt: skip
CELLS = 4 + 15 + 3 + 8 + 4 + 8 + 2 + 8 + 7
AFTER = 5  # of the last text: decoded one by one


def seeing(kind: str, precision: str = "f32") -> q35c.Model:
    """Return a tiny model whose entries take rows."""
    return model(kind, precision, takes_rows=True)


@pytest.mark.parametrize("kind", KINDS)
def test_score_equals_the_whole_model(kind: str) -> None:
    prompt, want = prompt_of(kind, *SCENE), oracle_logits(kind, *SCENE)
    assert len(prompt) == len(want) == CELLS
    got = seeing(kind).score(prompt)
    assert_parity(got, want)
    assert np.abs(got - want).max() <= 2e-5 * np.ptp(want)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_cut_at_every_place_and_decode_after(kind: str) -> None:
    """The second part by `score`, so that every row of a picture behind a cut is compared; then steps of text."""
    prompt, want = prompt_of(kind, *SCENE), oracle_logits(kind, *SCENE)
    end = CELLS - AFTER
    with seeing(kind).session() as session:
        for cut in range(1, end):
            session.reset()
            got = [session.prefill(prompt[:cut])[None], session.score(prompt[cut:end])]
            got += [session.decode(int(token))[None] for token in prompt.ids[end:]]
            logits = np.concatenate(got)
            assert np.abs(logits - want[cut - 1 :]).max() <= 2e-5 * np.ptp(want), cut
            assert session.length == CELLS and session.position == prompt.advance


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_many_small_pieces(kind: str) -> None:
    prompt, want = prompt_of(kind, *SCENE), oracle_logits(kind, *SCENE)
    with seeing(kind).session() as session:
        for start in range(0, CELLS - 7, 7):
            session.extend(prompt[start : start + 7])
        logits = session.prefill(prompt[session.length :])
    assert np.abs(logits - want[-1]).max() <= 2e-5 * np.ptp(want)


@pytest.mark.parametrize(
    "parts",
    [
        ((5, 6), WIDE),
        (TALL, (5,)),
        ((1,), WIDE, (2,), Image(2, 2), (3,), WIDE, (4, 5)),
        ((1,), Frames(4, 4, 5), (2,), Frames(4, 4, 6), (3,), TALL, (4,), Frames(2, 6, 7), (5,)),
    ],
    ids=["it ends with an image", "it begins with one", "one image twice", "two clips"],
)
def test_other_orders(parts) -> None:
    want = oracle_logits("dense", *parts)
    got = seeing("dense").score(prompt_of("dense", *parts))
    assert np.abs(got - want).max() <= 2e-5 * np.ptp(want)


def test_positions_are_those_of_transformers() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        parts: list = [tuple(range(1, int(rng.integers(2, 6))))]
        for _ in range(int(rng.integers(1, 5))):
            height, width = (int(side) for side in rng.integers(1, 9, 2) * 2)
            parts += [
                (Image, Frames)[rng.integers(2)](height, width),
                (7,) * int(rng.integers(1, 5)),
            ]
        want, after = oracle_positions(*parts)
        blank = [
            Picture(np.zeros((p.height * p.width // 4, 1), np.float32), p.height // 2, p.width // 2)
            if isinstance(p, Image)
            else p
            for p in parts
        ]
        prompt = MultimodalPrompt.join(blank)
        np.testing.assert_array_equal(prompt.positions, want)
        assert prompt.advance == after


def test_a_text_alone_is_a_text() -> None:
    ids = list(range(1, 40))
    assert np.array_equal(
        seeing("moe").score(MultimodalPrompt.join([ids])), model("moe").score(ids)
    )


@pytest.mark.parametrize("precision", ["f32", "w4"])
def test_text_has_the_same_bits_in_a_model_that_sees(precision: str) -> None:
    ids = list(range(1, 70))
    assert np.array_equal(
        seeing("dense", precision).score(ids), model("dense", precision).score(ids)
    )


def test_a_snapshot_inside_an_image(tmp_path: Path) -> None:
    prompt = prompt_of("dense", *SCENE)
    inside = 4 + 7
    with seeing("dense").session() as session, seeing("dense").session() as other:
        session.prefill(prompt[:inside])
        saved = session.snapshot()
        assert saved.length == inside and saved.position == session.position == 4 + 5
        want = [session.prefill(prompt[inside:]), session.decode(3)]
        saved.save(tmp_path / "state")
        other.prefill([9, 9, 9])
        for restored in (saved, q35c.Snapshot.read(tmp_path / "state")):
            other.restore(restored)
            assert np.array_equal(other.ids, prompt.ids[:inside])
            got = [other.prefill(prompt[inside:]), other.decode(3)]
            assert all(map(np.array_equal, got, want))
            assert other.position == session.position < other.length == session.length


def test_a_checkpoint_inside_an_image() -> None:
    """Rewound in place, and moved to another session together with its keys and values."""
    prompt = prompt_of("dense", (5, 6, 7), Image(12, 24, seed=5), (8, 9))
    with seeing("dense").session() as session, seeing("dense").session() as other:
        session.extend(prompt[:64])
        mark = session.checkpoint()
        want = [session.prefill(prompt[64:]), session.decode(3)]
        session.rewind(mark)
        other.import_kv([session.export_kv(0, 64)], mark)
        for each in (session, other):
            assert (each.length, each.position) == (64, mark.position)
            assert all(map(np.array_equal, [each.prefill(prompt[64:]), each.decode(3)], want))


def test_rows_of_a_batch_keep_their_own_positions() -> None:
    """A sequence that saw, whose positions lag behind its cells, beside one of text: the bits of each alone."""
    prompts = [prompt_of("dense", *SCENE), MultimodalPrompt.join([list(range(1, 30))])]
    sessions = [seeing("dense").session() for _ in prompts]
    alone = []
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
        before = session.snapshot()
        alone.append(np.stack([session.decode(token) for token in (4, 5, 6)]))
        session.restore(before)
    rows = np.stack([Session.decode_together(sessions, [token] * 2) for token in (4, 5, 6)], 1)
    assert np.array_equal(rows, np.stack(alone))
    for session in sessions:
        session.close()


def test_a_cache_tells_pictures_apart_and_knows_them_again() -> None:
    """Prompts whose pads are equal: the picture crosses a border of 64 cells, where checkpoints are."""
    seen, other = Image(16, 16, seed=6), Image(16, 16, seed=7)
    prompts = [
        prompt_of("dense", tuple(range(1, 30)), picture, (5,) * 50) for picture in (seen, other)
    ]
    compiled = seeing("dense")
    plain = [compiled.generate(prompt, 6, do_sample=False) for prompt in prompts]
    cache = compiled.cache(64 << 20)
    for index, cached in ((0, 0), (0, 128), (1, 0), (1, 128), (0, 128)):
        lease = cache.open(prompts[index], 256)
        assert lease.cached_tokens == cached
        got = lease.fill()
        with compiled.session() as session:
            for start in (0, 64):
                session.extend(prompts[index][start : start + 64])
            assert np.array_equal(got, session.prefill(prompts[index][128:]))
        lease.end()
    again = [compiled.generate(prompt, 6, do_sample=False, cache=cache) for prompt in prompts]
    assert [text.ids for text in again] == [text.ids for text in plain]
    assert plain[0].timings.prompt_tokens == 29 + 64 + 50


def test_an_engine_serves_pictures_beside_texts() -> None:
    """Rows of one step, forked groups, and the next turn of a prompt whose picture is kept."""
    compiled = seeing("dense")
    prompts = [
        prompt_of("dense", tuple(range(1, 30)), Image(16, 16, seed=seed), (5,) * 50)
        for seed in (6, 7)
    ]
    mixed = [*prompts, list(range(1, 80)), prompts[0], prompts[0]]
    cache = compiled.cache(0)
    plain = [compiled.generate(prompt, 6, do_sample=False, cache=cache).ids for prompt in mixed]
    engine = Engine(compiled, cache_bytes=64 << 20)
    groups = ("", "", "", "twins", "twins")
    try:
        asked = [request(p, 6, group=g) for p, g in zip(mixed, groups, strict=True)]
        assert [tuple(answer.ids) for answer in ask(engine, *asked)] == plain
        (again,) = ask(engine, request(prompts[1], 6))
        assert again.events[0] == Started(128) and tuple(again.ids) == plain[1]
        with pytest.raises(OptionError, match="with pictures is not scored"):
            engine.submit(request(prompts[0], 1, is_scoring=True, logprobs=0), Answer().post)
    finally:
        engine.close()


def test_a_session_goes_on_behind_a_picture_at_its_position() -> None:
    """A prompt's own positions count from where the session stands."""
    first, second = ((5, 6), WIDE, (7, 8)), ((9,), TALL, (10, 11))
    want = oracle_logits("dense", *first, *second)
    with seeing("dense").session() as session:
        session.prefill(prompt_of("dense", *first))
        got = session.score(prompt_of("dense", *second))
    assert np.abs(got - want[-len(got) :]).max() <= 2e-5 * np.ptp(want)


def test_pictures_are_refused_where_they_cannot_be_read() -> None:
    prompt = prompt_of("dense", (1, 2), WIDE)
    with model("dense").session() as session:
        with pytest.raises(PromptError, match="the model takes no pictures"):
            session.prefill(prompt)
        assert session.length == 0
    with pytest.raises(PromptError, match="no pictures"):
        model("dense").generate(prompt, 1)
    with seeing("dense").session() as session:
        narrow = MultimodalPrompt.join([(1,), Picture(np.zeros((4, 32), np.float32), 2, 2)])
        with pytest.raises(PromptError, match="expected: rows of 64 numbers"):
            session.extend(narrow)
        with pytest.raises(PromptError, match="outside the vocabulary"):
            session.score(MultimodalPrompt.join([(1, 400), picture_of("dense", WIDE)]))
        session.prefill(prompt)
    with pytest.raises(PromptError, match="longer than the context"):
        q35c.load(artifact("dense", takes_rows=True), context=16).generate(prompt, 1)
