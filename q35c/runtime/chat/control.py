"""Keep control tokens in users' text from becoming tokens.

Before a template is rendered, one character of every control token is replaced by a stand-in wherever it
occurs in the conversation: no control token can come about there, however the template cuts, trims or
joins texts. So the control tokens in the rendered text are the template's own. The character is one that
the template's other text does not hold, if there is such a one, so that the template finds in messages
what it looks for; texts keep their length, and stand-ins are symbols like the character itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from q35c.errors import OptionError

_STAND_INS = [*map(chr, range(0x2800, 0x2900)), *map(chr, range(0xE000, 0xE800))]
# A stand-in that is in the text already, or its escape, which the template's JSON might hold as well.
_TAKEN = re.compile(r"[\u2800-\u28ff\ue000-\ue7ff]|\\u(?:28[0-9a-f]{2}|e[0-7][0-9a-f]{2})")


class Guard:
    """The stand-ins of one conversation."""

    def __init__(self, tokens: Iterable[str], literals: str) -> None:
        """Prepare stand-ins for control tokens; `literals` are the texts in the template."""
        self._taken: set[str] = set()
        self.note(literals)
        tokens = sorted(tokens, key=len, reverse=True)
        for token in tokens:
            literals = literals.replace(token, "")
        self._characters = sorted({c for token in tokens if (c := _rarest(token, literals))})

    def note(self, text: str) -> str:
        """Remember the stand-ins that a text holds, as they cannot be used."""
        if "\\u" in text or not text.isascii():
            self._taken.update(_TAKEN.findall(text))
        return text

    def choose(self) -> None:
        """Choose stand-ins that no text holds. Raises OptionError if there are not enough."""
        free = [c for c in _STAND_INS if c not in self._taken and _escape(c) not in self._taken]
        if len(free) < len(self._characters):
            raise OptionError("too many kinds of private characters", where="messages")
        self._pairs = list(zip(self._characters, free, strict=False))
        self._table = str.maketrans(dict(self._pairs))

    def hide(self, text: str) -> str:
        """Return a text in which no control token is left."""
        if not any(character in text for character in self._characters):
            return text
        return text.translate(self._table)

    def reveal(self, text: str) -> str:
        """Return what `hide` was given."""
        for character, stand_in in self._pairs:
            text = text.replace(stand_in, character).replace(_escape(stand_in), character)
        return text


def _rarest(token: str, literals: str) -> str | None:
    """Return the token's sign that is rarest in the literals; letters would change words."""
    signs = [c for c in token if not c.isalnum() and not c.isspace() and c != "_"]
    return min(signs, key=literals.count, default=None)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
