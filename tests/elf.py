"""What a shared object asks for and offers, as readelf tells it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def dynamic_symbols(file: Path) -> tuple[set[str], set[str]]:
    """Return the names of the symbols that a shared object imports and of those that it exports."""
    command = ["readelf", "--dyn-syms", "-W", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in text.splitlines()]
    named = [words for words in lines if len(words) == 8 and words[0].rstrip(":").isdigit()]
    imported = {words[7] for words in named if words[6] == "UND"}
    return imported, {words[7] for words in named} - imported
