"""Compare an artifact's decode rate with what this machine's memory allows, and with PyTorch.

    python bench/decode.py model.q35c
    python bench/decode.py model.q35c --eager ./Qwen3.5-0.8B --rounds 5

A decoded token must read every weight it needs once, so bytes per token over read bandwidth is the limit.
The two (three with --eager) are measured in turns in one process, because other work on a machine
changes all of them: only the ratios are findings.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import q35c
from q35c.artifact.manifest import Manifest

_PROBE_BYTES = 512 << 20  # larger than any cache


def bytes_per_token(manifest: Manifest) -> float:
    """Return the weight bytes that decoding one token reads: all but unrouted experts and lookups."""
    config = manifest.model
    routed = config.num_experts_per_tok / config.num_experts if config.is_moe else 1.0
    total = 0.0
    for weight in manifest.weights:
        is_lookup = weight.name == "embed_tokens" and not config.tie_word_embeddings
        share = routed if weight.layout.startswith("per expert") else 1.0
        total += 0.0 if is_lookup else share * weight.bytes
    return total


def read_bandwidth(threads: int) -> Callable[[], float]:
    """Return a function that measures bytes per second, read by `threads` threads at once."""
    parts = np.array_split(np.ones(_PROBE_BYTES // 4, np.float32), threads)
    pool = ThreadPoolExecutor(threads)

    def measure() -> float:
        begin = time.perf_counter()
        list(pool.map(np.max, parts))
        return _PROBE_BYTES / (time.perf_counter() - begin)

    return measure


def decode_rate(model: Any, tokens: int) -> Callable[[], float]:
    """Return a function that measures decoded tokens per second behind a short prompt."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, tokens).tolist()

    def measure() -> float:
        with model.session(context=min(model.context, tokens + 1)) as session:
            session.prefill(ids[:1])
            begin = time.perf_counter()
            for token in ids:
                session.decode(token)
            return tokens / (time.perf_counter() - begin)

    return measure


def eager_rate(source: str, threads: int, tokens: int) -> Callable[[], float]:
    """Return the same measure of transformers' eager model in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens + 1))

    @torch.no_grad()
    def measure() -> float:
        cache = model(ids[:, :1], use_cache=True).past_key_values
        begin = time.perf_counter()
        for at in range(1, tokens + 1):
            cache = model(ids[:, at : at + 1], past_key_values=cache).past_key_values
        return tokens / (time.perf_counter() - begin)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--eager", metavar="SOURCE", help="model directory to run in PyTorch too")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    model = q35c.load(options.artifact, options.threads)
    measures = {
        "read bandwidth": read_bandwidth(model.threads),
        "q35c": decode_rate(model, options.tokens),
    }
    if options.eager:
        measures["eager bf16"] = eager_rate(options.eager, model.threads, options.tokens)
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(options.rounds + 1):
        for name, measure in measures.items():
            found[name].append(measure())
    median = {name: statistics.median(values[1:]) for name, values in found.items()}

    size, bandwidth = bytes_per_token(model.manifest), median.pop("read bandwidth")
    print(f"{model.manifest.target.name}, {model.manifest.precision}, {model.threads} threads")
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; {size / 1e6:.0f} MB a token")
    for name, rate in median.items():
        share = rate * size / bandwidth
        print(f"{name}: {rate:.1f} tok/s, {share:.0%} of the bandwidth")


if __name__ == "__main__":
    main()
