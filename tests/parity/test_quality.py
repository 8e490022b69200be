"""What rounding costs on text that the demo model was not trained on: budgets that are never loosened.

`held_out.txt` holds the beginnings of six chapters of the King James Bible (public domain) that
`scripts/train_demo.py` holds out, a form feed between them. `bench/quality.py` measures more of them, and
llama.cpp beside.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.compile import compile_model
from q35c.verify import PROMISES, row_kl
from tests.compiled import graph_of

CHECKPOINT = Path(q35c.__file__).parent / "demo" / "model"
CHAPTERS = (Path(__file__).parent / "held_out.txt").read_text().split("\f")
# Mean KL in nats measured when the budget was set; most of a budget is room for other texts. That of bf16 is mostly one
# row that is routed otherwise: 0.00004 with products of bf16 pairs, 0.00006 without.
MEASURED = {"bf16": 0.00006, "w8": 0.0004, "w4": 0.006, "w4-small": 0.018}
INT8_CACHE = 0.000002  # the same of an int8 cache alone
# What README says of cuts off the grid and of steps: the largest mean KL to the whole text, and in f32 the largest difference.
CUTS = {"f32": 1e-11, "bf16": 0.00001, "w8": 0.0002, "w4": 0.0002, "w4-small": 0.0002}
LARGEST_DIFFERENCE = 1e-6  # of the logits' range


@cache
def compiled(precision: str, directory: Path, kv_dtype: str = "auto") -> q35c.Model:
    path = directory / f"{precision}-{kv_dtype}.q35c"
    compile_model(
        CHECKPOINT,
        path,
        precision=precision,
        kv_dtype=kv_dtype,
        context=1024,
        batch=1,
        import_graph=graph_of,
    )
    return q35c.load(path)


@cache
def logits(precision: str, directory: Path, kv_dtype: str = "auto") -> list[np.ndarray]:
    model = compiled(precision, directory, kv_dtype)
    return [model.score(model.tokenizer.encode(chapter.strip())) for chapter in CHAPTERS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.mark.parametrize("precision", MEASURED)
def test_divergence_on_held_out_text(precision: str, directory: Path) -> None:
    pairs = zip(logits(precision, directory), logits("f32", directory), strict=True)
    kl = float(np.concatenate([row_kl(got, want) for got, want in pairs]).mean())
    budget = PROMISES[precision].mean_kl
    assert budget is not None and kl <= budget
    assert kl <= 1.5 * MEASURED[precision], "worse than when it was measured: find out why"


def test_divergence_of_an_int8_cache(directory: Path) -> None:
    pairs = zip(logits("f32", directory, "int8"), logits("f32", directory), strict=True)
    kl = float(np.concatenate([row_kl(got, want) for got, want in pairs]).mean())
    assert 0 < kl <= 1.5 * INT8_CACHE, "worse than when it was measured: find out why"


# The others are rounded between these: at night.
AT_NIGHT = ("w8", "w4-small")
NIGHTLY_CUTS = [pytest.param(p, marks=pytest.mark.nightly) if p in AT_NIGHT else p for p in CUTS]


@pytest.mark.parametrize("precision", NIGHTLY_CUTS)
def test_cuts_off_the_grid_and_steps_cost_little(precision: str, directory: Path) -> None:
    model = compiled(precision, directory)
    got, want = [], []
    with model.session() as session:
        for chapter, whole in zip(CHAPTERS[:3], logits(precision, directory)[:3], strict=True):
            ids = model.tokenizer.encode(chapter.strip())
            for cut in (1, 13, 50, 79, 111):
                session.reset()
                session.prefill(ids[:cut])
                got.append(session.score(ids[cut:]))
                want.append(whole[cut:])
            session.reset()
            got.append(np.stack([session.decode(token) for token in ids]))
            want.append(whole)
    got, want = np.concatenate(got), np.concatenate(want)
    assert row_kl(got, want).mean() <= CUTS[precision]
    if precision == "f32":
        assert np.abs(got - want).max() <= LARGEST_DIFFERENCE * (want.max() - want.min())
