"""Artifacts without a compiler: a small C program behind the real file format and runtime."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from q35c.artifact import Manifest
from q35c.artifact.entries import INPUTS, TEXT, EntrySpec, io_layout
from q35c.artifact.schema import encode
from q35c.artifact.writer import ArtifactWriter, WeightEntry
from q35c.layouts import blobs

VOCAB, CONTEXT, BATCH, MAX_TOKENS = 270, 256, 4, 16
END, IM_END = 256, 257  # special tokens, behind the 256 bytes
GENERATION: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "stop_ids": [IM_END, END],
}
MODEL: dict[str, Any] = {
    "model_type": "qwen3_5",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
    },
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_ids": [END],
    "intermediate_size": 32,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def state_layout(context: int = CONTEXT) -> dict[str, Any]:
    """Return the manifest's state of the fake model."""
    tensors = [
        ("layers.0.conv", [1, 96], "plain"),
        ("layers.0.delta", [1, 32, 32], "plain"),
        ("layers.1.keys", [1, context // 32, 32, 32], "cells32"),
        ("layers.1.values", [1, context, 32], "cells32"),
    ]
    return blobs.state_layout(
        {"name": name, "dtype": "f32", "layout": layout, "shape": shape}
        for name, shape, layout in tensors
    )


def entry_specs(batch: int = BATCH) -> list[EntrySpec]:
    """Return what the fake model's entries take and return."""
    inputs = tuple(name for name in INPUTS if name in TEXT)
    return [
        EntrySpec("prefill", 1, MAX_TOKENS, inputs, "last"),
        EntrySpec("decode", batch, 1, inputs, "all"),
        EntrySpec("score", 1, MAX_TOKENS // 2, inputs, "all"),
        EntrySpec("extend", 1, MAX_TOKENS, inputs, "none"),
    ]


def manifest_fields(
    context: int = CONTEXT, batch: int = BATCH, max_context: int = CONTEXT, **changes: Any
) -> dict[str, Any]:
    """Return the fields that a compiler hands to the writer."""
    return {
        "model": MODEL,
        "target": {
            "backend": "cpu",
            "name": "cpu:x86-64-v1",
            "cpu_features": ["sse2"],
            "lanes": 4,
        },
        "precision": "f32",
        "context": context,
        "max_context": max(context, max_context),
        "batch": batch,
        "entries": [
            {
                **encode(spec),
                "symbol": spec.name,
                "steps": [0],
                "step_weights": [0],
                "single_row_steps": [0] if spec.logits == "last" else [],
            }
            for spec in entry_specs(batch)
        ],
        "row_layouts": {"q8g64": "int8-sums"},
        "arena_bytes": 4096,
        "max_threads": 8,
        "state": state_layout(max(context, max_context)),
        "kernels": [
            {
                "name": "k0",
                "family": "linear",
                "parameters": {"n": 4, "dtype": "f32", "taps": [1, 2]},
                "cost": {
                    "peak": "f32",
                    "weight_share": 1,
                    "bytes_per_sequence": 0,
                    "bytes_per_token": 0,
                    "bytes_per_cell": 0,
                    "cached_bytes_per_token": 32,
                    "operations_per_token": 8.5,
                    "operations_per_score": 0,
                },
            }
        ],
        "probes": [{"name": "f32", "symbol": "probe_f32", "work": 1024}],
        "generation": GENERATION,
        **changes,
    }


def cuda_target(*architectures: str, image: bytes = b"image") -> dict[str, Any]:
    """Return the manifest's target of a fake CUDA model; every image has the same bytes."""
    figures = {"registers": 32, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 1024}
    rows = {"count": 2, "times": 1, "over": 8}
    one = {"count": 1, "times": 0, "over": 1}
    arguments = [("weights", 64, 0), ("io", 0, 64), ("i32", 1, 1), ("i64", -5, 0)]
    launch = [{"of": of, "start": at, "per_row": step} for of, at, step in arguments]
    return {
        "backend": "cuda",
        "name": "cuda",
        "images": [
            {
                "architecture": name,
                "sha256": hashlib.sha256(image).hexdigest(),
                "figures": [] if name == "emulated" else [figures],
            }
            for name in architectures
        ],
        "kernels": [
            {
                "symbol": "k0_kernel",
                "grid": [rows, one, one],
                "block": [32, 4, 1],
                "shared_bytes": 4096,
                "parameters": ["pointer", "pointer", "i32", "i64"],
            }
        ],
        "programs": [{"launches": [{"arguments": launch}]} for _ in entry_specs()],
    }


def weight_entries() -> list[WeightEntry]:
    """Return the fake model's weights; the second's bytes are no multiple of 64."""
    return [
        WeightEntry("bigram", "vector", "f32", (VOCAB, VOCAB), ("embed_tokens.weight",)),
        WeightEntry("noise", "vector", "f32", (2,)),
    ]


def numbers(context: int = CONTEXT, batch: int = BATCH, steps: int = 1) -> dict[str, int]:
    """Return the numbers that the fake model's source takes as macros."""
    state = [tensor["offset"] for tensor in state_layout(context)["tensors"]]
    io = io_layout(entry_specs(batch), VOCAB, MODEL["hidden_size"], steps)["fields"]
    found = dict(zip(("CONV", "DELTA", "KEYS", "VALUES"), state, strict=True))
    found |= {name.upper(): field["offset"] for name, field in io.items()}
    noise = blobs.align(4 * VOCAB * VOCAB)
    return {**found, "VOCAB": VOCAB, "MAX_TOKENS": MAX_TOKENS, "NOISE": noise}


@functools.cache
def code(context: int = CONTEXT, batch: int = BATCH) -> bytes:
    """Compile the fake model. Skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "model.so"
        defines = [f"-D{name}={value}" for name, value in numbers(context, batch).items()]
        source = Path(__file__).with_name("fake_model.c")
        options = ["-O1", "-shared", "-fPIC", "-o", str(output), str(source)]
        subprocess.run([compiler, *defines, *options], check=True)
        return output.read_bytes()


@functools.cache
def tokenizer() -> bytes:
    """Return a byte-level tokenizer: 256 bytes, two special tokens, no merges."""
    # The byte-level alphabet, in byte order, so that a token id is its byte.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    made = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return made.to_str().encode()


def script(*texts: str | Sequence[int], strength: float = 30.0) -> np.ndarray:
    """Return a bigram table that says these texts: each byte makes the next one likely.

    A text must not hold a byte twice, as a bigram has no memory; the last byte leads to END.
    """
    table = np.zeros((VOCAB, VOCAB), np.float32)
    for text in texts:
        ids = [*text.encode()] if isinstance(text, str) else [*text]
        assert len(set(ids)) == len(ids), "a bigram script cannot repeat a byte"
        for first, second in zip(ids, [*ids[1:], END], strict=True):
            table[first, second] = strength
    return table


def write_fake(
    path: Path,
    *,
    bigram: np.ndarray | None = None,
    noise: float = 1.0,
    failing_token: int = 0,
    segments: Mapping[str, bytes] | None = None,
    with_code: bool = True,
    **changes: Any,
) -> Manifest:
    """Write an artifact; `segments` replaces the text segments, `changes` the manifest's fields."""
    fields = manifest_fields(**changes)
    program = code(fields["max_context"], fields["batch"]) if with_code else b"not code " * 3
    if segments is None:
        segments = {"tokenizer": tokenizer(), "chat_template": CHAT_TEMPLATE.encode()}
    table = np.zeros((VOCAB, VOCAB), np.float32) if bigram is None else bigram
    with ArtifactWriter(path, fields, {"code": program, **segments}, weight_entries()) as writer:
        for half in np.split(table, 2):
            writer.write("bigram", half)
        writer.write("noise", np.array([noise, failing_token], np.float32))
        return writer.commit()


def write_with_messages(path: Path) -> None:
    """Write an artifact of 2,048 tokens' context in whose prompts messages begin with the token IM_END."""
    document = tokenizer().replace(b"<|im_end|>", b"<|im_start|>")
    write_fake(path, context=2048, segments={"tokenizer": document})


def small_fields(**changes: Any) -> tuple[dict[str, Any], list[WeightEntry]]:
    """Return fields and weights of the smallest valid artifact, for tests of the format alone."""
    entries = [
        WeightEntry("a.weight", "linear", "f32", (32, 2)),
        WeightEntry("b", "vector", "bf16", (3,), ("s",)),
    ]
    return manifest_fields(**changes), entries


def write_small(path: Path, images: Mapping[str, bytes] | None = None, **changes: Any) -> Manifest:
    """Write the smallest artifact: no real code, 320 bytes of weights."""
    fields, entries = small_fields(**changes)
    segments = {"code": b"\x7fELF no", "tokenizer": b"{}", **(images or {})}
    with ArtifactWriter(path, fields, segments, entries) as writer:
        writer.write("a.weight", np.arange(64, dtype=np.float32))
        writer.write("b", b"\x01\x02\x03\x04\x05\x06")
        return writer.commit()


def write_cuda(path: Path, *architectures: str, **changes: Any) -> Manifest:
    """Write the smallest artifact of a CUDA target."""
    images = {f"image_{name}": b"image" for name in architectures}
    return write_small(path, images, target=cuda_target(*architectures), max_threads=1, **changes)


def rebuild(data: bytes, change: Any) -> bytes:
    """Return artifact bytes with a changed manifest and every hash and length of it put right.

    `change` gets the parsed manifest and returns the JSON text to store.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(json.loads(header["__metadata__"]["q35c"]))
    return with_manifest(data, text)


def with_manifest(data: bytes, text: str) -> bytes:
    """Return artifact bytes with this manifest text, hashed, in an otherwise unchanged header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    header["__metadata__"] = {"q35c": text, "q35c.sha256": digest}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (blobs.align(8 + len(raw)) - 8 - len(raw))
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]
