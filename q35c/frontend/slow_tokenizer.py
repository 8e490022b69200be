"""Build a tokenizer.json from vocab.json and merges.txt, the files that tokenizers had before it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from q35c import strictjson
from q35c.errors import ConfigError
from q35c.frontend.checkpoint import SLOW_LIMITS

_MAX_VALUES = 2_000_000
# How the family cuts text into words: letters with their marks, digits one by one, line ends.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], added: Mapping[str, Any]
) -> bytes | None:
    """Return the family's byte-level BPE over a vocabulary and its merges; None if it is of another kind.

    `config` is tokenizer_config.json, `added` added_tokens.json: both name special tokens. Raises ConfigError for
    malformed files.
    """
    name = "vocab.json"
    vocabulary = strictjson.loads(
        files[name], where=name, limit=SLOW_LIMITS[name], error=ConfigError, max_values=_MAX_VALUES
    )
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        raise ConfigError("must map tokens to ids", where=name)
    if not _byte_characters() <= set(vocabulary):
        return None
    tokens = _added_tokens(vocabulary, config, added)
    # An added token that is not in the vocabulary gets the next free id, whatever its own is.
    vocabulary |= {token["content"]: token["id"] for token in tokens}
    document = {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": _merges(files["merges.txt"])},
    }  # fmt: skip
    return json.dumps(document, ensure_ascii=False).encode()


def _byte_characters() -> set[str]:
    """Return the characters that stand for the 256 bytes: printable ones for themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(byte) for byte in printable} | {chr(256 + i) for i in range(256 - len(printable))}


def _merges(data: bytes) -> list[str]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8", where="merges.txt", got=f"byte {error.start}") from None
    return [line for line in map(str.rstrip, lines) if line and not line.startswith("#version")]


def _added_tokens(
    vocabulary: Mapping[str, int], config: Mapping[str, Any], added: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return added tokens by id: what tokenizer_config.json says of each, else special ones."""
    tokens: dict[Any, dict[str, Any]] = {}
    for text, token_id in added.items():
        tokens[token_id] = {"content": text, "special": True}
    for key in ("eos_token", "pad_token", "bos_token", "unk_token"):
        text = config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in vocabulary:
            tokens.setdefault(vocabulary[text], {"content": text, "special": True})
    described = config.get("added_tokens_decoder")
    for token_id, token in (described if isinstance(described, dict) else {}).items():
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_token or not re.fullmatch(r"[0-9]{1,9}", token_id):
            raise ConfigError("bad entry of added_tokens_decoder", where="tokenizer_config.json")
        tokens[int(token_id)] = token
    if not all(type(token_id) is int for token_id in tokens):
        raise ConfigError("must map tokens to ids", where="added_tokens.json")
    return [_added_token(token_id, tokens[token_id]) for token_id in sorted(tokens)]


def _added_token(token_id: int, token: Mapping[str, Any]) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    kept = {flag: token.get(flag, False) for flag in flags}
    return {"id": token_id, "content": token["content"], **kept}
