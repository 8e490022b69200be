"""The clock of compiled programs, the probes, and what is made of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, OptionError
from q35c.roofline import Limits, find_limits, machine, predict_tests, run_roofline
from q35c.roofline.report import kernel_rows, number, report_json, report_text, shape_text
from tests.compiled import BATCH, artifact
from tests.fake_artifact import write_fake

LIMITS = Limits(read=3e10, cache=1e11, int8=9e11, bf16=4e11, f32=2e11)


@pytest.fixture(scope="module")
def model() -> Any:
    with q35c.load(artifact("moe"), threads=2) as loaded:
        yield loaded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the limits in a directory of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "q35c" / "limits.json"


def clock(model: Any) -> np.ndarray:
    return model._executor.device._fields["clock"]


def test_the_clock_is_written_only_while_recording(model: Any) -> None:
    with model.session() as session:
        session.prefill([1, 2, 3])
        session.decode(4)
        assert not clock(model).any()
        with model.record() as runs:
            session.decode(5)
        before = clock(model).copy()
        session.decode(6)
    assert clock(model)[0] == 0 and (clock(model)[1:] == before[1:]).all()
    assert [(run.entry, run.tokens, run.starts) for run in runs] == [("decode", 1, (4,))]


def test_steps_are_stamped_in_order(model: Any) -> None:
    with model.session() as session, model.record() as runs:
        session.prefill(list(range(300)))  # more than one call takes
        session.score([1, 2])
        session.decode(1)
    assert [(r.entry, r.tokens, r.starts) for r in runs] == [
        ("extend", 256, (0,)),
        ("prefill", 44, (256,)),
        ("score", 2, (300,)),
        ("decode", 1, (302,)),
    ]
    period = machine.seconds_per_cycle(model)
    for run in runs:
        assert len(run.cycles) == len(model.manifest.entry(run.entry).steps) + 1
        assert (np.diff(run.cycles) >= 0).all()
        assert 0 < (run.cycles[-1] - run.cycles[0]) * period < 1.01 * run.seconds


def test_recording_changes_no_result(model: Any) -> None:
    with model.session() as session:
        plain = session.prefill([1, 2, 3])
    with model.session() as session, model.record():
        assert (session.prefill([1, 2, 3]) == plain).all()


def test_a_batch_tells_every_length(model: Any) -> None:
    sessions = [model.session() for _ in range(BATCH)]
    for length, session in enumerate(sessions, start=1):
        session.prefill([1] * length)
    with model.record() as runs:
        type(sessions[0]).decode_together(sessions, [1] * BATCH)
    assert (runs[0].tokens, runs[0].starts) == (BATCH, tuple(range(1, BATCH + 1)))


def test_steps_name_their_kernels_and_weights(model: Any) -> None:
    """Weights of a decode step: all but the lookup, each exactly once."""
    manifest = model.manifest
    (test,) = predict_tests(manifest, prompt_tokens=(), new_tokens=(1,))
    named = [step.weight for step in test.steps if step.kernel.family in ("linear", "expert_down")]
    assert len(set(named)) == len(named)
    for layer in range(3):
        assert any(re.match(rf"layers\.{layer}\..*down_proj", name) for name in named)
    head = test.steps[-1]
    assert head.kernel.parameters["N"] == manifest.model.vocab_size
    (stored,) = [w.bytes for w in manifest.weights if w.name == head.weight]
    assert head.cost.memory_bytes == stored


def test_the_end_of_a_prompt_computes_one_row(model: Any) -> None:
    (test,) = predict_tests(model.manifest, prompt_tokens=(256,), new_tokens=())
    families = [step.kernel.family for step in test.steps]
    last_mixer = max(n for n, name in enumerate(families) if name in ("attention", "gated_delta"))
    for at, step in enumerate(test.steps):
        if step.kernel.family == "linear":
            rows = 1 if at > last_mixer else 256
            matrix = step.kernel.parameters["N"] * step.kernel.parameters["K"]
            assert step.cost.operations == 2 * rows * matrix


def test_only_the_last_piece_of_a_prompt_has_logits(model: Any) -> None:
    (test,) = predict_tests(model.manifest, prompt_tokens=(600,), new_tokens=())
    heads = [s.entry for s in test.steps if s.kernel.parameters.get("N") == model.vocab_size]
    assert heads == ["prefill"]
    assert list(dict.fromkeys(step.entry for step in test.steps)) == ["extend", "prefill"]


def test_measured_tests_have_the_predicted_steps(model: Any) -> None:
    sizes: dict[str, Any] = {"prompt_tokens": (300,), "new_tokens": (2,), "depths": (0, 40)}
    found = run_roofline(model, **sizes, repetitions=2)
    assert [test.name for test in found] == ["pp300", "tg2", "pp300 @ d40", "tg2 @ d40"]
    for test, predicted in zip(found, predict_tests(model.manifest, **sizes), strict=True):
        assert [step.kernel for step in test.steps] == [step.kernel for step in predicted.steps]
        assert all(step.seconds is not None and step.seconds >= 0 for step in test.steps)
        rows = kernel_rows(test.steps, LIMITS)
        assert sum(row.calls for row in rows) == len(test.steps)
        assert sum(row.seconds or 0 for row in rows) == pytest.approx(
            test.seconds - test.outside_seconds
        )
        lost = [row.lost_seconds for row in rows]
        assert lost == sorted(lost, reverse=True)
    document = json.loads(json.dumps(report_json(found, LIMITS)))
    entries = [document["tests"][0]["steps"][at]["entry"] for at in (0, -1)]
    assert entries == ["extend", "prefill"]
    assert document["tests"][0]["limit_seconds"] == pytest.approx(found[0].limit_seconds(LIMITS))


def test_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not fit"):
        run_roofline(model, prompt_tokens=(model.context + 1,))
    write_fake(tmp_path / "fake")
    with q35c.load(tmp_path / "fake") as fake, pytest.raises(ExecutionError, match="probe"):
        run_roofline(fake, prompt_tokens=(16,), new_tokens=())


def test_limits_are_measured_once(model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROBE_SECONDS", 0.02)
    monkeypatch.setattr(machine, "READ_BYTES", 128 << 20)
    limits = find_limits(model)
    # A busy machine may take most of any one sample: only the units and the order of things are sure.
    assert 1e7 < limits.read < limits.cache * 100
    assert 1e8 < limits.f32 < min(limits.bf16, limits.int8) * 100
    monkeypatch.setattr(machine, "measure_limits", lambda *_: LIMITS)
    assert find_limits(model) == limits
    target = model.manifest.target.name
    assert machine.cached_limits(target, 2) == limits
    assert machine.cached_limits(target, 3) is None and machine.cached_limits("cpu:x", 2) is None
    assert find_limits(model, again=True) == LIMITS == machine.cached_limits(target, 2)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"key": {"read": 1}}', '{"key": 5}', '{"key": {"read": "x"}}']
)
def test_a_damaged_cache_is_no_error(
    model: Any, cache: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = machine.limits_key(model.manifest.target.name, model.threads)
    cache.parent.mkdir()
    cache.write_text(text.replace("key", key))
    monkeypatch.setattr(machine, "measure_limits", lambda *_: LIMITS)
    assert machine.cached_limits(model.manifest.target.name, model.threads) is None
    assert find_limits(model) == LIMITS
    assert machine.cached_limits(model.manifest.target.name, model.threads) == LIMITS


def test_an_unwritable_cache_is_no_error(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "measure_limits", lambda *_: LIMITS)
    assert find_limits(model) == LIMITS


def test_code_without_probes_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 4 << 20)
    few = tuple(probe for probe in model.manifest.probes if probe.name == "clock")
    manifest = replace(model.manifest, probes=few)
    bare: Any = SimpleNamespace(
        manifest=manifest,
        threads=2,
        run_probe=model.run_probe,
        probe_memory=model.probe_memory,
    )
    with pytest.raises(ExecutionError, match="lacks probes"):
        machine.measure_limits(bare)


def test_a_clock_that_stands_still(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CALIBRATION_SECONDS", 0.0)
    still: Any = SimpleNamespace(
        manifest=model.manifest, run_probe=lambda *_: 0.0, probe_memory=model.probe_memory
    )
    with pytest.raises(ExecutionError, match="stands still"):
        machine.seconds_per_cycle(still)


def test_processor_name(tmp_path: Path) -> None:
    (tmp_path / "info").write_text("flags : a\nmodel name\t: Some CPU\n")
    assert machine.processor_name(tmp_path / "info") == "Some CPU"
    assert machine.processor_name(tmp_path / "absent") == "unknown processor"


def test_figures() -> None:
    assert [number(x) for x in (0, 1234.5, 12.34, 0.01234)] == ["0", "1234", "12.3", "0.0123"]
    parameters = {"N": 4, "epilogue": "none", "dtype": "bf16", "eps": 1e-6}
    assert shape_text(parameters) == "N=4 bf16"


def test_report_without_limits_has_no_times(model: Any) -> None:
    tests = predict_tests(model.manifest, prompt_tokens=(), new_tokens=(1,))
    text = report_text(tests, None, 1, lambda header, rows: "|".join(header))
    assert text.endswith("kernel|weight|shape|calls|MB|cache MB|Gop")
