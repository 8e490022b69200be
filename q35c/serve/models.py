"""What the server says about itself and its model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from q35c.errors import RequestError
from q35c.serve.desk import Desk
from q35c.serve.incoming import Incoming
from q35c.serve.json_response import json_response
from q35c.serve.metrics import CONTENT_TYPE
from q35c.serve.settings import ANY
from q35c.version import __version__


async def answer_root(desk: Desk, incoming: Incoming) -> Response:
    """Answer clients that look whether anybody is there."""
    return json_response({"q35c": __version__})


async def answer_health(desk: Desk, incoming: Incoming) -> Response:
    """Answer 200 while requests are taken, 503 while the server is about to end."""
    if desk.is_draining:
        return json_response({"status": "draining"}, 503)
    return json_response({"status": "ok"})


async def answer_metrics(desk: Desk, incoming: Incoming) -> Response:
    """Answer with all numbers in Prometheus' form."""
    return Response(desk.metrics.text(), media_type=CONTENT_TYPE)


async def answer_models(desk: Desk, incoming: Incoming) -> Response:
    """List the names under which the model is served."""
    listed = [_model(desk, name) for name in desk.settings.names if name != ANY]
    first, last = listed[0]["id"], listed[-1]["id"]
    ends = {"first_id": first, "last_id": last, "has_more": False}  # what Anthropic's clients read
    return json_response({"object": "list", "data": listed, **ends})


async def answer_model(desk: Desk, incoming: Incoming) -> Response:
    """Describe one model."""
    name = incoming.path.removeprefix("/v1/models/")
    if name not in desk.settings.names or name == ANY:
        raise RequestError("no such model", status=404, code="model_not_found")
    return json_response(_model(desk, name))


def _model(desk: Desk, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": desk.started_at,
        "created_at": datetime.fromtimestamp(desk.started_at, UTC).isoformat(),
        "display_name": name,
        "owned_by": "q35c",
        "max_model_len": desk.model.context,
        "context_length": desk.model.context,
    }
