"""The peers' benchmark: which samples count, in which order they are taken, what the tables say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from q35c.frontend import family

BENCH = Path(__file__).parents[2] / "bench"
GOOD = (30e9, 900e9)
TEST_NAME = "pp512"


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def make_sample(system="ours", rate=100.0, others=0.0, before=GOOD, after=GOOD, test=TEST_NAME):
    from peer.machine import Limits
    from peer.rounds import Sample

    seconds = [512 / rate]
    limits = Limits(*before), Limits(*after)
    return Sample(system, test, seconds, 0.5, 1.0, 10**9, others, *limits, tokens=512)


def make_system(name="ours", **fields):
    from peer.systems import System

    return System(name, ("run",), 500 * 10**6, 400e6, 12288.0, **fields)


def test_samples_beside_a_slow_probe_or_with_company_do_not_count():
    from peer.rounds import mark_clean

    slow = (20e9, 900e9)
    samples = [make_sample() for _ in range(4)]
    samples += [make_sample(before=slow), make_sample(after=slow), make_sample(others=0.5)]
    mark_clean(samples)
    assert [sample.is_clean for sample in samples] == [True] * 4 + [False] * 3


def test_decode_samples_beside_an_unusually_fast_probe_do_not_count():
    from peer.rounds import mark_clean

    fast = (64e9, 900e9)
    decode = replace(make_sample(after=fast, test="tg32"), is_decode=True)
    samples = [*(make_sample() for _ in range(4)), make_sample(after=fast), decode]
    mark_clean(samples)
    assert [sample.is_clean for sample in samples] == [True] * 5 + [False]


def test_systems_take_turns_and_each_round_starts_with_another():
    from peer.rounds import make_plan
    from peer.systems import Test

    pair = [make_system("a"), make_system("b", is_prefill_only=True)]
    tests = [(Test("pp512", prompt=512), 2), (Test("tg32", decode=32), 1)]
    plan = [(system.name, test.name) for system, test in make_plan(pair, tests)]
    assert plan == [("a", "pp512"), ("b", "pp512"), ("a", "tg32"), ("b", "pp512"), ("a", "pp512")]


def test_the_report_gives_medians_of_clean_samples_and_ratios():
    from peer.report import Results, main_table, ratio_table
    from peer.systems import Test

    systems = [make_system("ours", is_ours=True), make_system("peer")]
    samples = [make_sample(rate=rate) for rate in (190, 200, 210)]
    samples.append(replace(make_sample(rate=1000), is_clean=False))
    samples += [make_sample("peer", rate=100) for _ in range(2)]
    results = Results(family.load("qwen3.5-0.8b"), systems, samples)
    test = Test(TEST_NAME, prompt=512)
    figure = results.figure(systems[0], test)
    assert figure is not None and (figure.value, figure.samples) == (200, 3)
    # 0.498 G weights in the layers' linears, two operations each
    assert figure.share == pytest.approx(200 * 2 * 0.498e9 / 900e9, rel=0.01)
    assert "200 (22%)" in main_table(results, [test])
    assert "2.00 (peer)" in ratio_table(results, [test])


def test_a_token_reads_the_chosen_experts_only():
    from peer.sizes import cache_elements, linear_parameters, state_bytes

    dense, moe = family.load("qwen3.5-0.8b"), family.load("qwen3.5-35b-a3b")
    assert linear_parameters(dense) == pytest.approx(0.498e9, rel=0.01)
    assert 2e9 < linear_parameters(moe) < 3e9
    assert cache_elements(dense) == 2 * 6 * 2 * 256
    assert state_bytes(dense) == 4 * 18 * (16 * 128 * 128 + 3 * 6144)
