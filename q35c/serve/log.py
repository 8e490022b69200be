"""The server's log: ids, routes, counts and times, never what a user or a model said."""

from __future__ import annotations

import logging
import traceback

log = logging.getLogger("q35c.serve")


def log_failure(identity: str, error: BaseException) -> None:
    """Log where our code failed, without the error's text, which may hold what a user wrote."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", identity, type(error).__name__, places.rstrip())
