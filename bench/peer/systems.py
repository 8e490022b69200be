"""The systems that are compared: what each runs, how its sample is taken, what one of its tokens reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer import sizes
from peer.install import Cache, Unavailable, module_path, open_manifest
from peer.machine import ChildError
from q35c.config import ModelConfig
from q35c.frontend import family
from q35c.frontend.checkpoint import open_checkpoint

START = "start"


@dataclass(frozen=True, slots=True)
class Test:
    """One thing to measure, named as by llama-bench; `start` is a process's way to 16 tokens' logits."""

    name: str
    prompt: int = 0
    decode: int = 0
    depth: int = 0
    repeats: int = 3
    is_warm: bool = True

    @property
    def tokens(self) -> int:
        return self.prompt or self.decode

    @property
    def is_prefill(self) -> bool:
        return bool(self.prompt) and self.name != START

    @property
    def context(self) -> int:
        """Return how many positions the test needs."""
        return self.depth + self.tokens + 1


@dataclass(frozen=True, slots=True)
class System:
    """Something that runs the model. `token_bytes` are the weights that one decoded token reads."""

    name: str
    program: tuple[str, ...]
    file_bytes: int
    token_bytes: float
    cache_bytes: float  # keys and values of one position
    is_ours: bool = False
    is_llama: bool = False
    is_prefill_only: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, test: Test, threads: int) -> list[str]:
        """Return the command of one sample; it prints one line of JSON."""
        sizes_ = (test.prompt, test.decode, test.depth, test.repeats, threads)
        prompt, decode, depth, repeats, count = map(str, sizes_)
        if self.is_llama:
            flags = ["-p", prompt, "-n", decode, "-d", depth, "-r", repeats, "-t", count]
            return [*self.program, *flags, *([] if test.is_warm else ["--no-warmup"])]
        flags = ["--prompt", prompt, "--decode", decode, "--depth", depth, "--repeats", repeats]
        flags += ["--threads", count, *([] if test.is_warm else ["--no-warmup"])]
        return [*self.program, *flags]

    def seconds(self, line: str) -> tuple[list[float], float | None]:
        """Return the seconds of the repetitions, and of loading where the system tells."""
        found: dict[str, Any] = json.loads(line)
        if self.is_llama:
            return [1e-9 * value for value in found["samples_ns"]], None
        return found["seconds"], found["load_seconds"]


Maker = Callable[[], System]


def read_config(model: str) -> ModelConfig:
    """Return the shape of a family name or a checkpoint directory."""
    return open_checkpoint(model).config if Path(model).exists() else family.load(model)


def llama_system(cache: Cache, model: str, kind: str, is_repacked: bool) -> System:
    """Return llama.cpp on a GGUF file of one quantization, with or without its repacked layouts."""
    config = read_config(model)
    path = cache.gguf(model, kind)
    routed = config.num_experts_per_tok / config.num_experts if config.is_moe else 1.0
    found = cache.ask("peer.weight_bytes", str(path), "--routed", str(routed))
    bench = str(cache.llama() / "llama-bench")
    flags = ("-m", str(path), "-fa", "1", "-o", "jsonl", "--repack", str(int(is_repacked)))
    return System(
        f"llama.cpp {kind}" + ("" if is_repacked else ", no repack"),
        (bench, *flags),
        path.stat().st_size,
        float(str(found["token_bytes"])),
        2.0 * sizes.cache_elements(config),  # f16
        is_llama=True,
        is_prefill_only=not is_repacked,
        # its default way of waiting sometimes stalls decoding for many times a token's time
        environment={"OMP_WAIT_POLICY": "active"},
    )


def ort_system(cache: Cache, model: str) -> System:
    """Return onnxruntime-genai on the int4 model of its own builder."""
    if read_config(model).is_moe:
        raise Unavailable("not measured for mixture-of-experts models")
    path = cache.ort(model)
    found = cache.ask("peer.weight_bytes", str(path))
    return System(
        "onnxruntime-genai int4 b128",
        (cache.python(), "-m", "peer.worker", "ort", str(path)),
        sum(file.stat().st_size for file in path.glob("model.onnx*")),
        float(str(found["token_bytes"])),
        4.0 * sizes.cache_elements(read_config(model)),  # f32
        environment=module_path(),
    )


def eager_system(cache: Cache, model: str) -> System:
    """Return eager PyTorch in bfloat16 through transformers."""
    config = read_config(model)
    if config.is_moe:
        raise Unavailable("not measured for mixture-of-experts models")
    path = cache.checkpoint(model)
    size = (path / "model.safetensors").stat().st_size
    return System(
        "eager PyTorch bf16",
        (cache.python(), "-m", "peer.worker", "eager", str(path)),
        size,
        float(size),
        2.0 * sizes.cache_elements(config),
        environment=module_path(),
    )


def ours(path: Path) -> System:
    """Return q35c on a compiled artifact."""
    manifest = open_manifest(path)
    return System(
        f"q35c {manifest.precision}",
        (sys.executable, "-m", "peer.worker", "q35c", str(path)),
        path.stat().st_size,
        sizes.artifact_token_bytes(manifest),
        sizes.artifact_cache_bytes(manifest),
        is_ours=True,
        environment=module_path(),
    )


def make_systems(
    makers: Sequence[tuple[str, Maker]], say: Callable[[str], None]
) -> tuple[list[System], dict[str, str]]:
    """Make what can be made here; return the systems, and why each missing one is skipped."""
    systems: list[System] = []
    skipped: dict[str, str] = {}
    for name, maker in makers:
        try:
            systems.append(maker())
        except (Unavailable, ChildError, OSError, ValueError) as error:
            skipped[name] = str(error)
            say(f"skipped: {name}: {error}")
    return systems, skipped
