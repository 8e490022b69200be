"""Entries by what they can do, and the io block that follows from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from q35c.artifact.entries import INPUTS, TEXT, Entry, EntrySpec, entry_for, io_layout, text_entries
from q35c.errors import ArtifactError
from q35c.layouts.blobs import align
from tests.fake_artifact import entry_specs

VOCAB, HIDDEN = 300, 24
ALL: Any = tuple(INPUTS)
TEXT_INPUTS: Any = tuple(TEXT)


def entry(name: str, sequences: int, tokens: int, logits: Any, inputs: Any = ALL) -> Entry:
    return Entry(name, sequences, tokens, inputs, logits, name, (0,), (-1,), ())


ENTRIES = [
    entry("short", 1, 16, "last"),
    entry("long", 1, 256, "last"),
    entry("silent", 1, 256, "none"),
    entry("score", 1, 64, "all"),
    entry("one", 1, 1, "all"),
    entry("decode", 4, 1, "all"),
    entry("verify", 4, 8, "all"),
    entry("text", 1, 24, "none", TEXT_INPUTS),
    entry("other", 8, 512, "last", ("tokens",)),
]


@pytest.mark.parametrize(
    ("sequences", "tokens", "logits", "expected"),
    [
        (1, 10, "last", "short"),
        (1, 17, "last", "long"),
        (1, 5000, "last", "long"),
        (1, 1, "none", "text"),
        (1, 25, "none", "silent"),
        (1, 5000, "all", "score"),
        (1, 9, "all", "score"),
        (1, 1, "all", "one"),
        (2, 1, "all", "decode"),
        (4, 2, "all", "verify"),
        (4, 100, "all", "verify"),
    ],
)
def test_the_smallest_that_takes_all_else_the_largest(
    sequences: int, tokens: int, logits: Any, expected: str
) -> None:
    for entries in (ENTRIES, ENTRIES[::-1]):
        assert entry_for(entries, sequences, tokens, logits).name == expected


@pytest.mark.parametrize(("sequences", "logits"), [(5, "all"), (2, "last"), (2, "none")])
def test_no_entry_serves_so_many_sequences(sequences: int, logits: Any) -> None:
    with pytest.raises(ArtifactError, match=f"{sequences} sequences with {logits} logits"):
        entry_for(ENTRIES, sequences, 1, logits)


def test_what_text_takes() -> None:
    found = text_entries(ENTRIES, 4096, 3)
    assert [one.name for one in found] == ["long", "silent", "score", "decode"]


@pytest.mark.parametrize(("logits", "rows"), [("none", 0), ("last", 2), ("all", 6)])
def test_rows_of_logits(logits: Any, rows: int) -> None:
    """Of two sequences with three tokens each."""
    assert entry("e", 4, 8, logits).logits_rows(2, 6) == rows


def test_the_io_block_is_what_all_entries_take_together() -> None:
    """Tokens and positions as wide as the largest call, slots for the most sequences, logits of the entry with most rows."""
    io = io_layout(entry_specs(batch=5), VOCAB, HIDDEN, steps=7)
    found = {name: (field["dtype"], field["shape"]) for name, field in io["fields"].items()}
    assert found == {
        "tokens": ("i32", [16]),
        "positions": ("i32", [3, 16]),
        "slots": ("i64", [5]),
        "starts": ("i32", [5]),
        "logits": ("f32", [8, VOCAB]),
        "clock": ("i64", [9]),
    }
    offsets = [field["offset"] for field in io["fields"].values()]
    sizes = [64, 192, 64, 64, align(4 * 8 * VOCAB), 128]
    assert offsets == [sum(sizes[:i]) for i in range(6)] and io["bytes"] == sum(sizes)


def test_several_sequences_of_several_tokens_are_a_value() -> None:
    specs = [*entry_specs(batch=4), EntrySpec("verify", 4, 8, ALL, "all")]
    fields = io_layout(specs, VOCAB, HIDDEN, 1)["fields"]
    assert fields["rows"]["shape"] == [32, HIDDEN]
    assert fields["tokens"]["shape"] == [32] and fields["positions"]["shape"] == [3, 32]
    assert fields["logits"]["shape"] == [32, VOCAB] and fields["slots"]["shape"] == [4]


def test_what_no_entry_takes_is_not_in_the_io_block() -> None:
    specs = [replace(spec, inputs=("tokens", "slots"), logits="none") for spec in entry_specs()]
    assert list(io_layout(specs, VOCAB, HIDDEN, 1)["fields"]) == ["tokens", "slots", "clock"]
