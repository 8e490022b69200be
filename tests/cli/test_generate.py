"""`q35c generate`: text to standard output, figures to standard error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.fake_artifact import script, write_fake

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
