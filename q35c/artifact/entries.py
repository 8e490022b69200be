"""Entries: what each takes and returns, as data. Who needs one asks for what it can do, not for a name.

From what all entries take together follows the io block, through which tokens go in and logits come out. The compiler and
the reader use the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args

from q35c.artifact.kernels import Symbol
from q35c.artifact.schema import Items, Range, refuse
from q35c.layouts import blobs

AXES = 3  # of a rotary position: time, height, width
MAX_STEPS = 2**16
Input = Literal["tokens", "positions", "slots", "starts", "rows"]
LogitsOf = Literal["none", "last", "all"]
Index = Annotated[int, Range(0, 2**16)]
TEXT: frozenset[Input] = frozenset(("tokens", "positions", "slots", "starts"))
ROWS: Input = "rows"  # of images and clips, in place of negative tokens


@dataclass(frozen=True, slots=True)
class EntrySpec:
    """A function that appends tokens, equally many to each of some sequences.

    It reads these inputs of the io block, takes up to `sequences` of up to `tokens` each, and returns logits of none of
    the tokens, of each sequence's last one, or of all.
    """

    name: Symbol
    sequences: Annotated[int, Range(1, 1024)]
    tokens: Annotated[int, Range(1, 65536)]
    inputs: Annotated[tuple[Input, ...], Items(1, len(get_args(Input)))]
    logits: LogitsOf

    @property
    def rows(self) -> int:
        """Return the most tokens of a call, over all sequences."""
        return self.sequences * self.tokens

    def logits_rows(self, sequences: int, rows: int) -> int:
        """Return how many rows of logits a call writes that appends so many rows in all."""
        return {"none": 0, "last": sequences, "all": rows}[self.logits]


@dataclass(frozen=True, slots=True)
class Entry(EntrySpec):
    """An entry as it was compiled.

    Step i calls kernel `steps[i]` of the manifest with weight `step_weights[i]`, -1 for none; those in
    `single_row_steps` compute one row, whatever is appended.
    """

    symbol: Symbol
    steps: Annotated[tuple[Index, ...], Items(1, MAX_STEPS)]
    step_weights: Annotated[tuple[Annotated[int, Range(-1, 2**16)], ...], Items(1, MAX_STEPS)]
    single_row_steps: Annotated[tuple[Index, ...], Items(0, MAX_STEPS)]


class Most(NamedTuple):
    """The most sequences and rows of the entries that read an input, and the width of the model's rows."""

    sequences: int
    rows: int
    hidden: int


# Input -> dtype and shape in the io block.
INPUTS: dict[Input, tuple[str, Callable[[Most], list[int]]]] = {
    "tokens": ("i32", lambda most: [most.rows]),
    "positions": ("i32", lambda most: [AXES, most.rows]),
    "slots": ("i64", lambda most: [most.sequences]),
    "starts": ("i32", lambda most: [most.sequences]),
    "rows": ("f32", lambda most: [most.rows, most.hidden]),
}


def io_layout(entries: Sequence[EntrySpec], vocab: int, hidden: int, steps: int) -> dict[str, Any]:
    """Return the manifest's `io`: the inputs that any entry reads, the logits that any writes, and the clock.

    `vocab` and `hidden` are the model's widths. `positions` keeps its row stride whatever a call's token count. `clock` is a switch, then the cycle counter before each of at most `steps` kernels and after the last.
    """
    specs: dict[str, tuple[str, list[int]]] = {}
    for name, (dtype, shape) in INPUTS.items():
        if readers := [entry for entry in entries if name in entry.inputs]:
            most = Most(max(e.sequences for e in readers), max(e.rows for e in readers), hidden)
            specs[name] = dtype, shape(most)
    if rows := max(entry.logits_rows(entry.sequences, entry.rows) for entry in entries):
        specs["logits"] = "f32", [rows, vocab]
    specs["clock"] = "i64", [steps + 2]
    offsets, total = blobs.pack_tensors(specs.values())
    fields = {
        name: {"offset": offset, "dtype": dtype, "shape": shape}
        for offset, (name, (dtype, shape)) in zip(offsets, specs.items(), strict=True)
    }
    return {"bytes": total, "fields": fields}


def entry_for(entries: Iterable[Entry], sequences: int, tokens: int, logits: LogitsOf) -> Entry:
    """Return the entry that appends so many tokens to each of so many sequences, and returns these logits.

    It is the smallest that takes them in one call; if none does, the one that takes the most tokens in a call. Raises
    ArtifactError if no entry serves so many sequences.
    """
    able = [
        entry
        for entry in entries
        if entry.sequences >= sequences
        and entry.logits == logits
        and frozenset(entry.inputs) - {ROWS} == TEXT
    ]
    if not able:
        raise refuse(
            "$.entries", f"no entry appends text to {sequences} sequences with {logits} logits"
        )
    return min(able, key=lambda e: (e.tokens < tokens, abs(e.tokens - tokens), e.sequences))


class TextEntries(NamedTuple):
    """What generating text takes: to append to a sequence, with logits of the last token, of none or of all, and a batch."""

    last: Entry
    none: Entry
    all: Entry
    batch: Entry


def text_entries(entries: Sequence[Entry], context: int, batch: int) -> TextEntries:
    """Return the entries for text up to a context and for a token of each sequence of a batch. Raises ArtifactError."""
    return TextEntries(
        last=entry_for(entries, 1, context, "last"),
        none=entry_for(entries, 1, context, "none"),
        all=entry_for(entries, 1, context, "all"),
        batch=entry_for(entries, batch, 1, "all"),
    )
