"""Read what stands in the small files of a checkpoint: JSON objects, the tokenizer, the chat template."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

from q35c import strictjson
from q35c.errors import ConfigError
from q35c.frontend.checkpoint import FILE_LIMITS, Checkpoint
from q35c.frontend.slow_tokenizer import build_tokenizer

if TYPE_CHECKING:
    from q35c.runtime.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
# Where templates may stand, the first wins; and the name of the one that serves every conversation.
_TEMPLATE_HOLDERS = ("tokenizer_config.json", "chat_template.json")
_DEFAULT = "default"


def read_document(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a JSON object among the files, empty if it is not there. Raises ConfigError if it is malformed."""
    data = checkpoint.files.get(name)
    if data is None:
        return {}
    document = strictjson.loads(
        data, where=name, limit=FILE_LIMITS[name], error=ConfigError, has_long_integers=True
    )
    if not isinstance(document, dict):
        raise ConfigError("must be a JSON object", where=name)
    return cast(dict[str, Any], document)


def tokenizer_document(checkpoint: Checkpoint, notes: list[str]) -> bytes | None:
    """Return tokenizer.json, or one built from the files that tokenizers had before it."""
    if document := checkpoint.files.get("tokenizer.json"):
        return document
    if {"vocab.json", "merges.txt"} <= set(checkpoint.files):
        document = build_tokenizer(checkpoint.files, read_document(checkpoint, "tokenizer_config.json"),
                                   read_document(checkpoint, "added_tokens.json"))  # fmt: skip
        if document is not None:
            notes.append(
                "no tokenizer.json: the tokenizer was built from vocab.json and merges.txt"
            )
            return document
    if checkpoint.where:
        notes.append("no tokenizer.json that could be used: the artifact takes token ids, not text")
    return None


def open_tokenizer(checkpoint: Checkpoint, document: bytes | None = None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, or of a document. Raises TokenizerError if it cannot be used."""
    from q35c.runtime.tokenizer import Tokenizer

    document = document or checkpoint.files.get("tokenizer.json")
    return Tokenizer(document) if document else None


def chat_template(checkpoint: Checkpoint, notes: list[str] | None = None) -> bytes | None:
    """Return the chat template: its own file, or the default one inside another; others go into `notes`."""
    notes = [] if notes is None else notes
    found = checkpoint.files.get(TEMPLATE)
    for name in _TEMPLATE_HOLDERS:
        named = _named_templates(read_document(checkpoint, name).get("chat_template"), name)
        if found is None and _DEFAULT in named:
            found = named.pop(_DEFAULT).encode()
        if others := sorted(set(named) - {_DEFAULT}):
            notes.append(
                f"{name}: chat templates {', '.join(others)[:200]} not taken, only {_DEFAULT!r}"
            )
    return found


def _named_templates(value: Any, where: str) -> dict[str, str]:
    """Return templates by name: from a text, a list of names and texts, or an object."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    value = {_DEFAULT: value} if isinstance(value, str) else {} if value is None else value
    is_named = isinstance(value, dict) and all(
        isinstance(part, str) for part in itertools.chain.from_iterable(value.items())
    )
    if not is_named:
        raise ConfigError("chat_template is neither a text nor named texts", where=where)
    return cast(dict[str, str], value)
