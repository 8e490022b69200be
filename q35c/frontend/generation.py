"""Read how a checkpoint wants to be sampled and where its sequences end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from q35c.config import MAX_STOP_IDS
from q35c.errors import ConfigError
from q35c.fields import Fields
from q35c.frontend.checkpoint import Checkpoint
from q35c.frontend.hf_config import token_ids
from q35c.frontend.small_files import chat_template, open_tokenizer, read_document

if TYPE_CHECKING:
    from q35c.runtime.tokenizer import Tokenizer

NAME = "generation_config.json"
HF_TOP_K = 50  # what transformers samples from where the file is silent
CHAT_END = "<|im_end|>"  # ends a turn in the family's templates
# For each key the least, the greatest and the default value, and what -1 stands for: off.
_NUMBERS: dict[str, tuple[float, float, float, float | None]] = {
    "temperature": (0.0, 1000.0, 1.0, None),
    "top_p": (0.0, 1.0, 1.0, 1.0),
    "min_p": (0.0, 1.0, 0.0, 0.0),
    "repetition_penalty": (1e-3, 1000.0, 1.0, 1.0),
    "presence_penalty": (-1000.0, 1000.0, 0.0, None),
}
# What changes the text in transformers and is not done here, with the values that mean nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "top_h", "length_penalty"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), (0,)),
    **dict.fromkeys(("frequency_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("force_words_ids", "sequence_bias", "constraints", "stop_strings"), ([], {}, "")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "dola_layers"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config"), ()),
}  # fmt: skip


def generation_defaults(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None = None, notes: list[str] | None = None
) -> dict[str, Any]:
    """Return the manifest's `generation`; null is "not given", -1 "off", and what is not done goes into `notes`.

    `tokenizer` is the checkpoint's; without it its tokenizer.json is opened. Raises ConfigError for a value of the wrong
    type or range, TokenizerError.
    """
    notes = [] if notes is None else notes
    given = {
        key: value for key, value in read_document(checkpoint, NAME).items() if value is not None
    }
    ignored = [key for key, off in _NOT_DONE.items() if key in given and given[key] not in off]
    if ignored:
        notes.append(f"{NAME}: {', '.join(ignored)} not taken; q35c does not sample so")
    for key, (_, _, _, off) in {**_NUMBERS, "top_k": (0, 0, 0, 0)}.items():
        if off is not None and given.get(key) == -1:
            given[key] = off
    fields = Fields(given, NAME)
    tokenizer = open_tokenizer(checkpoint) if tokenizer is None else tokenizer
    return {
        "do_sample": fields.boolean("do_sample", False),
        "top_k": fields.integer("top_k", 0, 1 << 24, HF_TOP_K),
        **{
            key: fields.number(key, low, high, default)
            for key, (low, high, default, _) in _NUMBERS.items()
        },
        "stop_ids": stop_ids(given, checkpoint, tokenizer, notes),
    }


def stop_ids(
    document: dict[str, Any], checkpoint: Checkpoint, tokenizer: Tokenizer | None, notes: list[str]
) -> list[int]:
    """Return the ids that end a sequence: those of the generation config, the model config and the tokenizer together."""
    top = checkpoint.config.vocab_size - 1
    named = {"eos_token_id": token_ids(document.get("eos_token_id"))}
    found = [
        *Fields(named, NAME).integers("eos_token_id", 0, top),
        *checkpoint.config.eos_token_ids,
    ]
    for token in _end_tokens(checkpoint) if tokenizer else ():
        token_id = tokenizer.token_id(token) if tokenizer else None
        if token_id is None or token_id > top:
            notes.append(f"the end token {token!r:.80} has no id in the tokenizer and the model")
        else:
            found.append(token_id)
    ids = list(dict.fromkeys(found))
    if len(ids) > MAX_STOP_IDS:
        raise ConfigError(
            "too many end tokens",
            where=f"{NAME} and config.json, eos_token_id",
            expected=f"at most {MAX_STOP_IDS}",
            got=len(ids),
        )
    return ids


def _end_tokens(checkpoint: Checkpoint) -> list[str]:
    """Return the texts of the tokenizer's own end token and of the one that ends a turn of its chats."""
    found: list[str] = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_document(checkpoint, name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found.append(token)
    if CHAT_END.encode() in (chat_template(checkpoint) or b""):
        found.append(CHAT_END)
    return list(dict.fromkeys(found))
