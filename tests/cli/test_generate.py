"""`q35c generate`: text to standard output, figures to standard error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chatting import CLOSE, lines, write_chat
from tests.cli.conftest import Run
from tests.fake_artifact import CONTEXT, END, GENERATION, script, write_fake

REST = "e quick\n"


def test_text_and_figures(run: Run, speaker: Path) -> None:
    result = run("generate", speaker, "Th", "--threads", 1)
    assert (result.exit_code, result.stdout) == (0, REST)
    assert result.stderr.startswith("[stop; load ")
    assert "prompt 2 tokens" in result.stderr
    assert "new 8 tokens" in result.stderr  # seven bytes and the stop id


@pytest.mark.parametrize("arguments", [["-"], []], ids=["dash", "nothing"])
def test_prompt_from_standard_input(run: Run, speaker: Path, arguments: list[str]) -> None:
    result = run("generate", speaker, *arguments, stdin="Th\n")
    assert (result.exit_code, result.stdout) == (0, REST)


@pytest.mark.parametrize("options", [(), ("--chat", "--think", "on")], ids=["raw", "chat"])
def test_the_text_obeys_a_schema(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    generation = {**GENERATION, "do_sample": True}
    model = write_chat(tmp_path / "m.q35c", noise=8.0, generation=generation, context=512)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["yes", "no"]}))
    said = run(
        "generate", model, *options, "Th", "--json-schema", schema, "--seed", 1, "-n", 400, "--json"
    )
    assert said.exit_code == 0, said.stderr
    made = json.loads(said.stdout)
    text = made["text"].rpartition("</think>")[2]
    assert json.loads(text) in ("yes", "no") and made["finish_reason"] == "stop"


@pytest.mark.parametrize("text", ["{", '{"type": "nothing"}'])
def test_what_is_no_schema_is_refused(run: Run, speaker: Path, tmp_path: Path, text: str) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(text)
    said = run("generate", speaker, "Th", "--json-schema", schema)
    assert said.exit_code == 1 and said.stdout == "" and str(schema) in said.stderr


def test_limits_and_stops(run: Run, speaker: Path) -> None:
    short = run("generate", speaker, "Th", "-n", 3)
    assert short.stdout == "e q\n"
    assert short.stderr.startswith("[length;")
    stopped = run("generate", speaker, "Th", "--stop", "qu", "--stop", "zzz")
    assert stopped.stdout == "e \n"


def test_seed_decides_the_text(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "dice.q35c"
    write_fake(path)  # all bytes alike
    options = ("--temperature", 1.0, "-n", 30)
    texts = [run("generate", path, "a", *options, "--seed", seed).stdout for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [run("generate", path, "a", "--temperature", 0, "--seed", seed) for seed in (7, 8)]
    assert greedy[0].stdout == greedy[1].stdout


def test_chat_wraps_the_prompt(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "polite.q35c"
    # The template's last byte is the space of "assistant: ".
    write_fake(path, bigram=script(" Yes"))
    assert run("generate", path, "Hi?", "--chat").stdout == "Yes\n"
    assert run("generate", path, "Hi?", "-n", 1).stdout != "Y\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ((), b"\xff\xfe", "not UTF-8"),
        ((), b"", "no tokens"),
        (("x" * 300,), b"", "longer than the context"),
        (("x", "--context", "100000"), b"", "--context"),
        (("x", "--threads", "0"), b"", "--threads"),
        (("x", "--top-p", "2"), b"", "--top-p"),
        (("x", "--seed", "-1"), b"", "--seed"),
        (("x", "-n", "0"), b"", "--max-new-tokens"),
    ],
    ids=lambda value: value[-1][:10] if isinstance(value, tuple) and value else None,
)
def test_refused_input(
    run: Run, speaker: Path, arguments: tuple[str, ...], stdin: bytes, said: str
) -> None:
    result = run("generate", speaker, *arguments, stdin=stdin)
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_prompt_from_a_file(run: Run, speaker: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Th\n")
    assert run("generate", speaker, "--prompt-file", path).stdout == REST
    both = run("generate", speaker, "Th", "--prompt-file", path)
    assert both.exit_code == 1 and "a text and a file are given" in both.stderr
    missing = run("generate", speaker, "--prompt-file", tmp_path / "none")
    assert missing.exit_code == 1 and "cannot be read" in missing.stderr


def test_json_holds_text_ids_and_figures(run: Run, speaker: Path) -> None:
    result = run("generate", speaker, "Th", "--json", "--quiet", "--seed", 4)
    assert (result.exit_code, result.stderr) == (0, "")
    made = json.loads(result.stdout)
    assert made["text"] == "e quick" and made["ids"] == [*b"e quick", END]
    assert (made["finish_reason"], made["stop"], made["seed"]) == ("stop", END, 4)
    assert (made["prompt_tokens"], made["new_tokens"]) == (2, 8)


def test_no_limit_and_no_figures(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "endless.q35c"
    write_fake(path, bigram=script("ab"), noise=0.01, generation={**GENERATION, "stop_ids": []})
    result = run("generate", path, "a", "-n", -1, "--quiet", "--json")
    made = json.loads(result.stdout)
    assert made["finish_reason"] == "context" and made["new_tokens"] == CONTEXT
    assert result.stderr == ""


def test_escapes_in_stop_strings(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lines.q35c"
    write_fake(path, bigram=script("ab\nc\\d"))
    assert run("generate", path, "a", "--stop", r"\n").stdout == "b\n"
    assert run("generate", path, "a", "--stop", r"\\").stdout == "b\nc\n"
    assert run("generate", path, "a", "--stop", r"\d").stdout == "b\nc\n"


def test_the_system_speaks_and_thinking_may_be_off(run: Run, tmp_path: Path) -> None:
    path = write_chat(tmp_path / "m.q35c", lines("\nhm", CLOSE), lines("~No!"))
    assert run("generate", path, "Hi", "--chat").stdout == "hm</think>\n"
    quiet = run("generate", path, "Hi", "--chat", "--think", "off", "--system", "Be brief.")
    assert quiet.stdout == "No!\n"
    assert f"prompt {len('system:Be brief.user:Hi~') + 3} tokens" in quiet.stderr
    for option, value in (("--think", "off"), ("--system", "x")):
        refused = run("generate", path, "Hi", option, value)
        assert refused.exit_code == 1 and f"{option}: belongs to --chat" in refused.stderr
