"""Text to token ids and back, piece by piece, with stop strings. Imports `tokenizers` on first use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from q35c import arguments
from q35c.errors import OptionError, TokenizerError
from q35c.runtime.tokenizer_check import check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

_REPLACEMENT = "\ufffd"
_WINDOW = 16  # tokens that are decoded again at most while a character is incomplete
_OVERLAP = 8  # tokens that certainly hold the beginning of an incomplete character
MAX_STOPS, MAX_STOP_LENGTH = 64, 1000
_ID_LIMIT = 1 << 32  # the library keeps ids in 32 bits


class Tokenizer:
    """Wrap a `tokenizer.json`."""

    def __init__(self, document: bytes) -> None:
        """Raises TokenizerError if the document cannot be used."""
        import tokenizers

        check_tokenizer(document)
        try:
            self._backend: Backend = tokenizers.Tokenizer.from_buffer(document)
        except BaseException as error:
            # The library reports malformed files as Exception, and its own panics as a BaseException.
            if not _is_library_error(error):
                raise
            raise TokenizerError(f"tokenizer.json cannot be used: {error}"[:500]) from None
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def document(self) -> str:
        """Return the tokenizer as JSON, for other libraries."""
        return self._backend.to_str()

    @property
    def size(self) -> int:
        """Return the number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def highest_id(self) -> int:
        """Return the highest id of a token, -1 if there is none."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Raises TokenizerError if it cannot be encoded."""
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TokenizerError("not a text", got=type(text).__name__)
        return self._encode(text, frame=True).ids

    def _encode(self, text: str, frame: bool = False) -> Encoding:
        """Encode a text; `frame` adds the tokens that the tokenizer puts around a whole text."""
        try:
            return self._backend.encode(text, add_special_tokens=frame)
        except BaseException as error:  # lone surrogates, and panics of the library
            if not _is_library_error(error):
                raise
            raise TokenizerError(f"text cannot be encoded: {error}"[:500]) from None

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Return the control tokens and their ids: they structure a text and are no part of it."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: at for at, token in added.items() if token.special and token.content}

    def encode_guarded(self, text: str, reveal: Callable[[str], str]) -> list[int]:
        """Return the ids of a text in which only the control tokens seen before `reveal` are ones.

        Where no others come about, the ids are those of the whole text; else the text between control
        tokens is encoded piece by piece, and as plain text where another one would come about. Raises
        TokenizerError.
        """
        own = [(found[0], found.start()) for found in _any_of(self.special_tokens).finditer(text)]
        whole = reveal(text)
        encoding = self._encode(whole)
        special_ids = set(self.special_tokens.values())
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        found = [(token, at[0]) for token, at in pairs if token in special_ids]
        if len(whole) == len(text) and found == [(self.special_tokens[t], at) for t, at in own]:
            return encoding.ids
        ids: list[int] = []
        begin = 0
        for token, at in [*own, ("", len(text))]:
            ids += self._encode_without_special(reveal(text[begin:at]), special_ids)
            if token:
                ids.append(self.special_tokens[token])
            begin = at + len(token)
        return ids

    def _encode_without_special(self, text: str, special_ids: set[int]) -> list[int]:
        ids = self._encode(text).ids
        if special_ids.isdisjoint(ids):
            return ids
        added = self._backend.get_added_tokens_decoder().values()
        others = _any_of(token.content for token in added if not token.special and token.content)
        ids = list[int]()
        begin = 0
        for found in [*others.finditer(text), None]:
            ids += self._encode_plain(text[begin : found.start() if found else len(text)])
            if found:
                ids += self._encode(found[0]).ids
                begin = found.end()
        if not special_ids.isdisjoint(ids):
            raise TokenizerError("the tokenizer makes control tokens of plain text")
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text as if there were no added tokens."""
        backend: Any = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces: list[str] = [text] if text else []
        if backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]

    def split_stops(self, stops: Iterable[str]) -> tuple[tuple[str, ...], frozenset[int]]:
        """Return the stop strings, and the ids of those that are control tokens.

        A text never holds control tokens. Raises OptionError for a stop string with one in it.
        """
        texts: list[str] = []
        ids: set[int] = set()
        for stop in stops:
            if stop in self.special_tokens:
                ids.add(self.special_tokens[stop])
            elif token := next((t for t in self.special_tokens if t in stop), None):
                raise OptionError(
                    f"the control token {token} is no part of any text",
                    where="stop",
                    expected="a text, or a control token alone",
                    got=repr(stop)[:80],
                )
            else:
                texts.append(stop)
        return tuple(texts), frozenset(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; unknown ids add nothing. Raises OptionError for what are no ids."""
        listed = arguments.sequence("ids", ids, "a list of token ids")
        if not all(type(token) is int and 0 <= token < _ID_LIMIT for token in listed):
            listed = [arguments.integer("ids", token, 0, _ID_LIMIT - 1) for token in listed]
        is_skipping = arguments.flag("skip_special_tokens", skip_special_tokens)
        return self._backend.decode(listed, skip_special_tokens=is_skipping)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text, None if there is none. Raises OptionError for no text."""
        arguments.text("token", token)
        return self._backend.token_to_id(token)


class TextStream:
    """Turn tokens into pieces of text that add up to the text of all tokens.

    A character may be spread over several tokens: its beginning is held back until it is complete, so
    that no piece ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window: context of the last finished token, then new tokens
        self._known = 0  # characters of the window's text that have been returned

    def push(self, token: int) -> str:
        """Add a token; return the text that is complete now, perhaps none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(_REPLACEMENT):
            piece = text[self._known :]
            if len(self._ids) > _OVERLAP:
                self._shrink(held=0)
            else:
                self._known = len(text)
            return piece
        piece = text[self._known : -1]
        self._known = max(self._known, len(text) - 1)
        if len(self._ids) > _WINDOW:  # a run of broken bytes: keep the work per token bounded
            self._shrink(held=1)
        return piece

    def finish(self) -> str:
        """Return what was held back: replacement characters for a character that never ended."""
        piece = self._tokenizer.decode(self._ids)[self._known :]
        self._ids, self._known = [], 0
        return piece

    def _shrink(self, held: int) -> None:
        """Keep the last few tokens only, of whose text all but `held` characters are returned."""
        self._ids = self._ids[-_OVERLAP // 2 if held == 0 else -_OVERLAP :]
        self._known = max(0, len(self._tokenizer.decode(self._ids)) - held)


class StopScanner:
    """Find stop strings in text that arrives in pieces; nothing of one is ever let through."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Add a piece; return the text that certainly precedes any stop string.

        Once a stop string is complete, `found` is it; the text before it is returned and the rest
        dropped. Of several the one that ends first counts, so that it does not matter how the text
        was cut into pieces.
        """
        text = self._held + piece
        places = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            at, self.found = min(places, key=lambda place: (place[0] + len(place[1]), place[0]))
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back, as no stop string came."""
        text, self._held = self._held, ""
        return text


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple. Raises OptionError for empty, overlong or too many ones."""
    if stop is None:
        return ()
    expected = "a text, or a list of texts"
    stops = [stop] if isinstance(stop, str) else arguments.sequence("stop", stop, expected)
    if len(stops) > MAX_STOPS:
        raise OptionError("too many strings", where="stop", expected=f"at most {MAX_STOPS}")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:  # pyright: ignore
            raise OptionError(
                "not a stop string",
                where="stop",
                expected=f"texts of 1 to {MAX_STOP_LENGTH} characters",
                got=text,
            )
        arguments.text("stop", text)
    return tuple(stops)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of texts, of which the longest counts; of none, one that never matches."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0


def _is_library_error(error: BaseException) -> bool:
    is_panic = type(error).__name__ == "PanicException"
    return is_panic or (isinstance(error, Exception) and not isinstance(error, MemoryError))
