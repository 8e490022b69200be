"""What a client may ask of sampling beside Hugging Face's options: penalties by count, biases, masks, logprobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, OptionError
from q35c.runtime.sampling import Sampler, SamplingOptions, filter_logits, log_shares
from tests.fake_artifact import VOCAB, write_fake


def random_logits(count: int, seed: int, spread: float = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, count).astype(np.float32)


def packed(count: int, allowed: Any) -> np.ndarray:
    bits = np.zeros(-(-count // 32) * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def test_frequency_penalty_counts_each_time() -> None:
    logits = np.array([10, 9, 0], np.float32)
    sampler = Sampler(SamplingOptions(0.0, frequency_penalty=2), 0, prompt=[0])
    # 10; 8 is below 9; then 8 and 7; 6 and 7; 6 and 5.
    assert [sampler.sample(logits) for _ in range(5)] == [0, 1, 0, 1, 0]


def test_bias_is_added() -> None:
    logits = np.array([3, 2, 1], np.float32)
    assert Sampler(SamplingOptions(0.0, logit_bias={2: 2.5}), 0).sample(logits) == 2
    assert Sampler(SamplingOptions(0.0, logit_bias={0: -100, 1: -0.5}), 0).sample(logits) == 1
    assert logits.tolist() == [3, 2, 1]


def test_bias_of_an_id_outside_the_logits() -> None:
    with pytest.raises(OptionError, match="not logits of this sequence"):
        Sampler(SamplingOptions(logit_bias={3: 1.0}), 0).sample(np.zeros(3, np.float32))


@pytest.mark.parametrize("bias", [{-1: 0.0}, {0: float("nan")}, {0: "1"}, {"0": 1.0}, [1], None])
def test_bias_is_checked(bias: Any) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingOptions(logit_bias=bias)
    assert caught.value.where == "logit_bias"


def test_options_are_hashable_and_equal_by_value() -> None:
    first, second = (SamplingOptions(logit_bias={1: 2}, frequency_penalty=1) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != SamplingOptions(logit_bias={1: 3}, frequency_penalty=1)


@pytest.mark.parametrize("allowed", [[3], [0, 69], range(5, 60), range(70)], ids=str)
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.8}], ids=str
)
def test_a_mask_is_as_logits_without_the_others(allowed: Any, options: dict[str, Any]) -> None:
    for seed in range(20):
        logits = random_logits(70, seed)
        less = np.full(70, -np.inf, np.float32)
        less[list(allowed)] = logits[list(allowed)]
        chosen = SamplingOptions(**options)
        masked = Sampler(chosen, seed).sample(logits, packed(70, list(allowed)))
        assert masked in allowed
        assert masked == Sampler(chosen, seed).sample(less), f"seed {seed}"


def test_a_mask_with_bits_beyond_the_logits() -> None:
    logits = random_logits(70, 0)
    assert Sampler(SamplingOptions(), 0).sample(logits, packed(96, [9, 80, 95])) == 9


def test_a_mask_that_allows_nothing() -> None:
    with pytest.raises(ExecutionError, match="no token is allowed"):
        Sampler(SamplingOptions(), 0).sample(random_logits(70, 0), packed(70, []))
    impossible = np.array([0, -np.inf], np.float32)
    with pytest.raises(ExecutionError, match="finite"):
        Sampler(SamplingOptions(), 0).sample(impossible, packed(2, [1]))


@pytest.mark.parametrize(
    "bad", [np.zeros(2, np.uint32), np.zeros(3, np.int64), [1, 2, 3]], ids=repr
)
def test_masks_are_checked(bad: Any) -> None:
    with pytest.raises(OptionError, match="not a mask"):
        Sampler(SamplingOptions(), 0).sample(random_logits(70, 0), bad)


def test_log_shares_are_the_logarithms_of_softmax() -> None:
    logits = random_logits(5000, 1)
    shares = np.exp(logits.astype(np.float64))
    want = np.log(shares / shares.sum())
    own, top = log_shares(logits, 17, 5)
    assert own == pytest.approx(want[17], abs=1e-5)
    best = np.argsort(-want)[:5]
    assert [token for token, _ in top] == best.tolist()
    assert [value for _, value in top] == pytest.approx(want[best].tolist(), abs=1e-5)


def test_log_shares_of_equal_logits_and_of_few() -> None:
    own, top = log_shares(np.zeros(4, np.float32), 3, 2)
    assert own == pytest.approx(-np.log(4)) and [token for token, _ in top] == [0, 1]
    assert [token for token, _ in log_shares(np.array([1, 2], np.float32), 0, 20)[1]] == [1, 0]
    assert log_shares(np.array([0, -np.inf], np.float32), 1, 0) == (-np.inf, ())


def survivors_by_sorting(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Return what top-p alone leaves, by a sort of all weights in doubles."""
    scaled = (logits - logits.max()) / np.float32(options.temperature)
    weights = np.exp(scaled).astype(np.float64)
    order = np.argsort(weights, kind="stable")
    share = np.cumsum(weights[order])
    dropped = min(int((share <= (1 - options.top_p) * share[-1]).sum()), len(order) - 1)
    return np.sort(order[dropped:])


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.01, 0.6, 4.0])
def test_top_p_of_many_likely_tokens(top_p: float, spread: float) -> None:
    """So many that the border is looked for in a histogram: flat, as random weights make them, and peaked."""
    options = SamplingOptions(top_p=top_p)
    for seed in range(3):
        logits = random_logits(30_000, seed, spread)
        ids, weights = filter_logits(logits, options)
        assert ids is not None
        assert np.array_equal(ids, survivors_by_sorting(logits, options)), f"seed {seed}"
        assert len(weights) == len(ids)


def test_top_p_among_equal_weights() -> None:
    ids, _ = filter_logits(np.zeros(1 << 14, np.float32), SamplingOptions(top_p=0.25))
    assert ids is not None and ids.tolist() == list(range(3 << 12, 1 << 14))


def test_generate_takes_bias_and_penalty(tmp_path: Any) -> None:
    write_fake(tmp_path / "m.q35c", noise=0.0)
    with q35c.load(tmp_path / "m.q35c", threads=1) as model:
        made = model.generate(
            [1], 4, temperature=0.0, logit_bias={65: 5, 66: 4}, frequency_penalty=2
        )
        assert made.ids == (65, 66, 65, 66)
        with pytest.raises(OptionError) as caught:
            model.generate([1], 4, logit_bias={VOCAB: 1.0})
        assert caught.value.where == "logit_bias"
