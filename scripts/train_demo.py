"""Train the small demo model that ships with q35c, on one CPU core.

The model has the architecture of the real family (`qwen3_5_moe_text`: six gated-delta-rule
layers, two full-attention layers, eight experts of which two run) with about ten million
parameters and a byte-level BPE of 4,096 entries.

The text is the King James Bible, which is in the public domain, as packed by Debian:

    apt-get install bible-kjv
    bible -f 'ge1:1-re22:21' < /dev/null > kjv.txt

That prints one verse a line (`Ge1:1 In the beginning ...`). Here the references are dropped,
verses are joined into short paragraphs, and each chapter is one document. About 2 % of the
chapters are held out. The shipped checkpoint was made with

    export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000
    export MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    python scripts/train_demo.py --text kjv.txt --out q35c/demo/model --minutes 82

The two exports keep the allocator from handing every step's buffers back to the system, which
costs about a tenth of the time; they change no result. The learning rate follows the elapsed
share of the time budget, so a run of any length ends annealed, but two runs never agree bit for
bit. The checkpoint with the best held-out loss is written to `--out` while training runs, and
a model card with the figures and samples of the run at the end.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen3_5MoeTextConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers import Qwen3_5MoeForCausalLM as CausalLM
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The pre-tokenizer of the Qwen3.5 family: combining marks count as letters.
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VERSE = re.compile(r"(\d?[A-Za-z]+\d+):\d+ (.*)")
VERSES_PER_PARAGRAPH = 4
HELD_OUT_SHARE = 0.02
WARMUP_STEPS = 60
FINAL_LR_SHARE = 0.1
ROUTER_LOSS_WEIGHT = 3e-3
EVAL_SECONDS = 360.0
FIRST_EVAL_SECONDS = 150.0
CARD_PROMPTS = ("And it came to pass", "In the beginning", "The LORD is my shepherd;")
MODEL_CARD = """\
# The demo model

A very small `qwen3_5_moe_text` model, trained from scratch by `scripts/train_demo.py` so that
everything can be tried without a download. It continues text in the manner of the King James
Bible; it knows nothing else and follows no instructions. The text (Debian's `bible-kjv-text`) is
in the public domain, and so is this checkpoint.

| | |
|---|---|
{figures}

The held-out loss is that of the stored bf16 weights in fp32 arithmetic, in windows of 512 tokens.
The held-out chapters are random ones. They also chose which checkpoint of the run to keep, and
parallel passages may stand on both sides of the split. The script says how to get the text; the
command is

    python scripts/train_demo.py --text kjv.txt --out q35c/demo/model --minutes 82

## Samples

Greedy, and sampled with temperature 0.7, top-k 20, top-p 0.9. The prompt is bold.

{samples}
"""


class Corpus(NamedTuple):
    """Token ids of the training chapters and of the held-out chapters."""

    train: list[torch.Tensor]
    held_out: list[torch.Tensor]


def read_chapters(path: Path) -> list[str]:
    """Return one string per chapter, with verses joined into paragraphs of whole sentences."""
    verses: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise SystemExit(f"{path}: expected 'Ge1:1 text', got {line[:60]!r}")
        verses.setdefault(match[1], []).append(match[2])
    return [join_verses(chapter) for chapter in verses.values()]


def join_verses(verses: list[str]) -> str:
    """Join verses with spaces; start a paragraph after a full stop once four verses are in."""
    paragraphs: list[list[str]] = [[]]
    for verse in verses:
        is_full = len(paragraphs[-1]) >= VERSES_PER_PARAGRAPH
        if is_full and paragraphs[-1][-1].endswith((".", "?", "!")):
            paragraphs.append([])
        paragraphs[-1].append(verse)
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """Train the byte-level BPE; the special tokens take the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return FastTokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: FastTokenizer) -> Qwen3_5MoeTextConfig:
    """Return the demo's architecture."""
    endoftext = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return Qwen3_5MoeTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=8,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        max_position_embeddings=4096,
        initializer_range=0.04,
        tie_word_embeddings=True,
        eos_token_id=endoftext,
        pad_token_id=endoftext,
        router_aux_loss_coef=ROUTER_LOSS_WEIGHT,
    )


def make_model(config: Qwen3_5MoeTextConfig) -> CausalLM:
    """Return a fresh fp32 model whose delta-rule heads start with a memory of useful length."""
    model = CausalLM(config)
    model.set_experts_implementation("grouped_mm")
    for layer in model.model.layers:
        if layer.block_type != "linear_attention":
            continue
        mixer = layer.linear_attn
        # The library starts with a time step near one, which forgets within a token or two.
        # This is Mamba's initialisation: log-uniform steps, through the inverse of softplus.
        steps = torch.empty(config.linear_num_value_heads)
        steps.uniform_(math.log(1e-3), math.log(0.1)).exp_()
        with torch.no_grad():
            mixer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
            mixer.A_log.copy_(torch.empty_like(steps).uniform_(1.0, 16.0).log())
            mixer.conv1d.weight.uniform_(-0.5, 0.5)
    return model


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def iterate_batches(
    documents: list[torch.Tensor], batch: int, tokens: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield [batch, tokens + 1] ids forever; each epoch shuffles the chapters and the cuts."""
    rng = random.Random(seed)
    while True:
        stream = torch.cat(rng.sample(documents, len(documents)))
        stream = stream[rng.randrange(tokens) :]
        rows = (len(stream) - 1) // tokens
        order = rng.sample(range(rows), rows)
        for first in range(0, rows - batch + 1, batch):
            starts = [row * tokens for row in order[first : first + batch]]
            yield torch.stack([stream[start : start + tokens + 1] for start in starts])


def train_step(
    model: CausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor
) -> tuple[float, float]:
    """Take one step; return the next-token loss in nats and the mean load-balancing loss."""
    out = model(ids[:, :-1], use_cache=False, output_router_logits=True)
    loss = cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
    # The library balances the sum over layers, under which one layer may still starve experts.
    config = model.config
    balance = sum(
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in out.router_logits
    )
    balance = balance / config.num_hidden_layers
    (loss + config.router_aux_loss_coef * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), balance.item()


@torch.no_grad()
def held_out_loss(model: CausalLM, documents: list[torch.Tensor]) -> float:
    """Return the mean next-token loss in nats over the documents, in windows of 512 tokens."""
    stream, tokens = torch.cat(documents), 512
    total, count = 0.0, 0
    for first in range(0, len(stream) - 1, tokens):
        ids = stream[None, first : first + tokens + 1]
        logits = model(ids[:, :-1], use_cache=False).logits[0]
        total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def save_checkpoint(model: CausalLM, tokenizer: FastTokenizer, out: Path) -> None:
    """Write weights in bf16, tokenizer and configs to `out`, replacing whole files."""
    out.mkdir(parents=True, exist_ok=True)
    endoftext, _, im_end = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        eos_token_id=[endoftext, im_end],
        pad_token_id=endoftext,
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        # The family's checkpoints hold the experts of a layer in one tensor; so does this one.
        rounded.save_pretrained(folder, save_original_format=False)
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def learning_rate_share(step: int, elapsed_share: float) -> float:
    """Return the share of the peak rate: linear warm-up by steps, cosine by elapsed time."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, elapsed_share)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * cosine)


def train(args: argparse.Namespace, corpus: Corpus, tokenizer: FastTokenizer) -> dict[str, str]:
    """Train until the time is spent, keeping the best checkpoint; return the card's figures."""
    model = make_model(make_config(tokenizer))
    optimizer = make_optimizer(model, args.lr)
    batches = iterate_batches(corpus.train, args.batch, args.tokens, args.seed)

    start, budget = time.monotonic(), args.minutes * 60.0
    next_eval, best, mean_loss = FIRST_EVAL_SECONDS, math.inf, math.log(VOCAB_SIZE)
    step, seen = 0, 0
    while True:
        elapsed = time.monotonic() - start
        is_done = elapsed >= budget
        if is_done or elapsed >= next_eval:
            next_eval += EVAL_SECONDS
            held_out = held_out_loss(model, corpus.held_out)
            print(f"step {step} held-out {held_out:.4f} (best before {best:.4f})", flush=True)
            if held_out < best:
                best = held_out
                save_checkpoint(model, tokenizer, args.out)
        if is_done:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_share(step, elapsed / budget)
        loss, balance = train_step(model, optimizer, next(batches))
        mean_loss += 0.05 * (loss - mean_loss)
        step += 1
        seen += args.batch * args.tokens
        if step % 10 == 0:
            print(
                f"step {step} tokens {seen:,} tokens/s {seen / elapsed:.0f} "
                f"loss {mean_loss:.4f} balance {balance:.3f} held-out {best:.4f} "
                f"left {(budget - elapsed) / 60.0:.1f} min",
                flush=True,
            )
    epochs, speed = seen / sum(map(len, corpus.train)), seen / elapsed
    return {
        "Tokens seen": f"{seen:,}: {epochs:.1f} epochs, {step:,} steps",
        "Time": f"{elapsed / 60.0:.0f} minutes on one CPU core, {speed:.0f} tokens/s",
        "Last training loss": f"{mean_loss:.3f} nats per token",
    }


def sample_text(model: CausalLM, tokenizer: FastTokenizer) -> str:
    """Return a greedy and a sampled continuation of each card prompt, as Markdown."""
    parts: list[str] = []
    for prompt, is_sampled in itertools.product(CARD_PROMPTS, (False, True)):
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=is_sampled, max_new_tokens=80)[0, ids.shape[1] :]
        text = f"**{prompt}**{tokenizer.decode(out, skip_special_tokens=True)}".strip()
        label = "Sampled" if is_sampled else "Greedy"
        parts.append(f"{label}:\n\n> " + text.replace("\n", "\n> "))
    return "\n\n".join(parts)


def write_model_card(out: Path, corpus: Corpus, run: dict[str, str]) -> None:
    """Read the checkpoint back in fp32, measure it, and write `README.md` beside it."""
    model = CausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = FastTokenizer.from_pretrained(out)
    loss = held_out_loss(model, corpus.held_out)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    figures = {
        "Parameters": f"{parameters:.1f} M, stored in bf16",
        "Trained on": f"{len(corpus.train):,} chapters, {sum(map(len, corpus.train)):,} tokens",
        "Held out": f"{len(corpus.held_out)} chapters, {sum(map(len, corpus.held_out)):,} tokens",
        **run,
        "Held-out loss": f"{loss:.3f} nats per token, perplexity {math.exp(loss):.1f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    card = MODEL_CARD.format(figures=table, samples=sample_text(model, tokenizer))
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="verses, one a line")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--minutes", type=float, default=82.0, help="time budget")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    chapters = read_chapters(args.text)
    random.Random(args.seed).shuffle(chapters)
    held_out_count = round(HELD_OUT_SHARE * len(chapters))
    tokenizer = train_tokenizer(chapters[held_out_count:])
    documents = [torch.tensor(tokenizer.encode(text + "<|endoftext|>")) for text in chapters]
    corpus = Corpus(train=documents[held_out_count:], held_out=documents[:held_out_count])
    for name, part in (("train", corpus.train), ("held-out", corpus.held_out)):
        print(f"{name}: {len(part)} chapters, {sum(map(len, part)):,} tokens", flush=True)
    write_model_card(args.out, corpus, train(args, corpus, tokenizer))


if __name__ == "__main__":
    main()
