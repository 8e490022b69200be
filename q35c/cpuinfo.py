"""What the kernel says about the processor."""

from __future__ import annotations

from pathlib import Path

from q35c.errors import UnsupportedMachine

CPUINFO = Path("/proc/cpuinfo")


def read_cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """Return the facts about the first processor, by the kernel's names.

    Raises UnsupportedMachine where they cannot be read.
    """
    facts: dict[str, str] = {}
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if not colon and facts:
                    break  # a blank line ends the first processor
                facts.setdefault(key.strip(), value.strip())
    except OSError as error:
        raise UnsupportedMachine(
            f"the processor's features cannot be read: {error.strerror}",
            where=str(path),
            hint="mount /proc",
        ) from None
    return facts


def processor_flags(path: Path = CPUINFO) -> frozenset[str]:
    """Return the processor's features as the kernel names them. Raises UnsupportedMachine."""
    facts = read_cpuinfo(path)
    return frozenset(facts.get("flags", facts.get("Features", "")).split())
