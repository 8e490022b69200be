"""What is kept of prompts whose session is gone: keys and values in runs of 64 tokens, shared by all that begin alike.

A node is a run of 64 tokens behind its parent's. It owns the run's keys and values, and perhaps a checkpoint at its end: only
there a session can go on. A node that leads to no checkpoint is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from q35c.runtime.saved import Cells, Checkpoint

RUN = 64  # tokens of a node
TokenIds = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens. A root, of which there is one for each salt, has no cells."""

    parent: Node | None
    key: bytes
    cells: Cells | None = None
    checkpoint: Checkpoint | None = None
    used: int = 0
    children: dict[bytes, Node] = field(default_factory=dict[bytes, "Node"])

    def path(self) -> Iterator[Node]:
        """Yield the nodes from here up to the one below the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class PrefixTree:
    """Runs of tokens by what they are, below a root for each salt."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._marked: dict[Node, str] = {}  # nodes with a checkpoint, and their salts
        self.bytes = 0

    def find(self, ids: TokenIds, limit: int, salt: str) -> Node | None:
        """Return the deepest node with a checkpoint on the way of a prompt, of at most `limit` tokens."""
        best, node = None, self._roots.get(salt)
        for key in _keys(ids[:limit]):
            node = None if node is None else node.children.get(key)
            if node is None:
                break
            if node.checkpoint is not None:
                best = node
        return best

    def known_tokens(self, ids: TokenIds, salt: str) -> int:
        """Return how many of a prompt's first tokens have cells here."""
        node, count = self._roots.get(salt), 0
        for key in _keys(ids):
            node = None if node is None else node.children.get(key)
            if node is None:
                break
            count += RUN
        return count

    def add(
        self,
        checkpoints: Sequence[Checkpoint],
        export: Callable[[int, int], Cells],
        salt: str,
        used: int,
    ) -> None:
        """Keep the checkpoints of a sequence, and of what `export` copies as much as they need and is not there."""
        if not checkpoints:
            return
        last = max(checkpoints, key=lambda item: item.length)
        marks = {item.length: item for item in checkpoints}
        node = self._roots.setdefault(salt, Node(None, b""))
        for index, key in enumerate(_keys(np.frombuffer(last.ids, np.int32))):
            start, end = index * RUN, (index + 1) * RUN
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, export(start, end))
                self.bytes += _bytes(child.cells)
            node = child
            if end in marks:
                self._mark(node, marks[end], salt, used)

    def oldest(self) -> Node | None:
        """Return the node whose checkpoint goes first: the least recently used.

        One with others below it goes before they do, unless it is the first of its way, where others may begin alike.
        """
        if not self._marked:
            return None
        return min(self._marked, key=lambda node: (self._is_first(node), node.used))

    def remove(self, node: Node) -> None:
        """Forget a node's checkpoint, and the runs that lead to no other."""
        self.bytes -= _bytes(node.checkpoint)
        node.checkpoint = None
        salt = self._marked.pop(node)
        while node.parent is not None and not node.children and node.checkpoint is None:
            del node.parent.children[node.key]
            self.bytes -= _bytes(node.cells)
            node = node.parent
        if node.parent is None and not node.children:
            del self._roots[salt]

    def __len__(self) -> int:
        return len(self._marked)

    def marked(self) -> dict[Node, str]:
        """Return the nodes that have a checkpoint, and their salts."""
        return dict(self._marked)

    def _mark(self, node: Node, checkpoint: Checkpoint, salt: str, used: int) -> None:
        node.used = max(node.used, used)
        if node.checkpoint is None:
            node.checkpoint = checkpoint
            self._marked[node] = salt
            self.bytes += _bytes(checkpoint)

    def _is_first(self, node: Node) -> bool:
        """Say whether a node has children and no checkpoint above it."""
        above = (step for step in node.path() if step is not node)
        return bool(node.children) and all(step.checkpoint is None for step in above)


def _keys(ids: TokenIds) -> Iterator[bytes]:
    for start in range(0, len(ids) - len(ids) % RUN, RUN):
        yield ids[start : start + RUN].tobytes()


def _bytes(part: Cells | Checkpoint | None) -> int:
    return 0 if part is None else part.bytes
