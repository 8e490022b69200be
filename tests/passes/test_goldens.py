"""Every golden file: a pass on an input graph, its exact result, and the same numbers from both.

A file is the input, a line `---`, and the result. `near_miss_*.txt` must come out as they went in.
`pytest tests/passes --update-golden` rewrites them.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from q35c.ir import Graph, Module
from q35c.ir.precision import POLICIES
from q35c.ir.text import parse_graph, print_graph, print_module
from q35c.passes.pipeline import PIPELINE, Choices, Pass
from tests.passes.arrays import assert_same_meaning, median_loss

FOLDER = Path(__file__).parent


CHOICES = Choices(replace(POLICIES["w4"], cache="int8"), takes_rows=True)


def step_of(row: Pass) -> Callable[[Graph], Graph | Module]:
    """Return a pass as a function of one graph, with the docstring of its file's function."""

    def step(graph: Graph) -> Graph | Module:
        made = row.run(Module((graph,)), CHOICES)
        return made.entries[0] if len(made.entries) == 1 else made

    step.__doc__ = getattr(importlib.import_module(f"q35c.passes.{row.name}"), row.name).__doc__
    return step


PASSES = {row.name: step_of(row) for row in PIPELINE}
ALWAYS_CHANGES = ("introduce_state", "split_entries", "quantize", "schedule_attention")
# Of the largest element, in the median draw: 4 bits of random weights, several layers deep; 8 bits of keys and values.
ROUNDING = {"quantize": 0.25, "schedule_attention": 0.02}
FILES = sorted(FOLDER.glob("*/*.txt"))
EXAMPLE = re.compile(r"( +)Before:\n(.*)\n\1After:\n(.*?)\n(?:\n\1\S|\1$|\s*$)", re.DOTALL)


def show(graph: Graph | Module) -> str:
    return print_module(graph) if isinstance(graph, Module) else print_graph(graph)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def check(name: str, before: str, after: str) -> None:
    """Run the pass on `before`; compare text and meaning with `after`."""
    step = PASSES[name]
    graph = parse_graph(before)
    made = step(graph)
    assert show(made) == after
    for entry in made if isinstance(made, Module) else [made]:
        assert parse_graph(print_graph(entry)) == entry
    if isinstance(made, Graph) and made != graph:
        if name in ROUNDING:
            assert median_loss(graph, made) <= ROUNDING[name]
        else:
            assert_same_meaning(graph, made, name)
    if name not in ALWAYS_CHANGES:
        assert show(step(made)) == after, "a second run changes the graph again"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_golden(path: Path, is_updating: bool) -> None:
    before, _, after = path.read_text().partition("---\n")
    if is_updating:
        before = print_graph(parse_graph(before))
        after = show(PASSES[path.parent.name](parse_graph(before)))
        path.write_text(f"{before}---\n{after}")
    assert print_graph(parse_graph(before)) == before
    is_near_miss = path.stem.startswith("near_miss_")
    assert is_near_miss == (before == after), "only a near miss comes out as it went in"
    check(path.parent.name, before, after)


def example_of(name: str) -> tuple[str, str] | None:
    """Return the Before and After of a pass's docstring; lines indented further go on."""
    match = EXAMPLE.search(PASSES[name].__doc__ or "")
    if match is None:
        return None
    sides = (inspect.cleandoc(match[i]) + "\n" for i in (2, 3))
    before, after = (re.sub(r"\n {4,}", " ", side) for side in sides)
    return before, after


@pytest.mark.parametrize("name", PASSES)
def test_docstring(name: str) -> None:
    """The Before of a docstring becomes its After, or the docstring names a golden that shows it."""
    example = example_of(name)
    if example is None:
        named = re.search(rf"tests/passes/({name}/\w+)\.txt", PASSES[name].__doc__ or "")
        assert named is not None and named[1] in map(name_of, FILES)
        return
    before, after = example
    assert print_graph(parse_graph(before)) == before
    check(name, before, after)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_goldens(name: str) -> None:
    stems = [path.stem for path in FILES if path.parent.name == name]
    misses = [stem for stem in stems if stem.startswith("near_miss_")]
    assert len(stems) > len(misses)
    assert len(misses) >= 2 or name in ALWAYS_CHANGES


def test_every_golden_has_a_pass() -> None:
    assert {path.parent.name for path in FILES} == set(PASSES)
