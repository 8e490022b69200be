"""Streams: work of the device in order, and what must stay in memory until it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from q35c.errors import Q35CError
from q35c.runtime.cuda.driver import Driver

_NON_BLOCKING = 1  # does not wait for the default stream, which other libraries use


class Stream:
    """A queue of work. Whoever adds some waits for it before anybody else does."""

    def __init__(self, driver: Driver) -> None:
        """Create the stream; the context must be current. Raises DeviceError."""
        self._driver = driver
        self._needs: object = None  # by work that may still be running
        self.is_capturing = False
        self.handle = driver.size("cuStreamCreate", _NON_BLOCKING)

    @contextlib.contextmanager
    def work(self, needs: object) -> Generator[None]:
        """Wait at the end for the work that was added within, whatever comes; `needs` is what that refers to."""
        self._needs = needs
        try:
            yield
        except BaseException:  # which says more than what waiting for the rest might raise
            with contextlib.suppress(Q35CError):
                self.synchronize()
            raise
        self.synchronize()  # a signal handler may raise at any point: then `settle` finds it

    def settle(self) -> None:
        """Wait for work whose caller was interrupted while waiting."""
        if self._needs is not None:
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for all work. Raises DeviceFault if some has failed."""
        self._driver.call("cuStreamSynchronize", self.handle)
        self._needs = None
