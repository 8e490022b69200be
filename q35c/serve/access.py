"""Who may ask: keys, Host headers, web pages, and the ids that requests are known by."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers

from q35c.errors import RequestError
from q35c.serve.settings import ANY, LOCAL_HOSTS

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Keys:
    """The API keys, of which only hashes are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, headers: Headers) -> int:
        """Return the number of the key that a request brings, 0 where none is asked for.

        Takes the same time for every wrong key. Raises RequestError.
        """
        if not self._digests:
            return 0
        digest = _digest(_given_key(headers))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise RequestError(
                "the API key is missing or wrong",
                status=401,
                code="invalid_api_key",
                hint="send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            )
        return matches.index(True)


def _given_key(headers: Headers) -> bytes:
    """Return the key of a request, empty where there is none. Headers are read as Latin-1, which loses nothing."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip().encode("latin-1")
    return headers.get("x-api-key", "").encode("latin-1")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def check_host(headers: Headers, allowed: Sequence[str]) -> None:
    """Raise RequestError for a name that is not this server's: a page that rebinds its own name to us has one."""
    found = _HOST.fullmatch(headers.get("host", ""))
    name = found[1].strip("[]").lower() if found else ""
    if name not in LOCAL_HOSTS and name not in allowed and ANY not in allowed:
        raise RequestError(
            "this server does not answer to that name",
            status=421,
            where="Host",
            hint="--allowed-hosts adds names",
        )


def cors_headers(headers: Headers, origins: Sequence[str]) -> dict[str, str]:
    """Return what lets a web page read the answer, nothing for pages that may not."""
    origin = headers.get("origin")
    if origin is None or (origin not in origins and ANY not in origins):
        return {}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
        "Vary": "Origin",
    }


def preflight_headers(methods: Sequence[str]) -> dict[str, str]:
    """Return what a browser asks before it sends a request for a page that may."""
    return {
        "Access-Control-Allow-Methods": ", ".join(methods),
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, X-Request-Id, Anthropic-Version, Anthropic-Beta",
        "Access-Control-Max-Age": "600",
    }


def request_id(headers: Headers) -> str:
    """Return the id that a client gave its request, or a new one where that could upset a log."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
