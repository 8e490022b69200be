"""A JSON document as a response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from q35c.serve import sse


def json_response(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response that holds a value as JSON."""
    return Response(sse.dump(document), status, dict(headers or {}), media_type="application/json")
