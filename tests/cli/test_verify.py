"""Parity figures and promises, and `q35c verify` on real artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from q35c.errors import OptionError
from q35c.verify import PROMISES, TIE, check_promise, compare_logits, row_kl, verify_artifact
from tests.cli.conftest import Run
from tests.compiled import artifact, checkpoint
from tests.models import write_checkpoint


def logits(rows: int = 6, vocabulary: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocabulary)).astype(np.float32) * 5


def test_equal_logits() -> None:
    found = compare_logits(logits(), logits())
    assert (found.difference, found.mean_kl, found.max_kl) == (0.0, 0.0, 0.0)
    assert (found.agreement, found.clear_disagreements) == (1.0, 0)


def test_divergence_is_the_formula() -> None:
    got, want = logits(seed=1), logits(seed=2)
    p, q = (np.exp(x.astype(np.float64)) for x in (want, got))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    expected = (p * np.log(p / q)).sum(-1)
    assert np.allclose(row_kl(got, want), expected, rtol=1e-12)
    found = compare_logits(got, want)
    assert found.mean_kl == pytest.approx(expected.mean())
    assert found.max_kl == pytest.approx(expected.max())


def test_divergence_in_chunks_and_of_huge_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    got, want = logits(seed=1) * 1000, logits(seed=2) * 1000
    whole = row_kl(got, want)
    monkeypatch.setattr("q35c.verify._CHUNK_BYTES", 1)
    assert np.isfinite(whole).all()
    assert np.array_equal(row_kl(got, want), whole)


def test_difference_is_a_share_of_the_range() -> None:
    want = np.array([[0.0, 8.0, -2.0]], np.float32)
    got = want + np.array([[0.0, 0.0, 0.5]], np.float32)
    assert compare_logits(got, want).difference == pytest.approx(0.05)


@pytest.mark.parametrize(("gap", "disagreements"), [(0.5 * TIE, 0), (2.0 * TIE, 1)])
def test_only_near_ties_may_swap(gap: float, disagreements: int) -> None:
    want = np.array([[0.0, 1.0, 1.0 - gap]], np.float32)
    got = np.array([[0.0, 1.0, 1.1]], np.float32)
    found = compare_logits(got, want)
    assert (found.agreement, found.clear_disagreements) == (0.0, disagreements)


def test_other_shapes_are_another_model() -> None:
    with pytest.raises(OptionError, match="different models"):
        compare_logits(logits(vocabulary=41), logits())


@pytest.mark.parametrize("precision", PROMISES)
def test_not_a_number_keeps_no_promise(precision: str) -> None:
    got = logits()
    got[2, 3] = np.nan
    found = compare_logits(got, logits())
    assert check_promise(precision, found, 0.0)
    assert check_promise(precision, compare_logits(logits(), logits()), float("nan"))
    assert not check_promise(precision, compare_logits(logits(), logits()), 0.0)


def test_promises_of_precisions() -> None:
    noisy = compare_logits(logits() + logits(seed=1) * 1e-3, logits())
    assert 1e-4 < noisy.difference < 1e-3 and noisy.mean_kl < 1e-4
    assert check_promise("bf16", noisy, 9e-4) == ()
    assert check_promise("f32", noisy, 9e-5) == ()
    assert "prefill + decode" in check_promise("f32", noisy, 9e-4)[0]
    assert "no promise" in check_promise("w1", noisy, 0.0)[0]


def test_verify_accepts_what_was_compiled(run: Run) -> None:
    result = run("verify", artifact("dense"), checkpoint("dense"), "--tokens", 40)
    assert result.exit_code == 0, result.stderr
    assert "f32, 40 tokens" in result.stdout
    assert "100.0% (0 differ outside ties)" in result.stdout


def test_verify_refuses_another_checkpoint(run: Run, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "dense", seed=1)
    result = run("verify", artifact("dense"), other, "--ids", "1,2,3,4", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["tokens"] == 4
    assert document["against_oracle"]["difference"] > 0.1
    # Beside them lines of progress, where the machine is slow.
    said = [line for line in result.stderr.splitlines() if line.startswith("promise broken")]
    assert said == [f"promise broken: {text}" for text in document["failures"]]


def test_verify_reads_what_transformers_does_not(run: Run, tmp_path: Path) -> None:
    """A file of another name and wrapped names: right artifacts pass, others fail, whatever reads the oracle."""
    tensors = load_file(checkpoint("dense") / "model.safetensors")
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    for exit_code in (0, 1):
        odd = tmp_path / str(exit_code)
        odd.mkdir()
        shutil.copy(checkpoint("dense") / "config.json", odd)
        wrapped["language_model.lm_head.weight"].mul_(1 + exit_code)
        save_file(wrapped, odd / "finetune.safetensors", {"format": "pt"})
        result = run("verify", artifact("dense"), odd, "--ids", "1,2,3,4")
        assert result.exit_code == exit_code, result.stderr
        assert ("promise broken" in result.stderr) == bool(exit_code)


def test_text_and_one_token() -> None:
    report = verify_artifact(artifact("moe"), checkpoint("moe"), text="the anthem")
    assert (report.failures, report.precision) == ((), "f32")
    assert 1 < report.tokens < 10
    assert verify_artifact(artifact("moe"), checkpoint("moe"), ids=[5]).failures == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ids", "1,b"), "--ids"),
        (("--ids", "999999"), "outside the vocabulary"),
        (("--tokens", 0), "--tokens"),
        (("--text", ""), "no tokens"),
    ],
)
def test_refused_sequences(run: Run, arguments: tuple[object, ...], said: str) -> None:
    result = run("verify", artifact("dense"), checkpoint("dense"), *arguments)
    assert (result.exit_code, said in result.stderr) == (1, True)
