"""What docs/serving.md shows works as it stands there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from q35c.cli.serve import serve_command
from q35c.serve.app import ROUTES
from tests.serve.harness import Running, running

DOC = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8080"
PROGRAMS = re.findall(r"```python\n(.*?)```", DOC, re.S)
CURLS = re.findall(rf"curl {ADDRESS}(\S+) .*?-d '(.*?)'", DOC, re.S)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(names=("model",)) as made:
        made.engine.say = lambda request: (
            "</think>Hello" if bytes(request.ids[-8:]) == b"<think>\n" else "Hello"
        )
        yield made


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program(
    server: Running,
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names: dict[str, object] = {}
    exec(program.replace(ADDRESS, server.url), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert set(capsys.readouterr().out.split()) == {"Hello"}


@pytest.mark.parametrize(("path", "body"), CURLS)
def test_a_command(server: Running, path: str, body: str) -> None:
    with server.client() as client:
        assert client.post(path, json=json.loads(body)).status_code == 200


def test_it_names_every_path_and_only_options_there_are() -> None:
    assert len(PROGRAMS) == 2 and len(CURLS) == 2
    assert [path for path in ROUTES if path != "/" and path not in DOC] == []
    options = {"--help", *(name for option in serve_command.params for name in option.opts)}
    named = set(re.findall(r"`q35c serve[^`]*?(--[a-z-]+)|`(--[a-z-]+)", DOC))
    assert {name for pair in named for name in pair if name} <= options
