"""What a fork does to a model: in the child its threads are gone, and its locks may be held for ever."""

import os

from q35c.errors import OptionError

_forks = 0  # between the process that imported this module and this one


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Origin:
    """Remember the process in which something was made."""

    def __init__(self) -> None:
        self._forks = _forks

    @property
    def is_elsewhere(self) -> bool:
        """Say whether this is a child, forked since; no lock that others may hold must be waited for here."""
        return self._forks != _forks

    def check(self) -> None:
        """Raise OptionError in a forked child."""
        if self._forks != _forks:
            raise OptionError(
                "the model was loaded before this process was forked: its threads are not here",
                hint="load the model in the child process",
            )
