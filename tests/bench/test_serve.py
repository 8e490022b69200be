"""The engine's benchmark: every figure is there, of a model small enough to run in a moment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.fake_artifact import write_fake

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench") / "m.q35c"
    write_fake(place, context=1024)
    return place


def test_all_three_tables(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serve import main

    words = [str(artifact), "--streams", "1,6", "--prompt", "20", "--new", "12", "--long", "640"]
    main([*words, "--threads", "1", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert [row["streams"] for row in made["throughput"]] == [1, 6]
    assert all(row["tokens_per_second"] > 0 for row in made["throughput"])
    assert made["throughput"][0]["rows"] == {"1": 11}
    assert sum(int(n) * steps for n, steps in made["throughput"][1]["rows"].items()) == 6 * 11
    (turn,) = made["second_turn"]
    assert turn["cached_tokens"] >= 512 and turn["prompt_tokens"] == 640
    (stall,) = made["stall"]
    assert stall["streams"] == 3 and stall["gap_p99"] >= stall["gap_p50"] > 0
    main([*words[:-4], "--new", "4", "--long", "128", "--threads", "1"])
    assert "tokens per second" in capsys.readouterr().out


def test_the_middle_run_counts() -> None:
    from serve import middle

    runs = [{"a": float(value), "b": value} for value in (5, 1, 3, 9)]
    assert middle(runs, "a") == {"a": 3.0, "b": 3}
