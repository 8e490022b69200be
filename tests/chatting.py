"""Fake models that answer conversations as a script says: reasoning, content and calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tests.fake_artifact import END, GENERATION, VOCAB, tokenizer, write_fake

THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_end|>{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% if enable_thinking is defined and not enable_thinking %}"
    "~{% else %}<think>\n{% endif %}{% endif %}"
)
CALL = "<tool_call>\n<function=now>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n</tool_call>"
CUT_CALL = "<tool_call>\n<function=now>\n<parameter=zone>\nU"
ADDED = ["<think>", "</think>", CALL, CUT_CALL, "\n\n"]
THINK, CLOSE, CALLED, CUT, BLANK = range(258, 263)
NOW = {
    "name": "now",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
}


def chat_tokenizer() -> bytes:
    """Return the fake tokenizer with tokens that are text: the tags of thinking, and whole calls."""
    made = Tokenizer.from_buffer(tokenizer())
    assert made.add_tokens(ADDED) == len(ADDED)
    return made.to_str().encode()


def lines(*tokens: str | int) -> list[int]:
    """Return ids of a script: bytes of texts, and tokens."""
    return [i for part in tokens for i in ([*part.encode()] if isinstance(part, str) else [part])]


def bigram(*scripts: list[int], strength: float = 30.0) -> np.ndarray:
    """Return a table that says these scripts: each token makes the next one likely, the last END."""
    table = np.zeros((VOCAB, VOCAB), np.float32)
    for ids in scripts:
        for first, second in zip(ids, [*ids[1:], END], strict=True):
            table[first, second] = strength
    return table


def write_chat(
    path: Path,
    *scripts: list[int],
    is_endless: bool = False,
    template: str = THINKING_TEMPLATE,
    **more: Any,
) -> Path:
    """Write a fake model that follows scripts, of which the first token is the prompt's last.

    An endless one begins a script again behind its end, with the second token.
    """
    table = bigram(*scripts) if scripts else None
    for ids in scripts if table is not None and is_endless else ():
        table[ids[-1]] = np.roll(table[ids[-1]], ids[1] - END)
    segments = {"tokenizer": chat_tokenizer(), "chat_template": template.encode()}
    more.setdefault("generation", {**GENERATION, "stop_ids": [END]})
    write_fake(path, bigram=table, segments=segments, **more)
    return path
