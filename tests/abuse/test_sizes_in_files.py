"""A number in a file does not decide how much memory or time is taken."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from q35c.artifact import Manifest, layout, read_artifact
from q35c.artifact.entries import Entry, io_layout
from q35c.artifact.kernels import KernelCost
from q35c.artifact.schema import decode
from q35c.cli.text import table_text
from q35c.errors import ArtifactError, OptionError
from q35c.frontend.checkpoint import FILE_LIMITS
from q35c.roofline import predict_tests
from q35c.roofline.cost import Work, call_cost
from tests.fake_artifact import write_small

ROOT = Path(__file__).parents[2]
MOST_BYTES = 24 << 20  # beyond what a small artifact takes

# Prints how the command line ended and how far memory grew; ru_maxrss would be the parent's.
CHILD = """
import json, resource, sys
from click.testing import CliRunner
from q35c.artifact import read_artifact
from q35c.cli import main
from q35c.roofline import predict_tests, report_text

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10

small, *lines = json.loads(sys.argv[1])
for line in (["inspect", small, "--kernels", "--weights", "--roofline"], ["verify-file", small]):
    assert CliRunner().invoke(main, line).exit_code == 0
with read_artifact(small) as artifact:
    artifact.segment("tokenizer")
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
found = []
for line in lines:
    before = peak()
    if line[0] == "segment":
        try:
            with read_artifact(line[1]) as artifact:
                artifact.segment(line[2])
            found.append([0, "", peak() - before])
        except Exception as error:
            found.append([type(error).__name__, str(error), peak() - before])
    else:
        result = CliRunner().invoke(main, line)
        found.append([result.exit_code, result.stderr, peak() - before])
print(json.dumps(found))
"""


def run_lines(tmp_path: Path, *lines: list[str]) -> list[list[Any]]:
    write_small(tmp_path / "small")
    argument = json.dumps([str(tmp_path / "small"), *lines])
    command = [sys.executable, "-c", CHILD, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def forge(path: Path, change: Callable[[dict[str, Any]], None], size: int | None = None) -> None:
    """Write a small artifact with another manifest, its header right; its data is a hole."""
    write_small(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["q35c"])
    change(document)
    manifest = Manifest.from_dict(document)
    text = manifest.to_json()
    digest = hashlib.sha256(text).hexdigest()
    header = layout.build_header(text, digest, manifest.segments, manifest.weights)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + layout.segment_offsets(manifest.segments)[1])


def segment_of(name: str, size: int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["segments"][name] = {"bytes": size, "sha256": "0" * 64}

    return change


@pytest.mark.parametrize(
    "name", ["code", "tokenizer", "tokenizer_config", "chat_template", "other"]
)
def test_a_segment_is_bounded_by_what_it_can_be(tmp_path: Path, name: str) -> None:
    most = layout.most_segment_bytes(name)
    for size in (most + 1, 1 << 40):
        forge(tmp_path / "m", segment_of(name, size))
        with pytest.raises(ArtifactError, match="is too large"):
            read_artifact(tmp_path / "m")
    forge(tmp_path / "m", segment_of(name, most))
    read_artifact(tmp_path / "m").close()


def test_what_the_compiler_takes_in_may_come_out() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert FILE_LIMITS[name] == layout.most_segment_bytes(name.partition(".")[0])


def test_segments_are_hashed_in_pieces(tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    forge(tmp_path / "m", segment_of("tokenizer", layout.most_segment_bytes("tokenizer")))
    found = run_lines(tmp_path, ["inspect", path], ["verify-file", path])
    for code, said, grown in found:
        assert (code, "damaged" in said) == (1, True)
        assert grown < MOST_BYTES


def test_a_segment_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    forge(tmp_path / "m", segment_of("tokenizer", 1 << 40))
    ((kind, _, grown),) = run_lines(tmp_path, ["segment", path, "tokenizer"])
    assert kind == "ArtifactError" and grown < MOST_BYTES


def many_steps(document: dict[str, Any]) -> None:
    """Prompts of one token a call, with as many steps as a manifest may hold."""
    for entry in document["entries"]:
        entry["steps"], entry["step_weights"] = [0] * 5000, [0] * 5000
        entry["tokens"] = 1
    specs = [decode(Entry, entry, "$") for entry in document["entries"]]
    model = document["model"]
    io = io_layout(specs, model["vocab_size"], model["hidden_size"], 5000)
    document["memory"]["peak"] += io["bytes"] - document["memory"]["io"]
    document["memory"]["io"], document["io"] = io["bytes"], io


def test_a_roofline_of_many_steps(tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    forge(tmp_path / "m", many_steps)
    with read_artifact(path) as artifact:
        manifest = artifact.manifest
    assert predict_tests(manifest, prompt_tokens=(8,))
    with pytest.raises(OptionError, match="too many steps"):
        predict_tests(manifest, prompt_tokens=(512,))
    for sizes in ({"prompt_tokens": (-1,)}, {"depths": (-1,)}, {"prompt_tokens": (1 << 40,)}):
        with pytest.raises(OptionError):
            predict_tests(manifest, **sizes)


MOST_COST = {
    field.name: {"peak": "int8", "weight_share": 1}.get(field.name, 1e18)
    for field in fields(KernelCost)
}
HOSTILE = ([1] * 512, "x" * 200, -1, -1e-300, 1e19, 1 << 70, math.inf, math.nan, True, None)


@pytest.mark.parametrize("name", MOST_COST)
def test_a_cost_is_a_bounded_number(name: str) -> None:
    """The most that a file may state gives finite limits; anything else is refused before it is multiplied."""
    cost = call_cost(decode(KernelCost, MOST_COST, "$"), Work(1 << 22, (1 << 22,) * 1024, 1 << 45))
    for number in (cost.memory_bytes, cost.cache_bytes, cost.operations):
        assert 0 <= number < 1e36
    for value in HOSTILE:
        with pytest.raises(ArtifactError):
            decode(KernelCost, {**MOST_COST, name: value}, "$")
    with pytest.raises(ArtifactError, match="missing"):
        decode(KernelCost, {k: v for k, v in MOST_COST.items() if k != name}, "$")


def test_one_wide_cell_does_not_widen_all() -> None:
    rows = [["kernel", "x" * 100_000], *[["kernel", "x"]] * 1000]
    assert len(table_text(["name", "parameters"], rows)) < 1_000_000


def test_messages_are_bounded(tmp_path: Path) -> None:
    write_small(tmp_path / "m")
    with read_artifact(tmp_path / "m") as artifact:
        manifest = artifact.manifest
    long = replace(manifest.entries[0], steps=(0,) * 20_000, step_weights=(0,) * 20_000)
    for entry in (long, replace(long, logits="all"), replace(long, step_weights=(0,))):
        wrong = replace(manifest, entries=(entry, *manifest.entries[1:]))
        with pytest.raises(ArtifactError) as caught:
            Manifest.from_dict(json.loads(wrong.to_json()))
        assert len(str(caught.value)) < 2000
