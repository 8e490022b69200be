"""Who may ask what: keys on every route, Host headers, web pages, ids, methods."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from q35c.serve.app import ROUTES
from tests.serve.harness import Running, chat, running
from tests.serve.raw import exchange

KEY = {"authorization": "Bearer first-key"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(
        keys=("first-key", "second-key"), cors_origins=("https://page.example",), names=("m", "n")
    ) as made:
        yield made


@pytest.mark.parametrize("path", [*ROUTES, "/v1/models/m", "/unknown", "/v1/unknown", "/docs"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE"])
def test_no_route_but_health_answers_without_a_key(locked: Running, path: str, method: str) -> None:
    with locked.client() as client:
        answer = client.request(method, path, headers=JSON)
        if path == "/health":
            assert answer.status_code == (200 if method in ("GET", "HEAD") else 405)
            return
        assert answer.status_code == 401
        if method != "HEAD":
            error = answer.json()["error"]
            assert error["type"] == "authentication_error" and "m" not in error.get("models", "")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-key2"},
        {"authorization": b"Bearer \xe9"},
        {"x-api-key": b"\xff\xfe"},
        {"x-api-key": ""},
    ],
)
def test_a_wrong_key_is_refused(locked: Running, headers: dict[str, str]) -> None:
    with locked.client() as client:
        assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers", [KEY, {"authorization": "bearer second-key"}, {"x-api-key": "second-key"}]
)
def test_a_right_key_is_let_through(locked: Running, headers: dict[str, str]) -> None:
    with locked.client() as client:
        answer = client.post("/v1/chat/completions", json=chat(), headers=headers)
        assert answer.status_code == 200


def test_each_key_has_prefixes_of_its_own(locked: Running) -> None:
    with locked.client() as client:
        for key in ("first-key", "second-key"):
            client.post("/v1/chat/completions", json=chat(), headers={"x-api-key": key})
    first, second = locked.engine.requests[-2:]
    assert first.salt != second.salt and first.client != second.client


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1/../v1/models",
        "/V1/models",
        "/v1/models;x",
        "http://evil/v1/models",
        "/v1%2fmodels",
        "/health/../v1/models",
        "/health/",
        "/health%00",
        "/v1/models?x=/health",
        "/v1/models#/health",
    ],
)
def test_no_spelling_of_a_path_avoids_the_key(locked: Running, target: str) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    status = exchange(locked.port, head.encode()).split(b" ")[1]
    assert status in (b"400", b"401", b"404")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", ""]
)
def test_a_foreign_host_is_refused(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8080", "[::1]"])
def test_local_hosts_are_accepted(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_may_read_nothing_by_default(client: httpx.Client) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = client.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 405
    for made in (answer, client.get("/v1/models", headers=headers)):
        assert not [name for name in made.headers if name.startswith("access-control")]


def test_a_page_that_may_can_ask(locked: Running) -> None:
    with locked.client() as client:
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        answer = client.options("/v1/chat/completions", headers=headers)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        answer = client.get("/v1/models", headers={**headers, **KEY})
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = client.options("/v1/models", headers={**headers, "origin": "https://other.example"})
        assert other.status_code == 401


@pytest.mark.parametrize(
    ("given", "is_echoed"),
    [("a-B_3.x", True), ("a b", False), ("x" * 129, False), ("ERROR\tfake", False), ("", False)],
)
def test_request_ids(client: httpx.Client, given: str, is_echoed: bool) -> None:
    answer = client.get("/v1/models", headers={"x-request-id": given})
    made = answer.headers["x-request-id"]
    assert (made == given) is is_echoed and made == answer.headers["request-id"]
    assert is_echoed or made.startswith("req_")


@pytest.mark.parametrize(("path", "allowed"), [("/v1/models", "GET, HEAD"), ("/tokenize", "POST")])
def test_other_methods_are_refused(client: httpx.Client, path: str, allowed: str) -> None:
    answer = client.request("PATCH", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_models_are_listed(locked: Running) -> None:
    with locked.client(headers=KEY) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["m", "n"]
        assert client.get("/v1/models/n").json()["max_model_len"] == 1 << 18
        for unknown in ("x", "*", "m/"):
            assert client.get(f"/v1/models/{unknown}").status_code == 404


def test_tokens_and_back(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": "aé<|im_end|>"}).json()
    assert ids["tokens"] == [97, 195, 169, 258] and ids["count"] == 4
    text = client.post("/detokenize", json={"tokens": ids["tokens"]}).json()
    assert text == {"prompt": "aé<|im_end|>"}
    made = client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert made["tokens"][0] == 257 and bytes(made["tokens"][-8:]) == b"<think>\n"
