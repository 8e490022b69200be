"""Hostile and broken model directories: each a change to a good one, and what opening it must say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Case = Callable[[Path], None]
CASES: dict[str, tuple[str | None, str, Case]] = {}
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"
MARKER = "executed.txt"
HEAD, NORM = "lm_head.weight", "model.norm.weight"


def case(error: str | None, message: str = "") -> Callable[[Case], Case]:
    """Register a change to a good directory and what opening the result must say."""

    def register(function: Case) -> Case:
        CASES[function.__name__.replace("_", " ")] = error, message, function
        return function

    return register


def add(name: str, error: str | None, message: str, function: Case) -> None:
    CASES[name] = error, message, function


def edit_config(**changes: Any) -> Case:
    def change(path: Path) -> None:
        document = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(document))

    return change


def write(name: str, data: bytes) -> Case:
    return lambda path: void((path / name).write_bytes(data))


def void(value: object) -> None:
    del value


def edit_tensors(**changes: torch.Tensor | None) -> Case:
    """Replace, add (or with None remove) tensors; `__` in a keyword stands for a dot."""

    def change(path: Path) -> None:
        tensors: dict[str, Any] = dict(load_file(path / SHARD))
        tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, path / SHARD)

    return change


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Case:
    """Rewrite a shard's JSON header; `change` may return other bytes to write instead."""

    def apply(path: Path) -> None:
        data = (path / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        (path / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def shard_in_two(path: Path) -> dict[str, str]:
    """Split the single shard into two with an index; return the index's map."""
    tensors = load_file(path / SHARD)
    (path / SHARD).unlink()
    placed: dict[str, str] = {}
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, path / f"part-{number}.safetensors")
        placed.update(dict.fromkeys(part, f"part-{number}.safetensors"))
    write_index(path, placed)
    return placed


def write_index(path: Path, placed: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def edit_index(change: Callable[[dict[str, Any]], None]) -> Case:
    def apply(path: Path) -> None:
        placed: dict[str, Any] = dict(shard_in_two(path))
        change(placed)
        write_index(path, placed)

    return apply


def replace_by_link(name: str) -> Case:
    def change(path: Path) -> None:
        outside = path.parent.parent / f"outside-{path.name}-{name}"
        (path / name).rename(outside)
        (path / name).symlink_to(outside)

    return change


def replace_by_fifo(name: str) -> Case:
    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


def replace_by_directory(name: str) -> Case:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return change


def cut(name: str, keep: float) -> Case:
    def change(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * keep)])

    return change


def grow(name: str, size: int) -> Case:
    return lambda path: os.truncate(path / name, size)


add("good", None, "", lambda path: None)

# --- config.json ----------------------------------------------------------------------------------
add("no config", "CheckpointError", "missing", lambda path: (path / "config.json").unlink())
add("linked config", "CheckpointError", "symbolic link", replace_by_link("config.json"))
add("fifo config", "CheckpointError", "not a regular file", replace_by_fifo("config.json"))
add("directory config", "CheckpointError", "not a regular", replace_by_directory("config.json"))
add("huge config", "CheckpointError", "too large", grow("config.json", 2 << 20))
add("terabyte config", "CheckpointError", "too large", grow("config.json", 1 << 40))
add("empty config", "ConfigError", "malformed JSON", write("config.json", b""))
add("cut config", "ConfigError", "malformed JSON", cut("config.json", 0.9))
add("binary config", "ConfigError", "not UTF-8", write("config.json", b"\x93NUMPY\xff"))
add("list config", "ConfigError", "JSON object", write("config.json", b"[1]"))
add("deep config", "ConfigError", "nested", write("config.json", b'{"a":' * 100_000))
add("many values", "ConfigError", "too many", write("config.json", b"[" + b"0," * 400_000 + b"0]"))
add(
    "long integer", "ConfigError", "64 bits", write("config.json", b'{"a":' + b"9" * 900_000 + b"}")
)
add("nan", "ConfigError", "NaN", write("config.json", b'{"model_type": NaN}'))
add("duplicate key", "ConfigError", "duplicate key 'a'", write("config.json", b'{"a":1,"a":2}'))
add("surrogate", "ConfigError", "surrogate", write("config.json", b'{"model_type":"\\ud800"}'))
add("bool as size", "ConfigError", "hidden_size", edit_config(hidden_size=True))
add("negative layers", "ConfigError", "num_hidden_layers", edit_config(num_hidden_layers=-1))
add("billion layers", "ConfigError", "num_hidden_layers", edit_config(num_hidden_layers=10**9))
add("2^63 heads", "ConfigError", "num_attention_heads", edit_config(num_attention_heads=2**62))
add("huge vocabulary", "ConfigError", "vocab_size", edit_config(vocab_size=2**40))
add("end token outside", "ConfigError", "eos_token_id", edit_config(eos_token_id=10**6))
add("long model type", "UnsupportedConfig", "model_type", edit_config(model_type="x" * 500_000))
add("another model", "UnsupportedConfig", "'llama'", edit_config(model_type="llama"))
add("unknown key", "UnsupportedConfig", "'surprise'", edit_config(surprise=1))
add("quantized", "UnsupportedConfig", "quantization", edit_config(quantization_config={"a": 1}))
add(
    "more layers", "CheckpointError", "missing tensor",
    edit_config(num_hidden_layers=2, layer_types=["full_attention"] * 2),
)  # fmt: skip
add("other vocabulary", "CheckpointError", "wrong shape", edit_config(vocab_size=308))
add("tied but different", "CheckpointError", "differs", edit_config(tie_word_embeddings=True))


@case(None)
def code_beside_the_weights(path: Path) -> None:
    edit_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})(path)
    code = f"open({str(path.parent.parent / MARKER)!r}, 'w')\n"
    for name in ("modeling_evil.py", "__init__.py", "setup.py", "sitecustomize.py", "torch.py"):
        (path / name).write_text(code)


@case("CheckpointError", "two tensors")
def two_prefixes_for_one_tensor(path: Path) -> None:
    edit_tensors(**{"model.language_model.norm.weight": torch.zeros(64)})(path)


# --- pickles and other containers -------------------------------------------------------------------
class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def only_pickle(name: str) -> Case:
    def change(path: Path) -> None:
        (path / SHARD).unlink()
        (path / name).write_bytes(pickle.dumps(Evil(path.parent.parent / MARKER)))

    return change


for _name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt", "w.pkl"):
    add(f"only {_name}", "CheckpointError", "never opened", only_pickle(_name))


@case("CheckpointError", "damaged")
def pickle_named_safetensors(path: Path) -> None:
    (path / SHARD).write_bytes(pickle.dumps(Evil(path.parent.parent / MARKER)))


@case("CheckpointError", "damaged")
def torch_archive_named_safetensors(path: Path) -> None:
    torch.save({NORM: Evil(path.parent.parent / MARKER)}, path / SHARD)


@case(None)
def pickle_beside_the_weights(path: Path) -> None:
    data = pickle.dumps(Evil(path.parent.parent / MARKER))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "tokenizer.pkl"):
        (path / name).write_bytes(data)


add("no weights", "CheckpointError", "no .safetensors", lambda path: (path / SHARD).unlink())

# --- shards ---------------------------------------------------------------------------------------
add("linked shard", "CheckpointError", "symbolic link", replace_by_link(SHARD))
add("fifo shard", "CheckpointError", "not a regular file", replace_by_fifo(SHARD))
add("directory shard", "CheckpointError", "not a regular", replace_by_directory(SHARD))
add("empty shard", "CheckpointError", "damaged", cut(SHARD, 0))
for _part in (0.00001, 0.005, 0.5, 0.999999):
    add(f"shard cut to {_part}", "CheckpointError", "damaged", cut(SHARD, _part))


@case("CheckpointError", "damaged")
def bytes_after_the_last_tensor(path: Path) -> None:
    with open(path / SHARD, "ab") as file:
        file.write(b"extra")


for _length in (0, 1, 7, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1):
    add(
        f"header length {_length}", "CheckpointError", "damaged",
        write(SHARD, struct.pack("<Q", _length) + b"{}"),
    )  # fmt: skip
add("header not JSON", "CheckpointError", "malformed JSON", edit_header(lambda header: b"{]"))
add("header a list", "CheckpointError", "damaged", edit_header(lambda header: b"[1, 2]"))
add("header not UTF-8", "CheckpointError", "not UTF-8", edit_header(lambda header: b'{"\xff": 1}'))
add("header deep", "CheckpointError", "nested", edit_header(lambda header: b'{"a":' * 100_000))


def set_field(field: str, value: Any) -> Case:
    return edit_header(lambda header: header[NORM].update({field: value}))


for _value in ([0, 1 << 62], [-4, 252], [1 << 40, (1 << 40) + 256], [8, 0], [0], "0", [True, 256]):
    add(f"offsets {_value}", "CheckpointError", "damaged", set_field("data_offsets", _value))
for _value in ([1 << 40], [1 << 62, 4], [-64], ["64"], 64):
    add(f"declared shape {_value}", "CheckpointError", "damaged", set_field("shape", _value))
add("declared 8 x 8", "CheckpointError", "wrong shape", set_field("shape", [8, 8]))
add("unknown dtype", "CheckpointError", "damaged", set_field("dtype", "F33"))
add("integers", "UnsupportedConfig", "I32", set_field("dtype", "I32"))


@case("CheckpointError", "damaged")
def two_tensors_share_bytes(path: Path) -> None:
    edit_header(lambda header: header.update({HEAD: header["model.embed_tokens.weight"]}))(path)


@case("CheckpointError", "duplicate key 'model.norm.weight'")
def duplicate_name_in_the_header(path: Path) -> None:
    def twice(header: dict[str, Any]) -> bytes:
        one, other = json.dumps(header[NORM]), json.dumps(header[HEAD])
        rest = json.dumps({key: value for key, value in header.items() if key != NORM})
        return f'{rest[:-1]}, "{NORM}": {other}, "{NORM}": {one}}}'.encode()

    edit_header(twice)(path)


add("missing tensor", "CheckpointError", "'norm.weight'", edit_tensors(model__norm__weight=None))
add("extra tensor", "CheckpointError", "'other'", edit_tensors(other=torch.zeros(1)))
add(
    "tensor of a later layer", "CheckpointError", "unexpected tensor",
    edit_tensors(model__layers__1__input_layernorm__weight=torch.zeros(64)),
)  # fmt: skip
add(
    "transposed tensor", "CheckpointError", "wrong shape",
    edit_tensors(lm_head__weight=torch.zeros(64, 307)),
)  # fmt: skip
add("scalar tensor", "CheckpointError", "wrong", edit_tensors(model__norm__weight=torch.zeros(())))
for _dtype in (torch.float8_e4m3fn, torch.int8, torch.float64, torch.bool, torch.uint8):
    add(
        f"stored as {_dtype}", "UnsupportedConfig", "not supported",
        edit_tensors(model__norm__weight=torch.zeros(64).to(_dtype)),
    )  # fmt: skip
add(
    "expert in a dense model", "CheckpointError", "unexpected tensor",
    edit_tensors(model__layers__0__mlp__experts__0__up_proj__weight=torch.zeros(1)),
)  # fmt: skip

# --- index ----------------------------------------------------------------------------------------
add("two shards", None, "", lambda path: void(shard_in_two(path)))
for _shard in (
    "../part-0.safetensors", "/etc/passwd", "sub/part-0.safetensors", "part-0.bin", "",
    "part-0.safetensors\n", "..", "part-0.safetensors\x00", "part\\0.safetensors", "．.safetensors",
    None, 1, ["part-0.safetensors"],
):  # fmt: skip
    add(
        f"shard named {_shard!r}", "CheckpointError", "unsafe shard name",
        edit_index(lambda placed, shard=_shard: placed.update({NORM: shard})),
    )  # fmt: skip
add(
    "shard that is not there", "CheckpointError", "missing",
    edit_index(lambda placed: placed.update({NORM: "part-9.safetensors"})),
)  # fmt: skip
add(
    "index swaps two shards", "CheckpointError", "disagree",
    edit_index(lambda placed: placed.update({NORM: placed[HEAD], HEAD: placed[NORM]})),
)  # fmt: skip
add("index forgets one", "CheckpointError", "disagree", edit_index(lambda placed: placed.pop(NORM)))
add(
    "index invents one", "CheckpointError", "does not hold",
    edit_index(lambda placed: placed.update({"model.other": placed[NORM]})),
)  # fmt: skip
add("index is a list", "CheckpointError", "no weight_map", write(INDEX, b"[]"))
add("index without map", "CheckpointError", "no weight_map", write(INDEX, b'{"metadata": {}}'))
add("index with empty map", "CheckpointError", "no weight_map", write(INDEX, b'{"weight_map": {}}'))
add(
    "index twice", "CheckpointError", "duplicate", write(INDEX, b'{"weight_map":{"a":"b","a":"c"}}')
)
add("index not JSON", "CheckpointError", "malformed", write(INDEX, b"{"))


@case("CheckpointError", "ambiguous")
def single_file_and_index(path: Path) -> None:
    shutil.copy(path / SHARD, path / "copy.safetensors")
    shard_in_two(path)
    (path / "copy.safetensors").rename(path / SHARD)


@case("CheckpointError", "no model.safetensors.index.json")
def shards_without_index(path: Path) -> None:
    shard_in_two(path)
    (path / INDEX).unlink()


@case("CheckpointError", "symbolic link")
def linked_index(path: Path) -> None:
    shard_in_two(path)
    replace_by_link(INDEX)(path)


@case("CheckpointError", "symbolic link")
def one_linked_shard(path: Path) -> None:
    shard_in_two(path)
    replace_by_link("part-1.safetensors")(path)


@case("CheckpointError", "symbolic link")
def shard_linked_to_itself(path: Path) -> None:
    (path / SHARD).unlink()
    (path / SHARD).symlink_to(SHARD)


# --- companions -------------------------------------------------------------------------------------
for _file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    add(f"linked {_file}", "CheckpointError", "symbolic link", replace_by_link(_file))
    add(f"fifo {_file}", "CheckpointError", "not a regular file", replace_by_fifo(_file))
    add(f"terabyte {_file}", "CheckpointError", "too large", grow(_file, 1 << 40))
