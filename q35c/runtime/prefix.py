"""What is kept of prompts: one that begins as an earlier one did is not computed again, and no bit depends on it.

A finished session is parked as it is, and the next turn rewinds it in place. If another prompt needs less of it, that part is
copied. When memory is short, only what checkpoints need moves to a tree, where those that begin alike share it; and there go
first the checkpoints that are missed least.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from q35c import arguments
from q35c.artifact import Manifest
from q35c.errors import MemoryRefused
from q35c.runtime.lease import SLICE, Branch, Lease, last_cut, plan_points
from q35c.runtime.memory import give_back_memory, state_bytes
from q35c.runtime.multimodal import PromptLike, cell_ids
from q35c.runtime.prefix_files import PrefixFiles
from q35c.runtime.prefix_tree import Node, PrefixTree, TokenIds
from q35c.runtime.recent import RecentPrompts
from q35c.runtime.saved import Checkpoint
from q35c.runtime.session import Session

Result = TypeVar("Result")
OpenSession = Callable[[int], Session]  # of so many tokens


class PrefixCache:
    """Sessions of one model for prompts that may begin alike. Thread-safe, unless sessions in use are shared."""

    def __init__(
        self,
        open_session: OpenSession,
        manifest: Manifest,
        max_bytes: int,
        message_start: int | None = None,
        digest: str = "",
    ) -> None:
        """Keep states that nobody uses.

        max_bytes      of them at most; 0: none
        message_start  as for `plan_points`
        digest         the artifact's, for files
        """
        self.max_bytes = max_bytes
        self.evictions = 0
        self.misses: Counter[str] = Counter()
        self._open_session = open_session
        self.manifest, self.digest = manifest, digest
        self._message_start = message_start
        self._parked: list[Branch] = []
        self._lent: list[Branch] = []
        self._tree = PrefixTree()
        self._recent = RecentPrompts()
        self._clock = 0
        # Copy from sessions in use, too: their users and the cache's must be one thread.
        self.shares_lent = False
        self._lock = threading.RLock()

    def open(self, prompt: PromptLike, context: int, salt: str = "") -> Lease:
        """Return a session for a prompt, with as much of it as is kept for this salt. Raises MemoryRefused."""
        if not self.max_bytes:
            return Lease(Branch(self._open_session(context), salt), prompt)
        with self._lock:
            return self.with_room(lambda: self._open(prompt, context, salt))

    def with_room(self, action: Callable[[], Result]) -> Result:
        """Return what an action returns that needs memory; meanwhile what is kept gives way. Raises MemoryRefused."""
        while True:
            try:
                return action()
            except MemoryRefused:
                if not self.shrink():
                    raise

    def _open(self, prompt: PromptLike, context: int, salt: str) -> Lease:
        ids = cell_ids(prompt)
        branch = self._begin(ids, context, salt)
        branch.used = self._clock = self._clock + 1
        self._lent.append(branch)
        found = branch.session.length
        miss = self._recent.explain(ids, salt, found)
        if miss is not None:
            self.misses[miss.reason] += 1
        branch_at = miss.agreed_tokens if miss is not None and miss.reason == "unmarked" else 0
        branch.forks.add(branch_at // SLICE * SLICE)
        points = plan_points(ids, self._message_start, branch_at)
        self._recent.add(ids, salt, points)
        return Lease(branch, prompt, points, miss, self._take_back)

    @property
    def parked_bytes(self) -> int:
        """Return the memory of sessions that wait for their next turn."""
        return sum(map(self._branch_bytes, list(self._parked)))

    @property
    def cached_bytes(self) -> int:
        """Return the memory of what is kept of other sessions."""
        return self._tree.bytes

    def shrink(self) -> bool:
        """Give up what was used least recently, so that the system has the memory; say whether there was anything."""
        with self._lock:
            has_evicted = self._evict()
        give_back_memory()
        return has_evicted

    def save(self, directory: str | os.PathLike[str]) -> int:
        """Write all that is not lent to files below a directory, which become part of what is kept there.

        Returns the files written. Raises OptionError, DiskRefused.
        """
        files = self._files(directory)
        with self._lock:
            while self._parked:
                self._move(self._oldest())
            return files.save(self._tree)

    def load(self, directory: str | os.PathLike[str]) -> int:
        """Add what `save` has written for this model, the newest within `max_bytes`; return the checkpoints added.

        Files that cannot be used are skipped. Raises OptionError for a directory that cannot be.
        """
        files = self._files(directory)
        with self._lock:
            return files.load(self._tree, self.max_bytes - self.parked_bytes - self.cached_bytes)

    def _files(self, directory: str | os.PathLike[str]) -> PrefixFiles:
        return PrefixFiles(arguments.path("directory", directory), self.manifest, self.digest)

    def close(self) -> None:
        """Give up everything that is not lent."""
        with self._lock:
            for branch in self._parked:
                branch.session.close()
            self._parked.clear()
            self._tree, self._recent = PrefixTree(), RecentPrompts()

    def _begin(self, ids: TokenIds, context: int, salt: str) -> Branch:
        """Return a session that stands at the last checkpoint of a prompt, or at its beginning."""
        limit = last_cut(len(ids))
        node = self._tree.find(ids, limit, salt)
        source, best = self._find(ids, limit, salt)
        in_tree = None if node is None else node.checkpoint
        if in_tree is not None and (best is None or in_tree.length > best.length):
            assert node is not None
            return self._grow(node, in_tree, context, salt)
        if source is None or best is None:
            return Branch(self._open_session(context), salt)
        source.used = self._clock = self._clock + 1  # if something must give way, others do first
        if self._is_at_end(source, best):
            source.session.rewind(best)  # first: what follows it may be more than the new context
            source.session.resize(context)
            self._parked.remove(source)
            return source
        source.forks.add(best.length)
        branch = Branch(self._open_session(context), salt, source.up_to(best.length))
        branch.forks |= source.forks
        branch.session.import_kv([source.session.export_kv(0, best.length)], best)
        return branch

    def _find(
        self, ids: TokenIds, limit: int, salt: str
    ) -> tuple[Branch | None, Checkpoint | None]:
        """Return the session that has the most of a prompt, parked ones first, and its checkpoint there."""
        source, best, best_rank = None, None, (0, False)
        for branch in (*self._parked, *(self._lent if self.shares_lent else ())):
            found = branch.best(ids, limit) if branch.salt == salt else None
            if found is None:
                continue
            # Of equal ones, one that needs not be copied.
            rank = (found.length, self._is_at_end(branch, found))
            if rank > best_rank:
                source, best, best_rank = branch, found, rank
        return source, best

    def _is_at_end(self, branch: Branch, checkpoint: Checkpoint) -> bool:
        """Say whether a session may go back to a checkpoint without losing another."""
        return branch in self._parked and checkpoint.length == max(branch.checkpoints)

    def _grow(self, node: Node, checkpoint: Checkpoint, context: int, salt: str) -> Branch:
        """Return a new session with what the tree has on the way to a node."""
        node.used = self._clock = self._clock + 1
        way = list(node.path())[::-1]
        marks = (step.checkpoint for step in way)
        branch = Branch(self._open_session(context), salt, {m.length: m for m in marks if m})
        forks = (step.checkpoint for step in way if step.is_fork)
        branch.forks.update(m.length for m in forks if m is not None)
        branch.session.import_kv([step.cells for step in way if step.cells is not None], checkpoint)
        return branch

    def _take_back(self, branch: Branch, is_sound: bool) -> None:
        """Park a session that was lent, and make room for it."""
        with self._lock:
            self._park(branch, is_sound)
            self._make_room()

    def _park(self, branch: Branch, is_sound: bool) -> None:
        self._lent.remove(branch)
        branch.used = self._clock = self._clock + 1
        if not (is_sound and branch.checkpoints and _yield_memory(branch.session)):
            branch.session.close()
            return
        for other in [item for item in self._parked if item.salt == branch.salt]:
            if _covers(other, branch):
                other.used = branch.used
                branch.session.close()
                return
            if _covers(branch, other):
                self._parked.remove(other)
                other.session.close()
        self._parked.append(branch)

    def _move(self, branch: Branch | None) -> None:
        """Keep of a session only what its checkpoints need, and of that what the tree has not: never more than before."""
        if branch is not None:
            made = list(branch.checkpoints.values())
            self._tree.add(made, branch.session.export_kv, branch.salt, branch.used, branch.forks)
            self._parked.remove(branch)
            branch.session.close()

    @property
    def _is_full(self) -> bool:
        return self.parked_bytes + self.cached_bytes > self.max_bytes

    def _make_room(self) -> None:
        """Keep within the limit: share what can be shared, then give up checkpoints that are missed least."""
        while self._is_full and len(self._parked) > 1:
            self._move(self._oldest())
        while self._is_full and self._parked and self._parked[0].thin():
            self.evictions += 1
        if self._is_full:
            self._move(self._oldest())
        for node in self._tree.order():
            if not self._is_full:
                break
            self._tree.remove(node)
            self.evictions += 1

    def _evict(self) -> bool:
        """Give up the oldest of all, a parked session or a checkpoint in the tree; say whether there was any."""
        node, branch = next(iter(self._tree.order()), None), self._oldest()
        if branch is not None and (node is None or branch.used < node.used):
            self._parked.remove(branch)
            branch.session.close()
        elif node is not None:
            self._tree.remove(node)
        else:
            return False
        self.evictions += 1
        return True

    def _oldest(self) -> Branch | None:
        return min(self._parked, key=lambda branch: branch.used, default=None)

    def _branch_bytes(self, branch: Branch) -> int:
        own = state_bytes(self.manifest, branch.session.high_water)
        return own + sum(item.bytes for item in list(branch.checkpoints.values()))


def _yield_memory(session: Session) -> bool:
    """Give up the memory for tokens that will not come; say whether the session may stay."""
    try:
        session.resize(max(1, session.length))
    except MemoryRefused:  # others have been promised more than there is by now
        return False
    return True


def _covers(branch: Branch, other: Branch) -> bool:
    """Say whether a session has all that another one could be used for."""
    if not other.checkpoints.keys() <= branch.checkpoints.keys():
        return False
    last = max(other.checkpoints)
    return branch.checkpoints[last].ids == other.checkpoints[last].ids
