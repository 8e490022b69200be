"""Tokenizer files that would take the process with them are refused before the library reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from q35c.demo import CHECKPOINT
from q35c.errors import TokenizerError
from q35c.runtime.tokenizer import Tokenizer
from q35c.runtime.tokenizer_check import check_tokenizer
from tests.fake_artifact import tokenizer

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FRAME_TOKEN = {"SpecialToken": {"id": "x", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def sequence(name: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def frame(pieces: int, ids: int) -> dict[str, Any]:
    token = {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}
    single = [FRAME_TOKEN] * pieces + [TEXT]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [],
        "special_tokens": {"x": token},
    }


def added(content: str, at: int = 300) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": at, "content": content, **flags}


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        step = sequence("normalizers", [step])
    return step


BOMBS: dict[str, dict[str, Any]] = {
    "doubling": {"normalizer": sequence("normalizers", [DOUBLE] * 40)},
    "one large replacement": {"normalizer": {**DOUBLE, "content": "a" * 200}},
    "replacement of nothing": {
        "normalizer": {**DOUBLE, "pattern": {"Regex": ""}, "content": "a" * 90}
    },
    "nested sequences": {
        "normalizer": sequence("normalizers", [sequence("normalizers", [DOUBLE] * 5)] * 2)
    },
    "deep sequences": {"normalizer": nested(60)},
    "many steps": {"normalizer": sequence("normalizers", [{"type": "NFC"}] * 17)},
    "bytes of bytes": {"pre_tokenizer": sequence("pretokenizers", [BYTES] * 5)},
    "long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    "compiled table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "many framing tokens": {"post_processor": frame(100, 1)},
    "long framing tokens": {"post_processor": frame(1, 100)},
    "both": {"post_processor": frame(10_000, 20_000)},
    "doubling in the decoder": {"decoder": sequence("decoders", [DOUBLE] * 16)},
    "long added token": {"added_tokens": [added("a" * 1000)]},
    "many added tokens": {"added_tokens": [added(f"{i:0200}", 300 + i) for i in range(2000)]},
    "repeated group": {"pre_tokenizer": split("(a|aa)+b")},
    "repeated group, counted": {"pre_tokenizer": split("(a{1,9}){1,90}")},
    "many repetitions": {"pre_tokenizer": split("a*a*a*a*b")},
    "large count": {"pre_tokenizer": split("a{1,60000}")},
    "long pattern": {"pre_tokenizer": split("a|" * 2000)},
    "long suffix": {"model": {"end_of_word_suffix": "a" * 3000}},
    "large number": {"model": {"max_input_chars_per_word": 1 << 40}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused(name: str) -> None:
    base = json.loads(tokenizer())
    change = BOMBS[name]
    if "model" in change:
        change = {"model": {**base["model"], **change["model"]}}
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        check_tokenizer(json.dumps({**base, **change}).encode())


ODD: list[Any] = [None, 5, "x", [], {}, [5], {"type": 5}, {"type": "Sequence", "normalizers": 5}]


@pytest.mark.parametrize(
    "value", [*ODD, {"special_tokens": {"x": {"ids": 5}}, "single": 5}], ids=str
)
def test_odd_parts_are_left_to_the_library(value: Any) -> None:
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model")
    for part in parts:
        document = json.dumps({**json.loads(tokenizer()), part: value}).encode()
        check_tokenizer(document)
        try:
            Tokenizer(document)
        except TokenizerError:
            continue


def test_too_large_or_no_json() -> None:
    for document in (b" " * ((64 << 20) + 1), b"", b"{", b"[" * 100_000, b"[]", b"5"):
        with pytest.raises(TokenizerError):
            check_tokenizer(document)


# Patterns of families that are in use, whose tokenizers have to pass.
PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s+",
]


def test_tokenizers_in_use_pass() -> None:
    check_tokenizer((CHECKPOINT / "tokenizer.json").read_bytes())
    for pattern in PATTERNS:
        steps = sequence("pretokenizers", [split(pattern), BYTES])
        Tokenizer(json.dumps({**json.loads(tokenizer()), "pre_tokenizer": steps}).encode())
    metaspace = {**DOUBLE, "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    steps = sequence("normalizers", [prepend, metaspace])
    Tokenizer(json.dumps({**json.loads(tokenizer()), "normalizer": steps}).encode())
