"""`q35c chat` over pipes: a message a line, commands, and what is kept of a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chatting import BLANK, CALLED, CLOSE, NOW, lines, write_chat
from tests.cli.conftest import Run
from tests.fake_artifact import GENERATION

HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks "hm", says "Yes." and calls; without thinking it says "No!"."""
    script = lines("\nhm", CLOSE, BLANK, "Yes.", CALLED)
    path = tmp_path_factory.mktemp("talker") / "m.q35c"
    return write_chat(path, script, lines("~No!"), context=512)


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every token depends on the whole past, and on the seed."""
    generation = {**GENERATION, "do_sample": True, "stop_ids": []}
    path = tmp_path_factory.mktemp("babbler") / "m.q35c"
    return write_chat(path, noise=8.0, generation=generation, context=512)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([NOW]))
    return path


def chat(run: Run, model: Path, *said: str, options: Any = ()) -> tuple[list[str], str]:
    """Return the lines of the answers, and what was said beside them."""
    result = run("chat", model, *options, stdin="".join(f"{line}\n" for line in said))
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


def saved(path: Path) -> list[dict[str, Any]]:
    assert path.stat().st_mode & 0o777 == 0o600
    return json.loads(path.read_text())


def test_every_line_is_a_message(run: Run, talker: Path) -> None:
    answers, said = chat(run, talker, "a" * 40, "", "b", "//c", options=("--think", "off"))
    assert answers == ["No!"] * 3
    assert said.count("[stop; prompt ") == 3 and "\x1b" not in said
    assert "new 4 tokens at" in said and " 64 cached" in said


def test_a_block_is_one_message(run: Run, talker: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    block = ['"""', "first", "", " second", '"""']
    chat(run, talker, "/think off", *block, f"/save {path}")
    assert saved(path)[0] == {"role": "user", "content": "first\n\n second"}
    result = run("chat", talker, stdin='"""\nno end\n')
    assert result.exit_code == 1 and "has no end" in result.stderr


def test_reasoning_is_kept_and_not_written(run: Run, talker: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    answers, _ = chat(run, talker, "a", f"/save {path}", options=("--system", "Be kind."))
    assert answers[0].startswith("Yes.<tool_call>")
    system, user, answer = saved(path)
    assert system == {"role": "system", "content": "Be kind."}
    assert user["content"] == "a" and answer["reasoning_content"] == "hm"


def test_what_follows_a_call_is_its_result(run: Run, talker: Path, tools: Path) -> None:
    path = tools.with_name("talk.json")
    said = (
        f"/tools {tools}",
        "a",
        "noon",
        f"/save {path}",
        "/tools off",
        "/think off",
        "late",
        "b",
    )
    answers, beside = chat(run, talker, *said)
    assert answers[:2] == ["Yes.", 'now({"zone": "UTC"})'] and "1 tools" in beside
    _, call, result, _ = saved(path)
    assert result["content"] == "noon"
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    assert call["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert answers[-2:] == ["No!", "No!"]


def test_options_offer_tools_and_load_conversations(run: Run, talker: Path, tools: Path) -> None:
    path = tools.with_name("talk.json")
    path.write_text(json.dumps([{"role": "developer", "content": "Be kind."}, HELLO]))
    options = ("--tools", tools, "--load", path)
    answers, _ = chat(run, talker, f"/save {path}", options=options)
    assert answers == ["Yes.", 'now({"zone": "UTC"})']
    assert [message["role"] for message in saved(path)] == ["system", "user", "assistant"]


def test_a_conversation_is_resumed(run: Run, babbler: Path, tmp_path: Path) -> None:
    """A second run goes on from the first, computes what is new alone, and says what one run says."""
    options = ("--seed", "3", "-n", "20", "--think", "off")
    place, whole = tmp_path / "deep" / "trip", tmp_path / "talk.json"
    chat(run, babbler, "x" * 60, "b", f"/save {whole}", options=options)
    chat(run, babbler, "x" * 60, options=(*options, "--resume", place))
    _, said = chat(run, babbler, "b", options=(*options, "--resume", place))
    assert saved(place / "messages.json") == saved(whole) and " 64 cached" in said
    assert (place.stat().st_mode & 0o077) == 0


def test_a_directory_that_cannot_keep_a_conversation(
    run: Run, babbler: Path, tmp_path: Path
) -> None:
    place = tmp_path / "file"
    place.write_text("")
    result = run("chat", babbler, "--resume", place, stdin="a\n")
    assert result.exit_code == 1 and result.stdout == "" and str(place) in result.stderr


def test_an_answer_taken_back_comes_again(run: Run, babbler: Path, tmp_path: Path) -> None:
    """After /undo the same is said to the same conversation, bit for bit; /regen draws anew."""
    options = ("--seed", "3", "-n", "20", "--think", "off")
    long = "x" * 60

    def said(*lines: str) -> list[str]:
        path = tmp_path / "talk.json"
        chat(run, babbler, *lines, f"/save {path}", options=options)
        return [message["content"] for message in saved(path)]

    plain, other = said(long, "b"), said(long, "c")
    assert plain[:2] == other[:2] and plain[3] != other[3]
    assert said(long, "b", "/undo", "b") == plain
    assert said(long, "b", "/undo", "c", "/undo", "b") == plain
    again = said(long, "b", "/regen")
    assert again[:3] == plain[:3] and again[3] != plain[3]
    assert said(long, "b", "/undo", "/undo") == []


def test_reset_and_system(run: Run, talker: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    _, said = chat(
        run, talker, "/think off", "/system Be kind.", "a", "/reset", "b", "/stats", f"/save {path}"
    )
    assert [message["content"] for message in saved(path)] == ["Be kind.", "b", "No!"]
    assert "3 messages, 2 answers" in said and "of 512 tokens of context" in said


def test_help_lists_every_command(run: Run, talker: Path) -> None:
    from q35c.cli.talk_commands import COMMANDS

    answers, said = chat(run, talker, "/help", "/exit", "never read")
    assert answers == [] and all(f"\n{name}" in f"\n{said}" for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/helpp", "did you mean '/help'?"),
        ("/save", "/save FILE"),
        ("/undo 3", "expected: /undo"),
        ("/undo", "nothing was said yet"),
        ("/regen", "nothing was said yet"),
        ("/load /nowhere/x.json", "cannot be read"),
        ("/tools /nowhere/x.json", "cannot be read"),
        ("/save /nowhere/x.json", "no such directory"),
        ("/think maybe", "on, off"),
        ("x" * 600, "longer than the context"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_refused_line_ends_it(run: Run, talker: Path, line: str, said: str) -> None:
    result = run("chat", talker, stdin=f"{line}\nhello\n".encode(errors="surrogateescape"))
    assert result.exit_code == 1 and said in result.stderr and result.stdout.strip() == ""


@pytest.mark.parametrize(
    "content", ["{", "[]", '[{"role": "robot"}]', '{"a": 1}', '[{"role": "user", "content": 5}]']
)
def test_files_that_are_no_conversation(
    run: Run, talker: Path, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    result = run("chat", talker, "--load", path)
    assert result.exit_code == 1 and result.stderr.startswith("error: ")


@pytest.mark.parametrize("content", ["{", "5", "[5]", '[{"type": "function"}]'])
def test_files_that_are_no_tools(run: Run, talker: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    result = run("chat", talker, "--tools", path)
    assert result.exit_code == 1 and result.stderr.startswith("error: ")


def test_an_artifact_without_a_template(run: Run, tmp_path: Path) -> None:
    from tests.fake_artifact import tokenizer, write_fake

    write_fake(tmp_path / "m.q35c", segments={"tokenizer": tokenizer()})
    result = run("chat", tmp_path / "m.q35c", stdin="a\n")
    assert result.exit_code == 1 and "no chat template" in result.stderr


def test_quiet_says_nothing_beside(run: Run, talker: Path) -> None:
    assert chat(run, talker, "a", options=("--quiet", "--think", "off")) == (["No!"], "")


def test_what_a_terminal_would_obey_is_left_out(run: Run, tmp_path: Path) -> None:
    path = write_chat(tmp_path / "m.q35c", lines("~\x1b[3\tx\x07"))
    assert chat(run, path, "a", options=("--think", "off"))[0] == ["[3\tx"]


def test_a_full_context_is_said_so(run: Run, babbler: Path) -> None:
    _, said = chat(run, babbler, "x" * 450, options=("--think", "off", "--seed", "1"))
    assert "[context; " in said and "/reset begins anew" in said
