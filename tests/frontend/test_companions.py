"""The files beside the weights: read from every place, checked at once, and what is not taken is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from q35c.artifact.layout import most_segment_bytes
from q35c.errors import CheckpointError, ConfigError, TokenizerError
from q35c.frontend.checkpoint import open_checkpoint
from q35c.frontend.companions import read_companions
from q35c.frontend.generation import generation_defaults
from q35c.limits import MAX_TEMPLATE_BYTES
from q35c.runtime.chat import render_chat
from tests.models import (
    SPECIAL_TOKENS,
    edit_json,
    write_checkpoint,
)

TEMPLATE_HOLDERS = ["tokenizer_config.json", "chat_template.json"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", "dense", num_hidden_layers=1, full_attention_interval=1)


def notes_of(path: Path) -> str:
    return "\n".join(read_companions(open_checkpoint(path)).notes)


def test_a_whole_checkpoint_leaves_nothing_to_say(model: Path) -> None:
    companions = read_companions(open_checkpoint(model))
    assert companions.notes == ()
    assert set(companions.segments) == {"tokenizer", "tokenizer_config", "chat_template"}


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (256, [258, 256], "<|im_end|>", [258, 256]),
        (256, None, "<|im_end|>", [256, 258]),
        (256, 257, None, [257, 256]),
        (None, None, {"content": "<|im_end|>"}, [258]),
        (-1, -1, None, []),
    ],
)
def test_end_tokens_are_united(
    model: Path, config: Any, generation: Any, tokenizer: Any, expected: list[int]
) -> None:
    assert SPECIAL_TOKENS[2] == "<|im_end|>"
    edit_json(model / "config.json", eos_token_id=config)
    edit_json(model / "generation_config.json", eos_token_id=generation)
    edit_json(model / "tokenizer_config.json", eos_token=tokenizer)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert generation_defaults(open_checkpoint(model))["stop_ids"] == expected


def test_the_end_of_a_turn_ends_a_sequence(model: Path) -> None:
    (model / "generation_config.json").unlink()
    edit_json(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    (model / "chat_template.jinja").write_text("{{ messages }}<|im_end|>")
    assert 258 in generation_defaults(open_checkpoint(model))["stop_ids"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_too_many_end_tokens_are_refused(model: Path, name: str) -> None:
    edit_json(model / name, eos_token_id=list(range(65)))
    with pytest.raises(ConfigError, match="too many end tokens"):
        generation_defaults(open_checkpoint(model))


def test_null_and_minus_one_are_not_given_and_off(model: Path) -> None:
    keys = (
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
    )
    edit_json(model / "generation_config.json", **dict.fromkeys(keys))
    given = generation_defaults(open_checkpoint(model))
    (model / "generation_config.json").write_text("{}")
    silent = generation_defaults(open_checkpoint(model))
    assert {**given, "stop_ids": 0} == {**silent, "stop_ids": 0}
    edit_json(model / "generation_config.json", top_k=-1, top_p=-1, min_p=-1)
    off = generation_defaults(open_checkpoint(model))
    assert (off["top_k"], off["top_p"], off["min_p"]) == (0, 1.0, 0.0)


def test_what_generation_does_not_do_is_said(model: Path) -> None:
    edit_json(model / "generation_config.json", num_beams=4, stop_strings=["x"], typical_p=1.0)
    assert "num_beams, stop_strings not taken" in notes_of(model)
    (model / "generation_config.json").unlink()
    edit_json(model / "config.json", temperature=0.6)
    assert "config.json: temperature not taken" in notes_of(model)


@pytest.mark.parametrize("holder", TEMPLATE_HOLDERS)
@pytest.mark.parametrize("is_list", [False, True])
def test_templates_stand_in_several_places(model: Path, holder: str, is_list: bool) -> None:
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": "other"}]
    edit_json(model / holder, chat_template=named if is_list else text)
    (model / "additional_chat_templates").mkdir()
    companions = read_companions(open_checkpoint(model))
    assert companions.segments["chat_template"].decode() == text
    said = "\n".join(companions.notes)
    assert ("chat templates tool_use not taken" in said) == is_list
    assert "additional_chat_templates: only the default" in said


@pytest.mark.parametrize("name", ["chat_template.jinja", *TEMPLATE_HOLDERS])
@pytest.mark.parametrize("letter", ["x", "ä"])
def test_a_template_is_as_large_as_the_runtime_takes(model: Path, name: str, letter: str) -> None:
    (model / "chat_template.jinja").unlink()

    def write(size: int) -> None:
        text = letter * (size // len(letter.encode()))
        if name.endswith(".json"):
            edit_json(model / name, chat_template=text)
        else:
            (model / name).write_text(text)

    write(MAX_TEMPLATE_BYTES)
    made = read_companions(open_checkpoint(model)).segments["chat_template"]
    assert len(made) == most_segment_bytes("chat_template")
    message = {"role": "user", "content": "hello"}
    assert render_chat(made.decode(), [message]) == made.decode()
    write(MAX_TEMPLATE_BYTES + 2)
    with pytest.raises((CheckpointError, TokenizerError), match="is too large"):
        read_companions(open_checkpoint(model))


def test_a_slow_tokenizer_is_built(model: Path) -> None:
    document = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").unlink()
    vocabulary = {t: i for t, i in document["model"]["vocab"].items() if t not in SPECIAL_TOKENS}
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    edit_json(model / "added_tokens.json", **{t: 256 + i for i, t in enumerate(SPECIAL_TOKENS)})
    companions = read_companions(open_checkpoint(model))
    assert "built from vocab.json and merges.txt" in "\n".join(companions.notes)
    built = Tokenizer.from_buffer(companions.segments["tokenizer"])
    known = Tokenizer.from_str(json.dumps(document))
    for text in ("the anthem", "<|im_end|>", "ein Ä\n\n12 ü"):
        assert built.encode(text).ids == known.encode(text).ids
    (model / "vocab.json").write_text('{"a": 0}')
    assert "takes token ids, not text" in notes_of(model)


def test_tokens_that_do_not_fit_are_said(model: Path) -> None:
    document = json.loads((model / "tokenizer.json").read_text())
    first = document["added_tokens"][0]  # 266 tokens are there, and 307 rows in the table
    new = [{**first, "id": i, "content": f"<new{i}>"} for i in range(266, 309)]
    edit_json(model / "tokenizer.json", added_tokens=[*document["added_tokens"], *new])
    edit_json(model / "added_tokens.json", **{"<think>": 300})
    edit_json(model / "tokenizer_config.json", added_tokens_decoder={"301": {"content": "<box>"}})
    said = notes_of(model)
    assert "ids 307 to 308 have no embedding" in said
    assert "added_tokens.json: '<think>' not taken" in said and "'<box>' not taken" in said


def test_a_long_integer_in_the_tokenizers_settings_is_common(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", model_max_length=10**30)
    assert notes_of(model) == ""


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("generation_config.json", '{"temperature": "warm"}', ConfigError),
        ("tokenizer_config.json", "not JSON", ConfigError),
        ("chat_template.jinja", "{% for", TokenizerError),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"}}', TokenizerError),
        ("added_tokens.json", "[]", ConfigError),
        ("chat_template.json", '{"chat_template": [1, {}]}', ConfigError),
    ],
)
def test_small_files_are_checked_at_once(
    model: Path, name: str, text: str, error: type[Exception]
) -> None:
    (model / name).write_text(text)
    with pytest.raises(error):
        read_companions(open_checkpoint(model))
