"""The files beside the weights: tokenizer and chat template, checked before the long work, and what is not taken of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from q35c.errors import ConfigError
from q35c.frontend.checkpoint import Checkpoint
from q35c.frontend.generation import generation_defaults
from q35c.frontend.small_files import (
    TEMPLATE,
    chat_template,
    open_tokenizer,
    read_document,
    tokenizer_document,
)
from q35c.frontend.vision import read_vision

if TYPE_CHECKING:
    from q35c.runtime.tokenizer import Tokenizer

# Norms multiply by 1 + weight: released weights have means of -0.02 to 0.3, those of conversions that added the 1 1.1.
_SHIFTED_NORM = 0.7


@dataclass(frozen=True, slots=True)
class Companions:
    """What goes into the artifact beside weights and code; `notes` say what of the checkpoint does not.

    `vision` is the manifest's of a model with a vision tower, without its program.
    """

    segments: dict[str, bytes]
    generation: dict[str, Any]
    notes: tuple[str, ...]
    vision: dict[str, Any] = field(default_factory=dict)


def read_companions(checkpoint: Checkpoint) -> Companions:
    """Read and check every file beside the weights. Raises ConfigError or TokenizerError for one that cannot be used."""
    notes = list(checkpoint.notes)
    document = tokenizer_document(checkpoint, notes)
    tokenizer = open_tokenizer(checkpoint, document)
    template = chat_template(checkpoint, notes)
    _check_template(template)
    generation = generation_defaults(checkpoint, tokenizer, notes)
    if tokenizer is not None:
        notes.extend(_unknown_tokens(checkpoint, tokenizer))
    if checkpoint.where:
        notes.extend(_shifted_norms(checkpoint))
    segments = {
        "tokenizer": document,
        "tokenizer_config": checkpoint.files.get("tokenizer_config.json"),
        "chat_template": template,
    }
    kept = {name: data for name, data in segments.items() if data}
    vision = None if checkpoint.tower is None else read_vision(checkpoint)
    prepared = {} if vision is None else vision.to_dict()
    return Companions(kept, generation, tuple(dict.fromkeys(notes)), prepared)


def _check_template(template: bytes | None) -> None:
    """Refuse a template that cannot be compiled. Raises ConfigError or TokenizerError."""
    from q35c.runtime.chat import compile_template

    if template is None:
        return
    try:
        text = template.decode()
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8", where=TEMPLATE, got=f"byte {error.start}") from None
    compile_template(text)


def _unknown_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterable[str]:
    """Yield notes on ids beyond the embedding table and on added tokens that the tokenizer does not know."""
    top = checkpoint.config.vocab_size - 1
    if tokenizer.highest_id > top:
        yield f"tokenizer.json: ids {top + 1} to {tokenizer.highest_id} have no embedding: the model refuses them"
    added = {
        "added_tokens.json": list(read_document(checkpoint, "added_tokens.json")),
        "tokenizer_config.json": [
            item.get("content")
            for item in _values(
                read_document(checkpoint, "tokenizer_config.json"), "added_tokens_decoder"
            )
            if isinstance(item, dict)
        ],
    }
    for name, tokens in added.items():
        lost = [t for t in tokens if isinstance(t, str) and tokenizer.token_id(t) is None]
        if lost:
            yield f"{name}: {', '.join(lost[:5])!r:.200} not taken: tokenizer.json does not know them"


def _values(document: dict[str, Any], key: str) -> Iterable[Any]:
    held = document.get(key)
    return held.values() if isinstance(held, dict) else ()


def _shifted_norms(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield a note where norm weights look as if 1 had been added to them."""
    norms = [name for name in checkpoint.names if name.endswith(".input_layernorm.weight")]
    mean = sum(float(checkpoint.read(name).mean()) for name in norms) / len(norms)
    if mean > _SHIFTED_NORM:
        yield (
            f"norm weights have a mean of {mean:.2f}, those of the family are near 0: a conversion may have added 1 to "
            "them, and the model then writes nonsense"
        )
