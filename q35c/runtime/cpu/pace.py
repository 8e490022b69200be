"""How many threads the next step gets: all of them, or fewer while others use the cores.

The threads of a step wait for each other after nearly every kernel. If another process takes a core, each wait may last until
the scheduler gives it back, milliseconds, and many threads are slower than one. So steps are measured beside the best that
the same kind of step once took; when they are slow or threads lose their cores, fewer threads are tried for a while, and what
was faster stays. On a quiet machine nothing is tried. Results do not depend on the number of threads.

What bounds the loss beside a neighbour: a look at the other choice takes one window or one step, whichever is longer, and comes
after `_FIRST_HOLD` seconds at first, doubled up to `_LONGEST_HOLD` each time that it was in vain.
"""

import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping

_WINDOW = 0.02  # seconds that one judgement looks at
_FEWEST_STEPS = 3
_SLOW = 1.5  # times the best: then something is wrong
_PREEMPTIONS_PER_SECOND = 25  # a neighbour that never sleeps takes a core about 100 times a second
_KEPT = 0.7  # of the threads' time; quiet machines keep 0.8 (steps of 500 us) to 0.99, beside a neighbour two threads 0.5
_WORTH = 0.95  # a change must win that much to stay
_FIRST_HOLD, _LONGEST_HOLD = 0.25, 8.0
_FORGETTING = 1 / 1024  # how fast the best follows slower steps: a longer context takes longer


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Pace:
    """Choose the number of threads by the time that steps take. Not thread-safe: the caller holds a lock."""

    def __init__(
        self,
        count: int,
        clock: Callable[[], float] = time.perf_counter,
        preemptions: Callable[[], int] = _preemptions,
    ) -> None:
        self.slowdown = 1.0  # of the last window, beside the best times of the same kinds of steps
        self._choices = sorted({count, count - 1, count // 2, 1} - {0}, reverse=True)
        self._at = 0  # the choice in use
        self._before: tuple[int, _Window] | None = None  # while another is tried: the old one
        self._best: dict[Hashable, float] = {}
        self._clock, self._preemptions = clock, preemptions
        self._hold, self._quiet_until = _FIRST_HOLD, 0.0
        self._tries = 0  # since something was better
        self._in_vain = math.inf  # the slowdown that the last try did not mend
        self._lost = preemptions()
        self._window = _Window()

    @property
    def threads(self) -> int:
        """Return the threads that the next step should use."""
        return self._choices[self._at]

    def note(self, kind: Hashable, seconds: float, cpu_seconds: float) -> None:
        """Learn from a step; steps of one kind would take the same time on a quiet machine.

        `cpu_seconds` are those of the process meanwhile: short interruptions count as preemptions, but take nothing.
        """
        best = self._best.get(kind, seconds)
        self._best[kind] = min(seconds, best + (seconds - best) * _FORGETTING)
        self._window.kept += cpu_seconds / self.threads
        if self._window.add(kind, seconds, best):
            self._judge()

    def _judge(self) -> None:
        window, self._window = self._window, _Window()
        self.slowdown = window.slowdown(self._best)
        lost, self._lost = self._lost, self._preemptions()
        preempted = (
            self._lost - lost > _PREEMPTIONS_PER_SECOND * window.seconds
            and window.kept < _KEPT * window.seconds
        )
        if self._before is not None:
            self._decide(*self._before)
            return
        is_disturbed = preempted or self.slowdown > _SLOW
        has_changed = is_disturbed and self.slowdown > 2 * self._in_vain
        if has_changed or self._clock() >= self._quiet_until:
            self._try_another(is_disturbed, window)

    def _try_another(self, is_disturbed: bool, window: "_Window") -> None:
        more = range(self._at)[-1:]
        fewer = range(self._at + 1, len(self._choices)) if is_disturbed else ()
        if candidates := (*more, *fewer):
            self._before = self._at, window
            self._at = candidates[self._tries % len(candidates)]

    def _decide(self, old: int, window: "_Window") -> None:
        """Keep what is tried if it is faster than the choice before; more threads need not be faster."""
        before, self._before = window.slowdown(self._best), None
        if self.slowdown < before * (_WORTH if self._at > old else 1.0):
            self._hold, self._tries, self._in_vain = _FIRST_HOLD, 0, math.inf
        else:
            self._at, self._in_vain = old, before
            self._tries += 1
            self._hold = min(2 * self._hold, _LONGEST_HOLD)
        self._quiet_until = self._clock() + self._hold


class _Window:
    """The steps that one judgement looks at."""

    def __init__(self) -> None:
        self.seconds = self.kept = 0.0  # kept: that a thread had a core, on average
        self._wanted = 0.0
        self._steps = 0
        self._kinds: Counter[Hashable] = Counter()

    def add(self, kind: Hashable, seconds: float, best: float) -> bool:
        """Add a step; say whether the window is full: long enough, and more than one unlucky step."""
        self._kinds[kind] += 1
        self.seconds += seconds
        self._wanted += best
        self._steps += 1
        return self.seconds > _WINDOW and self.seconds * self._steps > _FEWEST_STEPS * self._wanted

    def slowdown(self, best: Mapping[Hashable, float]) -> float:
        """Return the time that the steps took over the best that is known now."""
        return self.seconds / sum(count * best[kind] for kind, count in self._kinds.items())
