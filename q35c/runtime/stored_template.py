"""The chat template that an artifact holds."""

from __future__ import annotations

from typing import Any, cast

from q35c import strictjson
from q35c.artifact import Artifact
from q35c.errors import TokenizerError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_template(artifact: Artifact) -> tuple[str, dict[str, str]]:
    """Return the template and its special tokens. Raises TokenizerError if there is none."""
    config: dict[str, Any] = {}
    if artifact.has_segment("tokenizer_config"):
        data = artifact.segment("tokenizer_config")
        document = strictjson.loads(
            data,
            where="tokenizer_config.json",
            limit=len(data),
            error=TokenizerError,
            has_long_integers=True,  # 10^30 as "no limit" of the model's length
        )
        if isinstance(document, dict):
            config = cast(dict[str, Any], document)
    template = config.get("chat_template")
    if artifact.has_segment("chat_template"):
        template = artifact.segment("chat_template").decode("utf-8", "replace")
    if not isinstance(template, str):
        raise TokenizerError(
            "the artifact holds no chat template",
            where=str(artifact.path),
            hint="write the prompt's text yourself",
        )
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        text = cast(dict[str, Any], value).get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return template, tokens
