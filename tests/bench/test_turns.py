"""Two source trees in turns: who begins changes, and ratios are those of a turn's pair."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def test_ratios_are_of_pairs() -> None:
    import turns

    # The machine halves its speed midway: the ratio does not see it.
    row = turns.row_of("tg8", [100.0, 100.0, 50.0, 50.0], [110.0, 110.0, 55.0, 55.0])
    assert row == ["tg8", "75.0", "82.5", "1.1000", "1.1000 to 1.1000"]


def test_turns_alternate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import turns

    order: list[Path] = []

    def rates(tree: Path, artifact: Path, arguments: list[str]) -> dict[str, float]:
        assert artifact == tmp_path / "m.q35c"
        assert arguments == ["-p", "0", "-n", "8", "-r", "3", "--threads", "2"]
        order.append(tree)
        return {"tg8": 2.0 if tree == turns.HERE else 1.0}

    monkeypatch.setattr(turns, "rates", rates)
    options = ["-p", "0", "-n", "8", "--threads", "2", "--turns", "3"]
    places = ["--base", str(tmp_path), "--artifact", str(tmp_path / "m.q35c")]
    monkeypatch.setattr(sys, "argv", ["turns.py", *places, *options])
    turns.main()
    base, here = tmp_path.resolve(), turns.HERE
    assert order == [base, here, here, base, base, here]
    assert "2.0000" in capsys.readouterr().out
