"""Text that arrives in pieces, and whether something stands at a place of it: yes, no, or not known yet."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["yes", "no", "wait"]
MAX_SPACES = 256  # in one place between tags: what must be held back stays bounded


class Input:
    """The text that has arrived and is not used up: that from `at` on.

    Whatever is decided about a place depends on the text alone, never on the pieces it came in: where the text behind
    a place could still matter, the verdict is "wait", unless no more text comes.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.is_end = False

    def add(self, text: str) -> None:
        """Append a piece of text."""
        self.text = self.text[self.at :] + text
        self.at = 0

    def take(self, end: int) -> str:
        """Use the text up to a place up, and return it."""
        taken = self.text[self.at : end]
        self.at = end
        return taken

    def starts(self, marker: str, at: int) -> Verdict:
        """Say whether a marker stands at a place."""
        piece = self.text[at : at + len(marker)]
        if piece == marker:
            return "yes"
        return "wait" if not self.is_end and marker.startswith(piece) else "no"

    def starts_any(self, markers: tuple[str, ...], at: int) -> tuple[Verdict, str]:
        """Say whether one of the markers stands at a place, and which."""
        verdicts = {marker: self.starts(marker, at) for marker in markers}
        found = next((marker for marker, verdict in verdicts.items() if verdict == "yes"), None)
        if found is not None:
            return "yes", found
        return ("wait" if "wait" in verdicts.values() else "no"), ""

    def skip_spaces(self, at: int) -> int:
        """Return the place behind white space, at most `MAX_SPACES` of it."""
        end = min(len(self.text), at + MAX_SPACES)
        while at < end and self.text[at].isspace():
            at += 1
        return at

    def read_name(self, at: int, most: int) -> tuple[Verdict, int, str]:
        """Read a name of at most that many characters up to `>`; return the place behind it, and the name."""
        end = self.text.find(">", at, at + most + 1)
        if end >= 0:
            return "yes", end + 1, self.text[at:end].strip()
        is_short = len(self.text) <= at + most
        return ("wait" if is_short and not self.is_end else "no"), at, self.text[at:].strip()
