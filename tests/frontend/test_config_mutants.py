"""R2 for `config.json` and `generation_config.json`: every key with every value.

A mutant is refused with a typed error, or read as another config; none is ignored and none crashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from q35c import strictjson
from q35c.config import ModelConfig
from q35c.errors import ConfigError
from q35c.frontend.generation import generation_defaults
from q35c.frontend.hf_config import MAX_CONFIG_BYTES, read_hf_config
from q35c.frontend.hf_keys import FIXED, is_irrelevant
from tests.models import config_document, multimodal_document

VALUES = ("0", "1", "-1", "1.5", "-0.0", str(2**31), str(2**53), str(2**63), "1e999", "NaN",
          "true", "null", '""', '"x"', "[]", "[0]", "{}", '"\\ud800"')  # fmt: skip
MISSING, DUPLICATE = "missing", "duplicate"
YARN = {
    **config_document()["rope_parameters"],
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "attention_factor": 1.5,
    "beta_fast": 31.0,
    "beta_slow": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
FIXED_KEYS = {key: values[0] for key, values in FIXED.items()}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "dense": config_document(),
    "mixture of experts": config_document("moe"),
    "yarn": config_document(rope_parameters=YARN),
    "multimodal": multimodal_document(config_document("moe")),
    "every fixed key": config_document() | FIXED_KEYS,
    "listed layers": config_document(
        full_attention_interval=None, layer_types=["linear_attention", "full_attention"] * 2
    ),
    "rope in its older places": config_document(
        rope_parameters=None,
        rope_theta=1e4,
        partial_rotary_factor=0.25,
        rope_scaling={"type": "default", "mrope_section": [2, 1, 1]},
    ),
}
Place = tuple[str | int, ...]


def places(tree: Any, path: Place = ()) -> Iterator[Place]:
    if path:
        yield path
    items: Any = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield from places(value, (*path, key))


def mutant(document: Any, place: Place, value: str) -> bytes:
    """Return the document as JSON text with one value replaced by a piece of text."""
    tree = json.loads(json.dumps(document))
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    if value == MISSING:
        del parent[place[-1]]
        return json.dumps(tree).encode()
    old, key = json.dumps(parent[place[-1]]), json.dumps(place[-1])
    parent[place[-1]] = "@"
    text = json.dumps(tree)
    if value == DUPLICATE:
        return text.replace(f'{key}: "@"', f"{key}: {old}, {key}: {old}").encode()
    return text.replace('"@"', value).encode()


def read(text: bytes) -> ModelConfig | None:
    try:
        document = strictjson.loads(
            text, where="config.json", limit=MAX_CONFIG_BYTES, error=ConfigError
        )
        return read_hf_config(document)
    except ConfigError:
        return None


def is_free(place: Place) -> bool:
    """Say whether a key stands for something that cannot change the logits."""
    return any(isinstance(key, str) and is_irrelevant(key) for key in place)


def mutants(document: Any) -> Iterator[tuple[Place, str]]:
    for place in places(document):
        is_key = isinstance(place[-1], str)
        for value in (*VALUES, *((MISSING, DUPLICATE) if is_key else ())):
            yield place, value


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_key_with_every_value(name: str) -> None:
    document = DOCUMENTS[name]
    original = read(json.dumps(document).encode())
    assert original is not None
    tried = 0
    for place, value in mutants(document):
        tried += 1
        config = read(mutant(document, place, value))
        if config is None:
            continue
        assert value not in (DUPLICATE, "NaN", "1e999", str(2**63)), f"{place} = {value}"
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        if config == original and value != MISSING and not is_free(place):
            old = get(document, place)
            # null, and -1 for an end token, may stand for a key that is not there.
            is_none = value == "null" or (value == "-1" and "eos_token_id" in place)
            is_absent = is_none and read(mutant(document, place, MISSING)) == config
            is_same = is_absent or equal(old, json.loads(value))
            assert is_same, f"{place} = {value} was ignored"
    assert tried > 12 * len(list(places(document)))


def get(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def equal(old: Any, new: Any) -> bool:
    """Compare JSON values; 1 is 1.0, but not true."""
    numbers = (int, float)
    is_alike = type(old) is type(new) or (type(old) in numbers and type(new) in numbers)
    return is_alike and old == new


GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "eos_token_id": [3, 4],
}


def test_every_generation_default_with_every_value() -> None:
    config = read_hf_config(config_document())

    def defaults(text: bytes) -> dict[str, Any] | None:
        checkpoint: Any = SimpleNamespace(config=config, files={"generation_config.json": text})
        try:
            return generation_defaults(checkpoint)
        except ConfigError:
            return None

    assert set(GENERATION) - {"eos_token_id"} | {"stop_ids"} == set(defaults(b"{}") or ())
    for place, value in mutants(GENERATION):
        made = defaults(mutant(GENERATION, place, value))
        if made is None:
            continue
        assert value not in (DUPLICATE, "NaN", "1e999", str(2**63)), f"{place} = {value}"
        for key, item in made.items():
            assert key == "stop_ids" or type(item) in (bool, int, float), f"{place} = {value}"
        assert all(0 <= token < config.vocab_size for token in made["stop_ids"])
