"""`q35c bench`: the right tokens are counted at the right depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import q35c
from q35c.bench import Measurement, run_benchmark
from q35c.runtime import Session
from q35c.runtime.memory import peak_memory
from tests.cli.conftest import Run


def test_figures_of_a_measurement() -> None:
    found = Measurement("pp10", 10, 0, (1.0, 2.0, 5.0))
    assert (found.rates, found.median, found.spread) == ([10.0, 5.0, 2.0], 5.0, 4.0)


def test_each_run_starts_at_its_depth(speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    prefill, decode = Session.prefill, Session.decode

    def spy_prefill(self: Session, ids, progress=None):
        calls.append(("prefill", self.length, len(ids)))
        return prefill(self, ids, progress)

    def spy_decode(self: Session, token: int):
        calls.append(("decode", self.length, 1))
        return decode(self, token)

    monkeypatch.setattr(Session, "prefill", spy_prefill)
    monkeypatch.setattr(Session, "decode", spy_decode)
    with q35c.load(speaker, threads=1) as model:
        found = run_benchmark(
            model, prompt_tokens=[20], new_tokens=[2], depths=[0, 40], repetitions=2
        )
    one_by_one = [("decode", 0, 1), ("decode", 1, 1)]
    deep = [("decode", 40, 1), ("decode", 41, 1)]
    assert calls == [
        *[("prefill", 0, 20)] * 3,
        *one_by_one * 3,
        ("prefill", 0, 40),
        *[("prefill", 40, 20)] * 3,
        *deep * 3,
    ]
    names = [(item.test, item.depth, len(item.seconds)) for item in found]
    assert names == [("pp20", 0, 2), ("tg2", 0, 2), ("pp20 @ d40", 40, 2), ("tg2 @ d40", 40, 2)]


def test_json(run: Run, speaker: Path) -> None:
    result = run("bench", speaker, "-p", 16, "-p", 0, "-n", 4, "-r", 3, "--threads", 1, "--json")
    document = json.loads(result.stdout)
    assert [test["test"] for test in document["tests"]] == ["pp16", "tg4"]
    assert all(len(test["seconds"]) == 3 for test in document["tests"])
    assert document["threads"] == 1
    # The command ran inside this process; the kernel's count is exact to a few pages per thread.
    assert document["peak_rss_bytes"] == pytest.approx(peak_memory(), rel=0.1)


def test_table(run: Run, speaker: Path) -> None:
    lines = run("bench", speaker, "-p", 16, "-n", 0, "-r", 1, "-d", 8).stdout.splitlines()
    assert lines[0].replace(" ", "") == "|test|tok/s|"
    assert lines[2].startswith("| pp16 @ d8 |")
    assert lines[3] == ""  # -n 0 leaves the decode test out
    assert "cpu:x86-64-v1, f32" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-p", 0, "-n", 0), "nothing to measure"),
        (("-p", 256, "-d", 1), "does not fit the context"),
        (("-p", -1), "error: -p: "),
        (("-d", -1), "error: -d: "),
        (("-p", 8, "-n", 0, "-r", 0), "--repetitions"),
    ],
)
def test_refused_sizes(run: Run, speaker: Path, arguments: tuple[object, ...], said: str) -> None:
    result = run("bench", speaker, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


def test_peak_memory_where_the_kernel_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tq35c\n")
    assert peak_memory(tmp_path / "status") == 0
    assert peak_memory(tmp_path / "absent") == 0
