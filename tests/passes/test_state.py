"""introduce_state and split_entries keep the model: however a sequence is cut, the logits are the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from q35c.errors import VerifyError
from q35c.ir import Builder, Module, SymDim, TensorType
from q35c.ir.graph import Graph
from q35c.passes.introduce_state import introduce_state
from q35c.passes.split_entries import split_entries
from tests.passes.arrays import compare
from tests.passes.sequences import SLOTS, Sequences, forward, random_prompt
from tests.passes.tiny import VOCABULARY, tiny_model

TOLERANCE = 1e-9
TOKENS = 6
LAYERS = ("d", "a", "dad")


def entries_of(layers: str) -> tuple[Graph, Module]:
    graph = tiny_model(layers)
    return graph, split_entries(introduce_state(graph))


def compositions(total: int):
    """Yield every way to write `total` as an ordered sum of positive integers."""
    for cuts in itertools.product((False, True), repeat=total - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [total]
        yield [end - start for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("layers", LAYERS)
def test_empty_state_gives_the_stateless_logits(layers: str) -> None:
    graph, module = entries_of(layers)
    tokens, positions = random_prompt(3, TOKENS, VOCABULARY)
    expected = forward(graph, tokens, positions)
    for slot in range(SLOTS):
        score = Sequences(module).run("score", tokens, positions, [slot], [0])
        prefill = Sequences(module).run("prefill", tokens, positions, [slot], [0])
        compare([expected, expected[-1:]], [score, prefill], TOLERANCE, f"{layers}, slot {slot}")


@pytest.mark.parametrize("layers", LAYERS)
def test_every_split_gives_the_same_logits(layers: str) -> None:
    """Parts of one token by decode, others by prefill, score or, but for the last part, extend."""
    graph, module = entries_of(layers)
    tokens, positions = random_prompt(5, TOKENS, VOCABULARY)
    expected = forward(graph, tokens, positions)
    for number, parts in enumerate(compositions(TOKENS)):
        sequences, start = Sequences(module), 0
        for part in parts:
            cut = slice(start, start + part)
            several = ("prefill", "score", "extend")[
                (number + start) % (3 if cut.stop < TOKENS else 2)
            ]
            entry = "decode" if part == 1 else several
            got = sequences.run(entry, tokens[cut], positions[:, cut], [1], [start])
            if entry != "extend":
                want = expected[cut] if entry == "score" else expected[cut][-1:]
                compare([want], [got], TOLERANCE, f"{layers}, parts {parts}, {entry} at {start}")
            start += part


@pytest.mark.parametrize("layers", LAYERS)
def test_rows_of_a_decode_batch_do_not_mix(layers: str) -> None:
    """Three sequences of other lengths, in any order of slots, give what each gives alone."""
    graph, module = entries_of(layers)
    prompts = [random_prompt(seed, length, VOCABULARY) for seed, length in enumerate((2, 5, 3))]
    logits = [forward(graph, tokens, positions) for tokens, positions in prompts]
    for slots in itertools.permutations(range(SLOTS)):
        sequences = Sequences(module)
        starts = [len(tokens) - 1 for tokens, _ in prompts]
        for (tokens, positions), slot in zip(prompts, slots, strict=True):
            sequences.run("prefill", tokens[:-1], positions[:, :-1], [slot], [0])
        last = np.array([tokens[-1] for tokens, _ in prompts])
        where = np.stack([positions[:, -1] for _, positions in prompts], 1)
        got = sequences.run("decode", last, where, list(slots), starts)
        compare([np.stack([x[-1] for x in logits])], [got], TOLERANCE, f"{layers}, slots {slots}")


@pytest.mark.parametrize("entry", ["prefill", "score", "decode", "extend"])
def test_other_slots_are_untouched(entry: str) -> None:
    _, module = entries_of("da")
    sequences = Sequences(module)
    tokens, positions = random_prompt(1, 4, VOCABULARY)
    for slot in range(SLOTS):
        sequences.run("prefill", tokens, positions, [slot], [0])
    before = [sequences.slot(slot) for slot in range(SLOTS)]
    tokens, positions = random_prompt(2, 1 if entry == "decode" else 4, VOCABULARY)
    sequences.run(entry, tokens, positions, [1], [4])
    for slot in range(SLOTS):
        changed = {
            name: not np.array_equal(array, before[slot][name], equal_nan=True)
            for name, array in sequences.slot(slot).items()
        }
        assert set(changed.values()) == {slot == 1}, (entry, slot, changed)


def test_state_is_named_by_mixer_and_shared_by_entries() -> None:
    module = split_entries(introduce_state(tiny_model("dad")))
    names = [{(s.name, str(s.type)) for s in entry.leaves("state")} for entry in module]
    assert names[0] == names[1] == names[2] == names[3]
    assert names[0] == {
        ("delta_net.0.conv", "f32[B, 2, 20]"),
        ("delta_net.0.delta", "f32[B, 4, 3, 2]"),
        ("delta_net.1.conv", "f32[B, 2, 20]"),
        ("delta_net.1.delta", "f32[B, 4, 3, 2]"),
        ("attention.0.keys", "f32[B, CTX, 1, 8]"),
        ("attention.0.values", "f32[B, CTX, 1, 8]"),
    }


def test_entries_declare_their_rows() -> None:
    entries = list(split_entries(introduce_state(tiny_model())))
    types = {g.name: {v.name: str(v.type) for v in g.inputs} for g in entries}
    one = {"tokens": "i32[T]", "positions": "i32[3, T]", "slots": "i64[1]", "starts": "i32[1]"}
    assert types["prefill"] == types["score"] == types["extend"] == one
    assert types["decode"] == {
        "tokens": "i32[B]", "positions": "i32[3, B]", "slots": "i64[B]", "starts": "i32[B]",
    }  # fmt: skip
    shapes = {g.name: [str(value.type) for value in g.outputs] for g in entries}
    assert shapes == {
        "prefill": ["f32[1, 11]"], "decode": ["f32[B, 11]"], "score": ["f32[T, 11]"], "extend": [],
    }  # fmt: skip


@pytest.mark.parametrize("layers", LAYERS)
def test_behind_the_last_mixer_prefill_computes_one_row_and_extend_nothing(layers: str) -> None:
    """No other row is read there: of a whole feed-forward and of the head, the largest matrix."""
    prefill, _, _, extend = split_entries(introduce_state(tiny_model(layers)))
    kinds = [op.kind for op in prefill.ops]
    end = max(n for n, kind in enumerate(kinds) if kind.startswith("stateful")) + 1
    assert [op.kind for op in extend.ops] == kinds[:end]
    assert kinds[end : end + 3] == ["last_token", "last_token", "linear_residual"]
    assert "last_token" not in kinds[end + 3 :]
    assert {op.result.type.shape[0] for op in prefill.ops[end:]} == {1}
    assert {op.result.type.shape[0] for op in prefill.ops[:end]} == {SymDim("T")}


def test_a_mixer_that_was_not_fused_is_refused() -> None:
    """It has no stateful form: in decode it would mix the rows of other sequences."""
    b = Builder("forward", "fused")
    heads = [b.input(name, TensorType("f32", (1, SymDim("T"), 4))) for name in "qkv"]
    graph = b.finish([b.emit("attention", *heads, scale=1.0)])
    with pytest.raises(VerifyError, match="not allowed at this stage"):
        introduce_state(graph)
