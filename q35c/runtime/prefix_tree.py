"""What is kept of prompts whose session is gone: keys and values in runs of 64 tokens, shared by all that begin alike.

A node is a run of 64 tokens behind its parent's. It owns the run's keys and values, and perhaps a checkpoint at its end: only
there a session can go on. A node that leads to no checkpoint is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from q35c.runtime.saved import Cells, Checkpoint

RUN = 64  # tokens of a node
TokenIds = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens. A root, of which there is one for each salt, has no cells."""

    parent: Node | None
    key: bytes
    cells: Cells | None = None
    checkpoint: Checkpoint | None = None
    used: int = 0
    is_fork: bool = False  # more than one prompt is known to have gone on from here
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
        forks: Collection[int] = (),
    ) -> None:
        """Keep the checkpoints of a sequence, and of what `export` copies as much as they need and is not there.

        `forks` are the lengths from where more than one prompt went on.
        """
        if not checkpoints:
            return
        last = max(checkpoints, key=lambda item: item.length)
        marks = {item.length: item for item in checkpoints}
        node = self._roots.setdefault(salt, Node(None, b""))
        for index, key in enumerate(_keys(np.frombuffer(last.ids, np.int64))):
            start, end = index * RUN, (index + 1) * RUN
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, export(start, end))
                self.bytes += _bytes(child.cells)
            node = child
            if end in marks:
                self._mark(node, marks[end], salt, used)
                node.is_fork = node.is_fork or end in forks

    def order(self) -> list[Node]:
        """Return the nodes with a checkpoint, those first that are missed least.

        First those that prompts have passed, all on to the same further one, the closest behind another first: only a prompt
        that leaves their way before that could use them, and it loses little. Last the first of a way with others behind it,
        where new prompts begin alike. Among the others by last use.
        """
        above = {node: _above(node) for node in self._marked}
        passed = {
            upper
            for upper, is_straight in above.values()
            if upper is not None
            and is_straight
            and not upper.is_fork
            and above[upper][0] is not None
        }

        def rank(node: Node) -> tuple[int, int, int]:
            upper, length = above[node][0], _length(node)
            if node in passed and upper is not None:
                return 0, length - _length(upper), length
            is_first = upper is None and bool(node.children)
            return 2 if is_first else 1, node.used, length

        return sorted(self._marked, key=rank)

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


def _above(node: Node) -> tuple[Node | None, bool]:
    """Return the next node above with a checkpoint, and whether no other way branches off in between, or there."""
    is_straight = True
    for step in node.path():
        if step is not node:
            is_straight = is_straight and len(step.children) == 1
            if step.checkpoint is not None:
                return step, is_straight
    return None, False


def _length(node: Node) -> int:
    return 0 if node.checkpoint is None else node.checkpoint.length


def _keys(ids: TokenIds) -> Iterator[bytes]:
    for start in range(0, len(ids) - len(ids) % RUN, RUN):
        yield ids[start : start + RUN].tobytes()


def _bytes(part: Cells | Checkpoint | None) -> int:
    return 0 if part is None else part.bytes
