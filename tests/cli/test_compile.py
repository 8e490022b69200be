"""`q35c compile`: what it writes, and what it refuses before it works."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from q35c.artifact import read_artifact
from q35c.cli.compile import default_output, next_command
from q35c.errors import OptionError
from tests.cli.conftest import Run, start
from tests.compiled import artifact, checkpoint
from tests.fake_artifact import tokenizer, write_fake


def test_compile_writes_the_artifact(run: Run, tmp_path: Path) -> None:
    output, dump = tmp_path / "made.q35c", tmp_path / "ir"
    options = ("--precision", "f32", "--kv-dtype", "int8", "--context", 64, "--batch", 1, "--dump-ir", dump)  # fmt: skip
    target = ("--target", "cpu:x86-64-v4")  # need not run here
    result = run("compile", checkpoint("dense"), "-o", output, *options, *target)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{output}: ")
    with read_artifact(output) as made:
        made.verify_weights()
        manifest = made.manifest
    assert (manifest.precision, manifest.context, manifest.batch) == ("f32", 64, 1)
    assert cache_types(manifest) == {"i8"}
    assert manifest.target.name == "cpu:x86-64-v4"
    assert {path.name.partition("_")[2] for path in dump.iterdir()} >= {
        "import.txt",
        "fuse_norm.txt",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ir", "made.q35c"]


def cache_types(manifest: Any) -> set[str]:
    return {tensor.dtype for tensor in manifest.state.tensors if tensor.growth == "context"}


def test_an_int8_cache_takes_half_of_the_state(run: Run) -> None:
    sizes = {}
    for kv_dtype in ("bf16", "int8"):
        path = artifact("dense", kv_dtype=kv_dtype)
        with read_artifact(path) as made:
            tensors = [t for t in made.manifest.state.tensors if t.growth == "context"]
        assert cache_types(made.manifest) == {{"int8": "i8"}.get(kv_dtype, kv_dtype)}
        sizes[kv_dtype] = sum(tensor.bytes for tensor in tensors)
        assert f"keys and values {kv_dtype}" in run("inspect", path).stdout
    assert sizes["int8"] == sizes["bf16"] * (32 + 4) // 64  # head dim 32, one f32 scale for each


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "cpu:z80"), "unknown target"),
        (("--precision", "f7"), "precision"),
        (("--kv-dtype", "int4"), "auto, f32, bf16, int8"),
        (("--context", 0), "--context"),
        (("--context", 1 << 30), "--context"),
        (("--batch", 0), "--batch"),
        (("--load-format", "pickle"), "--load-format"),
    ],
)
def test_refused_options(
    run: Run, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    result = run("compile", checkpoint("dense"), "-o", tmp_path / "x.q35c", *arguments)
    assert (result.exit_code, said in result.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "dump", "said"),
    [
        ("absent/x.q35c", "ir", "no such directory"),
        (".", "ir", "a directory has this name"),
        ("x.q35c", "file", "cannot make the directory"),
        ("x.q35c", "file/ir", "cannot make the directory"),
        ("fifo", "ir", "a FIFO has this name"),
        ("same", "same", "the output has this name too"),
        ("x" * 300, "ir", "name too long"),
        ("model/config.json", "ir", "would be replaced"),
        ("x.q35c", "pipes", "a FIFO has this name"),
    ],
)
def test_places_are_checked_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, dump: str, said: str
) -> None:
    def forbidden(_config: object) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr("q35c.compile.trace_model", forbidden)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "00_import.txt")
    shutil.copytree(checkpoint("dense"), tmp_path / "model")
    result = run(
        "compile", tmp_path / "model", "-o", tmp_path / output, "--dump-ir", tmp_path / dump
    )
    assert (result.exit_code, said in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"generation_config.json": '{"temperature": "warm"}'}, "temperature"),
        ({"tokenizer_config.json": "not JSON"}, "tokenizer_config.json"),
    ],
)
def test_small_files_are_read_before_the_work(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    said: str,
) -> None:
    def forbidden(_config: object) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr("q35c.compile.trace_model", forbidden)
    shutil.copytree(checkpoint("dense"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    for name, text in files.items():
        (tmp_path / "model" / name).write_text(text)
    result = run("compile", tmp_path / "model", "-o", tmp_path / "x.q35c")
    assert (result.exit_code, said in result.stderr) == (1, True)


def test_no_linker_and_no_space_are_found_before_code_is_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("code was made")

    monkeypatch.setattr("q35c.codegen.cpu.build.build_shared", forbidden)
    command = "compile", checkpoint("dense"), "-o", tmp_path / "x.q35c", "--context", 64
    with monkeypatch.context() as patch:
        patch.setattr("shutil.which", lambda name: None)
        patch.setattr("q35c.compile.trace_model", forbidden)
        result = run(*command)
        assert (result.exit_code, "no linker was found" in result.stderr) == (1, True)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=512))
    result = run(*command)
    assert (result.exit_code, "not enough free disk space" in result.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./absent", "absent"),
        ("qwen3.5-0.8b", "has no weights"),
    ],
)
def test_refused_sources(run: Run, tmp_path: Path, source: str, said: str) -> None:
    result = run("compile", source, "-o", tmp_path / "x.q35c")
    assert (result.exit_code, said in result.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.nightly), signal.SIGINT],
)
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    names = ("temporary", "cache", "out")
    for name in names:
        (tmp_path / name).mkdir()
    environment = {"TMPDIR": str(tmp_path / "temporary"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["compile", checkpoint("dense"), "-o", tmp_path / "out" / "x.q35c", "--context", 64]
    child = start(*command, environment=environment)
    while not list((tmp_path / "temporary").glob("q35c-objects-*/*.o")):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert [list((tmp_path / name).glob("*")) for name in ("temporary", "out")] == [[], []]


def test_default_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.model").mkdir()
    assert default_output("my.model/", ".q35c") == Path("my.model.q35c")
    assert default_output("Qwen/Qwen3.5-0.8B", ".q35c") == Path("Qwen3.5-0.8B.q35c")
    assert default_output("qwen3.5-0.8b", ".onnx") == Path("qwen3.5-0.8b.onnx")
    assert default_output(".", ".q35c").stem == tmp_path.name
    with pytest.raises(OptionError, match="-o"):
        default_output("gone/", ".q35c")


def test_what_to_try_next(tmp_path: Path) -> None:
    write_fake(tmp_path / "a b.q35c")
    assert next_command(tmp_path / "a b.q35c") == f"q35c chat '{tmp_path}/a b.q35c'"
    write_fake(tmp_path / "raw.q35c", segments={"tokenizer": tokenizer()})
    assert next_command(tmp_path / "raw.q35c").startswith("q35c generate ")
