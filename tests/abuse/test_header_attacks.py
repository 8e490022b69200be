"""Headers that try to be read twice, to take memory, or to hide something. One named case each."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from q35c.artifact import layout, read_artifact
from q35c.artifact.manifest import FORMAT
from q35c.errors import ArtifactError
from q35c.layouts import blobs
from tests.fake_artifact import rebuild, with_manifest, write_small

REPOSITORY = Path(__file__).parents[2]
Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("header") / "whole"
    write_small(path)
    return path.read_bytes()


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(data: bytes, header: dict | str) -> bytes:
    raw = (
        header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    ).encode()
    raw += b" " * (blobs.align(8 + len(raw)) - 8 - len(raw))
    start = 8 + int.from_bytes(data[:8], "little")
    return len(raw).to_bytes(8, "little") + raw + data[start:]


def edit_header(change: Callable[[dict], object]) -> Change:
    def apply(data: bytes) -> bytes:
        header = header_of(data)
        change(header)
        return with_header(data, header)

    return apply


def text_header(change: Callable[[str], str]) -> Change:
    return lambda data: with_header(
        data, change(json.dumps(header_of(data), separators=(",", ":")))
    )


def manifest_text(change: Callable[[str], str]) -> Change:
    def apply(data: bytes) -> bytes:
        return rebuild(
            data, lambda tree: change(json.dumps(tree, sort_keys=True, separators=(",", ":")))
        )

    return apply


def length(value: int) -> Change:
    return lambda data: value.to_bytes(8, "little") + data[8:]


def move_metadata_last(header: dict) -> None:
    header["__metadata__"] = header.pop("__metadata__")


ATTACKS: dict[str, Change] = {
    "length 0": length(0),
    "length 1": length(1),
    "length of all bits": length(2**64 - 1),
    "length 2^63": length(2**63),
    "length just over the cap": length(layout.MAX_HEADER_BYTES + 1),
    "length beyond the file": lambda data: length(len(data) - 7)(data),
    "length up to the end": lambda data: length(len(data) - 8)(data),
    "length one block short": lambda data: length(int.from_bytes(data[:8], "little") - 64)(data),
    "length one block long": lambda data: length(int.from_bytes(data[:8], "little") + 64)(data),
    "unaligned data start": lambda data: length(int.from_bytes(data[:8], "little") + 1)(
        data[: 8 + int.from_bytes(data[:8], "little")]
        + b" "
        + data[8 + int.from_bytes(data[:8], "little") :]
    ),
    "extra tensor": edit_header(
        lambda h: h.update(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    ),
    "missing tensor": edit_header(lambda h: h.pop("b")),
    "renamed tensor": edit_header(lambda h: h.update(c=h.pop("b"))),
    "swapped offsets": edit_header(
        lambda h: h["a.weight"].update(data_offsets=h["tokenizer"]["data_offsets"])
    ),
    "overlapping offsets": edit_header(lambda h: h["b"].update(data_offsets=[0, 64])),
    "negative offsets": edit_header(lambda h: h["code"].update(data_offsets=[-64, 64])),
    "reversed offsets": edit_header(lambda h: h["code"].update(data_offsets=[128, 0])),
    "huge offsets": edit_header(lambda h: h["b"].update(data_offsets=[2**62, 2**63])),
    "other dtype": edit_header(lambda h: h["a.weight"].update(dtype="F16", shape=[2, 64])),
    "other shape": edit_header(lambda h: h["a.weight"].update(shape=[64])),
    "metadata last": edit_header(move_metadata_last),
    "extra metadata": edit_header(lambda h: h["__metadata__"].update(more="x")),
    "metadata not text": edit_header(lambda h: h.update(__metadata__={"q35c": {}})),
    "no metadata": edit_header(lambda h: h.pop("__metadata__")),
    "wrong manifest hash": edit_header(
        lambda h: h["__metadata__"].update({"q35c.sha256": "0" * 64})
    ),
    "duplicate tensor": text_header(lambda t: t[:-1] + ',"b":{}}'),
    "duplicate metadata": text_header(lambda t: t[:-1] + ',"__metadata__":{}}'),
    "not an object": text_header(lambda t: f"[{t}]"),
    "trailing text": text_header(lambda t: t + "x"),
    "tab as padding": text_header(lambda t: t + "\t"),
    "byte order mark": text_header(lambda t: "\ufeff" + t),
    "escaped key": text_header(lambda t: t.replace('"code"', '"c\\u006fde"')),
    "escaped manifest": text_header(lambda t: t.replace("arena_bytes", "arena\\u005fbytes")),
    "spaces in the manifest": manifest_text(lambda t: t.replace(":", ": ")),
    "keys out of order": manifest_text(lambda t: '{"format":3,' + t[1:].replace('"format":3,', "")),
    "number in another form": manifest_text(lambda t: t.replace('"lanes":4', '"lanes":4.0')),
    "exponent": manifest_text(lambda t: t.replace("4096", "4096e0")),
    "leading zero": manifest_text(lambda t: t.replace("4096", "04096")),
    "NaN": manifest_text(lambda t: t.replace('"temperature":1.0', '"temperature":NaN')),
    "Infinity": manifest_text(lambda t: t.replace('"temperature":1.0', '"temperature":Infinity')),
    "overflow to infinity": manifest_text(
        lambda t: t.replace('"temperature":1.0', '"temperature":1e999')
    ),
    "unknown key": manifest_text(lambda t: t[:-1] + ',"zzz":0}'),
    "duplicate key": manifest_text(lambda t: t[:-1] + ',"weights_bytes":320}'),
    "manifest is a list": manifest_text(lambda t: f"[{t}]"),
    "manifest is empty": manifest_text(lambda t: ""),
    "manifest is null": manifest_text(lambda t: "null"),
    "deep nesting": manifest_text(lambda t: "[" * 100_000),
    "closed deep nesting": manifest_text(lambda t: "[" * 5_000 + "]" * 5_000),
    "long integer": manifest_text(lambda t: '{"format":' + "9" * 100_000 + "}"),
    "format is a bool": manifest_text(lambda t: t.replace(f'"format":{FORMAT}', '"format":true')),
    "escape without end": manifest_text(lambda t: t[:-1] + "\\"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(tmp_path: Path, whole: bytes, name: str) -> None:
    path = tmp_path / "attack"
    attacked = ATTACKS[name](whole)
    assert attacked != whole
    path.write_bytes(attacked)
    with pytest.raises(ArtifactError):
        read_artifact(path)


def test_a_damaged_manifest_is_called_so(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "m").write_bytes(whole.replace(b"q35c 0.1.0", b"q35c 0.1.1", 1))
    with pytest.raises(ArtifactError, match="manifest is damaged"):
        read_artifact(tmp_path / "m")


def test_the_tools_themselves_change_nothing(tmp_path: Path, whole: bytes) -> None:
    """The helpers above reproduce a valid file when they change nothing."""
    for change in (edit_header(lambda h: None), text_header(str), manifest_text(str)):
        assert change(whole) == whole


# --- In a child with 512 MB of address space and an alarm -------------------------------------------

CHILD = """
import json, resource, signal, sys
from pathlib import Path
from q35c.artifact import read_artifact
from q35c.errors import ArtifactError

resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
folder = Path(sys.argv[1])
def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
grown = {}
for path in sorted(folder.iterdir()):
    before = peak()
    signal.alarm(60)
    try:
        with read_artifact(path) as artifact:
            artifact.verify_segments()
            artifact.verify_weights()
        outcome = "loaded"
    except ArtifactError as error:
        outcome = "refused"
    signal.alarm(0)
    grown[path.name] = [outcome, (peak() - before) * 1024]
print(json.dumps(grown))
"""


def run_child(folder: Path) -> dict[str, list]:
    command = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def bombs() -> dict[str, str]:
    """Manifests of up to 1 MB that parse into as much memory as JSON can."""
    size = 1 << 20
    return {
        "empty objects": "[" + "{}," * (size // 6) + "{}]",
        "empty lists": "[" + "[]," * (size // 6) + "[]]",
        "numbers": "[" + "1," * (size // 4) + "1]",
        "as many keys as allowed": "{" + ",".join(f'"{i:011}":1' for i in range(49_990)) + "}",
        "keys": "{" + ",".join(f'"{i}":1' for i in range(size // 12)) + "}",
        "one string": json.dumps("x" * (size // 2)),
        "unclosed strings": '"' * (size // 3),
        "escapes": '"' + "\\u0041" * (size // 10) + '"',
        "digits": "1" * (size // 2),
        "floats": "[" + "1.5," * (size // 6) + "1.5]",
    }


def test_bombs_take_little_memory(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "0 first").write_bytes(whole)  # pays for what every read allocates once
    for name, text in bombs().items():
        data = with_manifest(whole, text)
        assert len(data) <= (1 << 20) + 8192, name
        (tmp_path / name).write_bytes(data)
    results = run_child(tmp_path)
    assert results.pop("0 first")[0] == "loaded"
    assert len(results) == len(bombs())
    for name, (outcome, grown) in results.items():
        assert outcome == "refused", name
        assert grown <= 16 << 20, f"{name} took {grown} bytes"


@pytest.mark.parametrize("seed", [1])
def test_random_mutants_in_little_memory(tmp_path: Path, whole: bytes, seed: int) -> None:
    """Bytes replaced, runs deleted, doubled or swapped anywhere in the file."""
    random.seed(seed)
    for number in range(1500):
        data = bytearray(whole)
        for _ in range(random.choice((1, 1, 2, 8))):
            at, span = random.randrange(len(data)), random.choice((1, 1, 4, 64))
            kind = random.randrange(4)
            if kind == 0:
                data[at : at + span] = random.randbytes(len(data[at : at + span]))
            elif kind == 1:
                del data[at : at + span]
            elif kind == 2:
                data[at:at] = data[at : at + span]
            else:
                other = random.randrange(len(data))
                data[at : at + span], data[other : other + span] = (
                    data[other : other + span],
                    data[at : at + span],
                )
        (tmp_path / f"{number:05}").write_bytes(data)
    originals = {p.name for p in tmp_path.iterdir() if p.read_bytes() == whole}
    for name, (outcome, _) in run_child(tmp_path).items():
        assert (outcome == "loaded") == (name in originals), f"seed {seed}, mutant {name}"
