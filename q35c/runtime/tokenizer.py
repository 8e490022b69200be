"""Text to token ids and back, piece by piece, with stop strings. Imports `tokenizers` on first use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from q35c.errors import OptionError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_REPLACEMENT = "\ufffd"
_WINDOW = 16  # tokens that are decoded again at most while a character is incomplete
_OVERLAP = 8  # tokens that certainly hold the beginning of an incomplete character
MAX_STOPS, MAX_STOP_LENGTH = 64, 1000


class Tokenizer:
    """Wrap a `tokenizer.json`."""

    def __init__(self, document: bytes) -> None:
        """Raises TokenizerError if the document cannot be used."""
        import tokenizers

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
        try:
            return self._backend.encode(text).ids
        except BaseException as error:  # lone surrogates, and panics of the library
            if not _is_library_error(error):
                raise
            raise TokenizerError(f"text cannot be encoded: {error}"[:500]) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; unknown ids add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text, None if there is none."""
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
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise OptionError("too many strings", where="stop", expected=f"at most {MAX_STOPS}")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:  # pyright: ignore
            raise OptionError(
                "not a stop string",
                where="stop",
                expected=f"texts of 1 to {MAX_STOP_LENGTH} characters",
                got=repr(text)[:80],
            )
    return stops


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0


def _is_library_error(error: BaseException) -> bool:
    is_panic = type(error).__name__ == "PanicException"
    return is_panic or (isinstance(error, Exception) and not isinstance(error, MemoryError))
