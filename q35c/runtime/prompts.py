"""What a prompt is: a text, or token ids as a list, tuple, other sequence or integer array of one axis.

Several prompts are a list of those, or an integer array of two axes: a prompt each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from q35c import arguments
from q35c.errors import PromptError
from q35c.layouts.blobs import GRID
from q35c.runtime.tokenizer import Tokenizer

MAX_ID = 2**31 - 1
_IDS = "token ids: a list, tuple or integer array"
_PROMPT = f"a text, {_IDS}, or a list of those"


def split_prompts(prompt: Any, *kinds: type) -> tuple[list[Any], bool]:
    """Return the prompts as a list, and whether there was a single one: also one of other `kinds`. Raises PromptError."""
    if isinstance(prompt, (str, range, *kinds)):
        return [prompt], True
    items = arguments.sequence(None, prompt, _PROMPT, error=PromptError)
    are_prompts = [isinstance(item, (str, *kinds)) or arguments.is_sequence(item) for item in items]
    if not any(are_prompts):
        return [items], True
    if not all(are_prompts):
        number = are_prompts.index(False)
        raise PromptError(
            "not a prompt",
            where=f"prompt {number}",
            expected=f"a text, or {_IDS}",
            got=items[number],
        )
    return items, False


def encode_prompt(
    prompt: Any, tokenizer: Callable[[], Tokenizer], vocab: int, context: int
) -> list[int]:
    """Return a prompt's token ids. Raises PromptError, TokenizerError if there is no tokenizer."""
    if isinstance(prompt, str):
        if (at := arguments.surrogate_at(prompt)) is not None:
            raise PromptError("the prompt is not UTF-8", got=f"{prompt[at]!r} at character {at}")
        prompt = tokenizer().encode(prompt)
    return check_ids(prompt, vocab, context)


def check_ids(ids: Any, vocab: int, context: int) -> list[int]:
    """Return token ids as a list of `int`.

    Raises PromptError if there are none or more than `context`, or if one is outside 0..vocab-1.
    """
    listed = arguments.sequence(None, ids, _IDS, error=PromptError)
    if not listed:
        raise PromptError("the prompt holds no tokens", hint="give at least one token")
    if len(listed) > context:
        raise PromptError(
            "the prompt is longer than the context",
            expected=f"at most {context} tokens",
            got=len(listed),
            hint="shorten it, or load the model with a larger context",
        )
    for place, item in enumerate(listed):
        token = item if type(item) is int else arguments.index_of(item)
        if token is None:
            raise PromptError("not a token id", where=f"token {place}", got=item)
        if not 0 <= token < vocab:
            raise PromptError(
                "token id is outside the vocabulary",
                where=f"token {place}",
                expected=f"0 to {vocab - 1}",
                got=token,
            )
        listed[place] = token
    return listed


def pieces(before: int, count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each call that appends `count` tokens to `before`, up to `most` in one.

    All but the last end on the grid, where a cut changes no bit, if `most` reaches so far.
    """
    start = 0
    while start < count:
        end = min(start + most, count)
        on_grid = end - (before + end) % GRID
        if end < count and on_grid > start:
            end = on_grid
        yield start, end
        start = end
