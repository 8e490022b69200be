"""Pictures in requests of all dialects: shown, refused by the part they are, never fetched."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from q35c.runtime.multimodal import MultimodalPrompt
from q35c.runtime.seeing import Eyes
from q35c.vision.parameters import ImageLimits, VisionParameters
from q35c.vision_config import VisionConfig
from tests.seeing import TOKENS, TOWER, Counted, mean_colours
from tests.serve.fakes import FakeModel, FakePrompting, byte_tokenizer
from tests.serve.harness import Running, running
from tests.vision.clips import kind
from tests.vision.pictures import encoded, photo

PNG = encoded(photo(64, 96), "PNG")
DATA = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{DATA}"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def of_openai(url: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "m", "messages": [{"role": "user", "content": parts}]}


def of_responses(url: str) -> dict[str, Any]:
    parts = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": url}]
    return {"model": "m", "input": [{"role": "user", "content": parts}]}


def of_anthropic(url: str) -> dict[str, Any]:
    source: dict[str, Any] = {"type": "url", "url": url}
    if url.startswith("data:image/png;base64,"):
        data = url.split(",", 1)[1]
        source = {"type": "base64", "media_type": "image/png", "data": data}
    parts = [{"type": "text", "text": "What?"}, {"type": "image", "source": source}]
    return {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": parts}]}


DIALECTS = {
    "openai": (CHAT, of_openai, "messages[0].content[1]"),
    "responses": (RESPONSES, of_responses, "input[0].content[1]"),
    "anthropic": (MESSAGES, of_anthropic, "messages[0].content[1]"),
}


def seeing_fake(tower: Counted, context: int = 1 << 18) -> FakeModel:
    model = FakeModel(context)
    names = ("image", "video", "vision_start", "vision_end")
    ids = map(model.tokenizer.token_id, TOKENS)
    config = TOWER.to_dict() | {
        f"{name}_token_id": token for name, token in zip(names, ids, strict=True)
    }
    parameters = VisionParameters(image=ImageLimits(1024, 65536))
    eyes = Eyes(VisionConfig.from_dict(config), parameters, tower)
    model.prompting = FakePrompting(context, eyes)
    return model


@pytest.fixture
def tower() -> Counted:
    return Counted(mean_colours)


@pytest.fixture
def server(tower: Counted) -> Iterator[Running]:
    with running(model=seeing_fake(tower)) as server:
        yield server


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_picture_is_shown(server: Running, tower: Counted, dialect: str) -> None:
    path, make, _ = DIALECTS[dialect]
    with server.client() as client:
        answers = [client.post(path, json=make(URL)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    first, second = (request.ids for request in server.engine.requests)
    assert isinstance(first, MultimodalPrompt) and isinstance(second, MultimodalPrompt)
    assert (first.ids < 0).sum() == 6 and (first.ids == second.ids).all()
    assert tower.calls == 1
    assert answers[0].json()["usage"].get("prompt_tokens", len(first)) == len(first)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/x.png", "only data URLs are read"),
        ("http://127.0.0.1:1/x.png", "only data URLs are read"),
        ("file:///etc/passwd", "only data URLs are read"),
        ("/etc/passwd", "only data URLs are read"),
        ("data:image/png;base64,AAAA", "no picture"),
        ("data:image/png;base64,?", "no base64"),
        (f"data:image/png;base64,{base64.b64encode(PNG[:-60]).decode()}", "cannot be decoded"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_part(
    server: Running, dialect: str, url: str, words: str
) -> None:
    path, make, where = DIALECTS[dialect]
    with server.client() as client:
        answer = client.post(path, json=make(url))
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"]
    assert error.get("param", where) == where and error["message"].startswith(where)
    assert "passwd" not in error["message"] and server.engine.requests == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_model_of_text_says_which_part_it_cannot_take_in(dialect: str) -> None:
    path, make, where = DIALECTS[dialect]
    with running() as server, server.client() as client:
        answer = client.post(path, json=make(URL))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{where}: a part of a message is image")


def test_pictures_that_do_not_fit_the_context_are_refused(tower: Counted) -> None:
    with running(model=seeing_fake(tower, context=180)) as server, server.client() as client:
        document = of_openai(URL)
        document["messages"][0]["content"] *= 12
        answer = client.post(CHAT, json=document)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"].startswith("messages[0].content[") and tower.calls == 0


def test_a_tool_may_show_a_picture(server: Running) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": DATA}
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "text", "text": "a"}, {"type": "image", "source": source}],
    }
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result, {"type": "text", "text": "b"}]},
    ]
    with server.client() as client:
        answer = client.post(MESSAGES, json={"model": "m", "max_tokens": 4, "messages": messages})
    assert answer.status_code == 200, answer.text
    assert (server.engine.requests[0].ids.ids < 0).sum() == 6


def test_counting_looks_at_nothing(server: Running, tower: Counted) -> None:
    with server.client() as client:
        counted = client.post(f"{MESSAGES}/count_tokens", json=of_anthropic(URL)).json()
        tokens = client.post("/tokenize", json={"messages": of_openai(URL)["messages"]}).json()
        client.post(MESSAGES, json=of_anthropic(URL))
    assert counted["input_tokens"] == len(server.engine.requests[0].ids)
    assert tokens["tokens"].count(byte_tokenizer().token_id(TOKENS[0])) == 6 and tower.calls == 1


def test_keys_do_not_learn_what_others_have_shown(tower: Counted) -> None:
    with running(model=seeing_fake(tower), keys=("a" * 20, "b" * 20)) as server:
        for key in ("a" * 20, "b" * 20, "a" * 20):
            with server.client(headers={"Authorization": f"Bearer {key}"}) as client:
                assert client.post(CHAT, json=of_openai(URL)).status_code == 200
    assert tower.calls == 2


@pytest.mark.parametrize("allows", [False, True])
def test_clips_are_decoded_only_where_the_server_allows_it(tower: Counted, allows: bool) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(kind("three frames")).decode()
    content = [{"type": "video_url", "video_url": {"url": url}}]
    with (
        running(model=seeing_fake(tower), allow_videos=allows) as server,
        server.client() as client,
    ):
        answer = client.post(
            CHAT, json={"model": "m", "messages": [{"role": "user", "content": content}]}
        )
    assert answer.status_code == (200 if allows else 400), answer.text
    if not allows:
        assert answer.json()["error"]["param"] == "messages[0].content[0]"
        assert "takes no clips" in answer.json()["error"]["message"]
    assert tower.calls == (2 if allows else 0)


def test_sound_is_refused_by_its_part(server: Running) -> None:
    content = [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]
    with server.client() as client:
        answer = client.post(
            CHAT, json={"model": "m", "messages": [{"role": "user", "content": content}]}
        )
    assert answer.status_code == 400 and "does not hear" in json.dumps(answer.json())


def test_a_stored_file_is_not_known(server: Running) -> None:
    document = of_responses(URL)
    document["input"][0]["content"][1] = {"type": "input_image", "file_id": "file-1"}
    with server.client() as client:
        answer = client.post(RESPONSES, json=document)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input[0].content[1]"


def test_without_the_packages_pictures_are_refused_and_text_is_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with server.client() as client:
        refused = client.post(CHAT, json=of_openai(URL))
        said = client.post(
            CHAT, json={"model": "m", "messages": [{"role": "user", "content": "x"}]}
        )
    assert refused.status_code == 400 and said.status_code == 200
    assert refused.json()["error"]["param"] == "messages[0].content[1]"
