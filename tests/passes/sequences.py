"""Run the entries of a model by the interpreter as the runtime does: sequences in slots."""

from __future__ import annotations

import numpy as np

from q35c.ir import Graph, Module
from q35c.ir.interpret import run
from tests.passes.arrays import draw_arrays

CONTEXT, SLOTS = 16, 3


class Sequences:
    """The state of some sequences and the entries that continue them. NaN fills unwritten caches."""

    def __init__(self, module: Module, seed: int = 0) -> None:
        self.entries = {entry.name: entry for entry in module}
        sizes = {"T": 1, "B": SLOTS, "CTX": CONTEXT}
        arrays = draw_arrays(*module, seed=seed, sizes=sizes)
        self.weights, self.state = arrays.weights, arrays.state

    def run(
        self,
        entry: str,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: list[int],
        starts: list[int],
    ) -> np.ndarray:
        """Run one step and return its logits, none of an entry that has none."""
        inputs = {
            "tokens": tokens, "positions": positions,
            "slots": np.array(slots, np.int64), "starts": np.array(starts, np.int32),
        }  # fmt: skip
        graph = self.entries[entry]
        logits = run(graph, used(graph, inputs), self.weights, self.state)
        return logits[0] if graph.outputs else np.empty((0,))

    def slot(self, number: int) -> dict[str, np.ndarray]:
        """Copy the state of one slot."""
        return {name: array[number].copy() for name, array in self.state.items()}


def used(graph: Graph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {value.name: inputs[value.name] for value in graph.inputs}


def random_prompt(seed: int, tokens: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [T] and positions [3, T] that differ by axis, as those of images do."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 9, (3, tokens)).astype(np.int32)
    return rng.integers(0, vocabulary, tokens).astype(np.int32), positions


def forward(graph: Graph, tokens: np.ndarray, positions: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the logits [T, V] of a graph without state, by the weights of `Sequences`."""
    weights = draw_arrays(graph, seed=seed, sizes={"T": 1}).weights
    return run(graph, {"tokens": tokens, "positions": positions}, weights)[0]
