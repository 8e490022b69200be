"""Read how a checkpoint wants to be sampled: `generation_config.json` and the chat template."""

from __future__ import annotations

from typing import Any

from q35c import strictjson
from q35c.errors import ConfigError
from q35c.fields import Fields
from q35c.frontend.checkpoint import FILE_LIMITS, Checkpoint

NAME = "generation_config.json"
HF_TOP_K = 50  # what transformers samples from where the file is silent


def generation_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the manifest's `generation`. Keys it does not use, such as beam search's, are not errors.

    Raises ConfigError for a value of the wrong type or range.
    """
    document: dict[str, Any] = {}
    if data := checkpoint.files.get(NAME):
        document = strictjson.loads(data, where=NAME, limit=FILE_LIMITS[NAME], error=ConfigError)
    fields = Fields(document, NAME)
    return {
        "do_sample": fields.boolean("do_sample", False),
        "temperature": fields.number("temperature", 0.0, 1000.0, 1.0),
        "top_k": fields.integer("top_k", 0, 1 << 24, HF_TOP_K),
        "top_p": fields.number("top_p", 0.0, 1.0, 1.0),
        "min_p": fields.number("min_p", 0.0, 1.0, 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1e-3, 1000.0, 1.0),
        "presence_penalty": fields.number("presence_penalty", -1000.0, 1000.0, 0.0),
        "stop_ids": stop_ids(document, checkpoint),
    }


def stop_ids(document: Any, checkpoint: Checkpoint) -> list[int]:
    """Return the ids that end a sequence: the generation config's, else the model config's."""
    given = document.get("eos_token_id")
    if given is None:
        return list(checkpoint.config.eos_token_ids)
    given = given if isinstance(given, list) else [given]
    top = checkpoint.config.vocab_size - 1
    return list(Fields({"eos_token_id": given}, NAME).integers("eos_token_id", 0, top))


def chat_template(checkpoint: Checkpoint) -> bytes | None:
    """Return the chat template: its own file, or the one inside `tokenizer_config.json`."""
    if own := checkpoint.files.get("chat_template.jinja"):
        return own
    name = "tokenizer_config.json"
    if not (data := checkpoint.files.get(name)):
        return None
    document = strictjson.loads(data, where=name, limit=FILE_LIMITS[name], error=ConfigError)
    template = document.get("chat_template") if isinstance(document, dict) else None
    return template.encode() if isinstance(template, str) else None
