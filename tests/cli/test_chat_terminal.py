"""`q35c chat` at a terminal: streams, Ctrl-C, commands, pasted lines, a history of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chatting import BLANK, CALLED, CLOSE, NOW, lines, write_chat
from tests.cli.terminals import Typist

PROMPT = "> "
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = lines("\nhm", CLOSE, BLANK, "Yés.", CALLED)
    path = tmp_path_factory.mktemp("talker") / "m.q35c"
    return write_chat(path, script, lines("~No!"), context=512)


@pytest.fixture
def typist(talker: Path, tmp_path: Path) -> Iterator[Typist]:
    """Somebody at a terminal at which `q35c chat` has begun."""
    with Typist("chat", talker, environment={"XDG_CACHE_HOME": str(tmp_path)}) as typist:
        typist.wait_for("/help lists commands")
        typist.wait_for(PROMPT)
        yield typist


def test_reasoning_is_dimmed(typist: Typist) -> None:
    typist.type("hällo\n")
    shown = typist.wait_for("tok/s]")
    assert f"{ESCAPE}[2mhm{ESCAPE}[0m\r\n\r\nYés." in shown
    typist.wait_for(PROMPT)
    typist.type("\x04")
    assert typist.wait_for_end() == 0


def test_a_resized_terminal_and_wrong_lines_end_nothing(typist: Typist) -> None:
    typist.resize(10, 20)
    for line, said in (
        ("/nonsense", "unknown command"),
        ("/load /nowhere", "cannot be read"),
        ("x" * 600, "longer than"),
        ("/undo", "nothing was said yet"),
    ):
        typist.type(f"{line}\n")
        typist.wait_for(said)
        typist.wait_for(PROMPT)
    typist.type("/exit\n")
    assert typist.wait_for_end() == 0


def test_pasted_lines_are_one_message(typist: Typist, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    typist.type(f"/think off\n{ESCAPE}[200~first\nsecond é{ESCAPE}[201~\n")
    typist.wait_for("tok/s]")
    typist.type(f"/save {path}\n")
    typist.wait_for("saved 2 messages")
    assert json.loads(path.read_text())[0]["content"] == "first\nsecond é"


def test_results_of_calls_are_asked_for(typist: Typist, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([NOW]))
    typist.type(f"/tools {path}\n")
    typist.wait_for("1 tools")
    typist.type("hi\n")
    typist.wait_for('Yés.\r\nnow({"zone": "UTC"})\r\n')
    typist.wait_for("now = ")
    typist.type("noon\n")
    typist.wait_for("tok/s]")


def test_lines_are_kept_for_their_user_alone(typist: Typist, talker: Path, tmp_path: Path) -> None:
    typist.type("/think off\nremember me\n")
    typist.wait_for("tok/s]")
    typist.type("/exit\n")
    assert typist.wait_for_end() == 0
    path = tmp_path / "q35c" / "chat-history"
    assert "remember me" in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    with Typist("chat", talker, environment={"XDG_CACHE_HOME": str(tmp_path)}) as later:
        later.wait_for(PROMPT)
        later.type(f"{ESCAPE}[A{ESCAPE}[A")
        later.wait_for("remember me")


def test_colour_may_be_refused(talker: Path, tmp_path: Path) -> None:
    environment = {"NO_COLOR": "1", "XDG_CACHE_HOME": str(tmp_path)}
    with Typist("chat", talker, environment=environment) as typist:
        typist.wait_for(PROMPT)
        typist.type("hi\n")
        assert f"{ESCAPE}[2m" not in typist.wait_for("tok/s]")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says a, b, c for ever (to the end of a long context)."""
    path = tmp_path_factory.mktemp("endless") / "m.q35c"
    return write_chat(path, lines("~abcdefgh"), is_endless=True, context=1 << 16)


def test_ctrl_c_ends_the_answer_and_not_the_program(endless: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    options = ("--think", "off", "--threads", "1")
    with Typist("chat", endless, *options, environment={"XDG_CACHE_HOME": str(tmp_path)}) as typist:
        typist.wait_for(PROMPT)
        typist.type("hi\n")
        typist.wait_for("abcdefghabc")
        typist.type("\x03")
        typist.wait_for("[cancelled; ")
        typist.wait_for(PROMPT)
        typist.type("half a line")
        typist.wait_for("half a line")
        typist.interrupt_line(PROMPT)  # the line is taken back
        typist.type(f"/save {path}\n")
        typist.wait_for("saved 2 messages")
        user, answer = json.loads(path.read_text())
        assert user["content"] == "hi" and answer["content"].startswith("abcdefghabc")
        typist.wait_for(PROMPT)
        typist.type("go on\n")
        typist.wait_for("abcdefghabc")
        typist.type("\x03")
        typist.wait_for("[cancelled; ")
        typist.wait_for(PROMPT)
        typist.type("/exit\n")
        assert typist.wait_for_end() == 0
