"""Perplexity: every token is predicted once, from what stands before it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import OptionError, PromptError
from q35c.runtime.perplexity import measure_perplexity, surprises, windows
from tests.fake_artifact import VOCAB, write_fake


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """A model whose logits depend on the whole past."""
    path = tmp_path_factory.mktemp("babbler") / "m.q35c"
    write_fake(path, noise=4.0)
    with q35c.load(path, threads=1) as model:
        yield model


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 30, 31])
@pytest.mark.parametrize("width", [2, 3, 8, 100])
def test_windows_predict_every_token_once(count: int, width: int) -> None:
    found = list(windows(count, width))
    predicted = [token for _, first, end in found for token in range(first, end)]
    assert predicted == list(range(1, count))
    for start, first, end in found:
        assert 0 <= start < first < end <= start + width
        assert first - start >= min(width // 2, first)
    assert all(later[0] - earlier[0] == width // 2 for earlier, later in pairwise(found))


def test_a_text_of_one_window(babbler: q35c.Model) -> None:
    text = "".join(chr(33 + i * 7 % 90) for i in range(150))
    made = measure_perplexity(babbler, text)
    logits = babbler.score([*text.encode()]).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = [-math.log(shares[at, ord(text[at + 1])]) for at in range(149)]
    assert made.tokens == made.text_bytes == 149 and made.window == babbler.context
    assert made.surprise == pytest.approx(np.mean(wanted), rel=1e-6)
    assert made.perplexity == pytest.approx(math.exp(np.mean(wanted)), rel=1e-6)
    assert made.bits_per_byte == pytest.approx(np.mean(wanted) / math.log(2), rel=1e-6)
    assert made.deviation == pytest.approx(np.std(wanted, ddof=1) / 149**0.5, rel=1e-6)
    assert made.tokens_per_second > 0


def test_a_longer_text_is_read_in_windows(babbler: q35c.Model) -> None:
    text = "".join(chr(33 + i * 11 % 90) for i in range(500))
    ids, done = [*text.encode()], list[tuple[int, int]]()
    made = measure_perplexity(babbler, text, 100, lambda *at: done.append(at))
    wanted: list[float] = []
    for start, first, end in windows(500, 100):
        logits = babbler.score(ids[start:end])
        wanted += surprises(logits[first - 1 - start :], ids[first:end])
    assert made.tokens == len(wanted) == 499 and done[-1] == (499, 499)
    assert made.surprise == pytest.approx(np.mean(wanted), rel=1e-5)


def test_a_model_without_a_clue(tmp_path: Path) -> None:
    write_fake(tmp_path / "m.q35c", noise=0.0001)
    with q35c.load(tmp_path / "m.q35c", threads=1) as model:
        assert measure_perplexity(model, "hello").perplexity == pytest.approx(VOCAB, rel=1e-3)


def test_what_is_refused(babbler: q35c.Model) -> None:
    with pytest.raises(PromptError, match="too short"):
        measure_perplexity(babbler, "a")
    for window in (1, 257, "x"):
        with pytest.raises(OptionError, match="window"):
            measure_perplexity(babbler, "abc", window)  # type: ignore[arg-type]
