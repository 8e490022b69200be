"""`q35c bench --roofline` and `q35c inspect --roofline`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from q35c.roofline import Limits, machine
from tests.cli.conftest import Run
from tests.compiled import artifact
from tests.fake_artifact import write_fake

LIMITS = Limits(read=3e10, cache=1e11, int8=9e11, bf16=4e11, f32=2e11)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the limits in a directory of the test, and take no time to measure them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure_limits", lambda *_: LIMITS)


def test_inspect_then_bench_then_inspect(run: Run) -> None:
    path = artifact("dense")
    before = run("inspect", path, "--roofline", "-p", 16, "-d", 0, "-d", 32).stdout
    assert "pp16 @ d32" in before and "limit us" not in before
    assert "`q35c bench MODEL --roofline` measures" in before.splitlines()[-1]

    bench = run("bench", path, "--roofline", "-p", 16, "-n", 2, "-r", 1)
    assert bench.exit_code == 0, bench.stderr
    assert bench.stdout.startswith("limits of ")
    for text in ("pp16: ", "tg2: ", "lost us", "lm_head", "outside the kernels"):
        assert text in bench.stdout

    after = run("inspect", path, "--roofline", "-p", 0).stdout
    assert "limit us" in after and "of limit" not in after and "not known" not in after


def test_json_and_picture(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "roofline.html"
    arguments = ("--roofline", "-p", 16, "-n", 0, "-r", 1, "--json", "--html", page)
    document = json.loads(run("bench", artifact("dense"), *arguments).stdout)
    assert document["limits"]["read"] == 3e10
    (test,) = document["tests"]
    assert test["test"] == "pp16" and test["seconds"] > 0
    assert {"kernel", "family", "shape", "bound", "seconds"} <= set(test["kernels"][0])
    text = page.read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    pictures = [part.partition("</svg>")[0] for part in text.split("<svg")[1:]]
    strip, bars = (ET.fromstring(f"<svg{picture}</svg>") for picture in pictures)
    assert len(strip) == len(test["steps"])
    assert len([shape for shape in bars if shape.tag.endswith("rect")]) == 2 * len(test["kernels"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--html", "x.html"), "belongs to --roofline"),
        (("--remeasure",), "belongs to --roofline"),
        (("--roofline", "-p", 0, "-n", 0), "nothing to measure"),
        (("--roofline", "-p", 5000), "does not fit the context"),
        (("--roofline", "-p", 16, "--html", "/nowhere/x"), "no such directory"),
        (("--roofline", "-p", 16, "--html", "/dev/null"), "a device has this name"),
        (("--roofline", "-p", 16, "--html", artifact("dense")), "would be replaced"),
    ],
)
def test_refused(run: Run, arguments: tuple[object, ...], said: str) -> None:
    result = run("bench", artifact("dense"), *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


def test_inspect_loads_no_code(run: Run, tmp_path: Path) -> None:
    write_fake(tmp_path / "codeless", with_code=False)
    result = run("inspect", tmp_path / "codeless", "--roofline")
    assert result.exit_code == 0 and "tg1: 0.3 MB from memory a token" in result.stdout
