"""What surrounds a command: streams that are closed, full or of another encoding, no /proc, no home, hostile text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import q35c
from q35c.cli.options import unescaped
from q35c.cli.streams import say
from q35c.errors import InputError, OptionError, Q35CError, printable, shown
from tests.cli.conftest import SAYING, Run
from tests.fake_artifact import script, write_fake


def shell(line: str, artifact: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell in which $Q is the command line and $A an artifact."""
    names = {"Q": f"{sys.executable} -m q35c", "A": str(artifact)}
    return subprocess.run(
        ["bash", "-c", line], env={**os.environ, **names, **environment}, capture_output=True
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("$Q generate $A -n 2 <&-", "standard input is closed"),
        ("$Q generate $A Th >/dev/full", "cannot write to standard output: No space left"),
        ("$Q inspect $A >/dev/full", "cannot write to standard output: No space left"),
        ("$Q verify-file $A >/dev/full", "cannot write to standard output"),
        ("$Q generate $A Th >&-", "cannot write to standard output: Bad file descriptor"),
        ("$Q inspect $A --json >&-", "cannot write to standard output"),
    ],
)
def test_streams_that_fail_are_named(speaker: Path, line: str, said: str, unbuffered: str) -> None:
    done = shell(line, speaker, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    text = done.stderr.decode()
    assert text.startswith(f"error: {said}") and "bug" not in text and "Exception" not in text


@pytest.mark.parametrize(
    "line",
    [
        "$Q generate $A Th 2>&-",
        "$Q generate $A Th 2>/dev/full",
        "$Q generate $A Th 0<&- 2>&-",
        "PYTHONIOENCODING=latin-1 $Q generate $A Th",
        "PYTHONIOENCODING=ascii:strict $Q generate $A Th",
        "env -u HOME -u TMPDIR $Q generate $A Th",
        "TMPDIR=/nowhere HOME=/nowhere $Q generate $A Th",
        "LC_ALL=C $Q generate $A Th",
    ],
)
def test_what_does_not_matter(speaker: Path, line: str) -> None:
    done = shell(line, speaker)
    assert (done.returncode, done.stdout) == (0, b"e quick\n"), done.stderr


def test_a_closed_stream_is_no_file_of_ours(tmp_path: Path) -> None:
    """Whatever is opened after stderr was closed must not become what a library calls stderr."""
    write_fake(tmp_path / "m", bigram=script(SAYING))
    program = "import os, sys; from q35c.cli import main\ntry:\n main(['inspect', sys.argv[1]])\nexcept SystemExit: pass\nprint(os.readlink('/proc/self/fd/2'))"
    command = [
        "bash",
        "-c",
        'exec "$@" 2>&-',
        "-",
        sys.executable,
        "-c",
        program,
        str(tmp_path / "m"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "/dev/null"


def test_characters_that_the_terminal_lacks_are_replaced(tmp_path: Path) -> None:
    write_fake(tmp_path / "m", bigram=script("a→b"))
    done = shell("PYTHONIOENCODING=latin-1 $Q generate $A a", tmp_path / "m")
    assert (done.returncode, done.stdout) == (0, b"?b\n")


@pytest.mark.parametrize("line", ["'-5 degrees'", "'-now what'", "-5", "-n 2 '--- a rule'"])
def test_a_prompt_that_begins_with_a_dash(speaker: Path, line: str) -> None:
    done = shell(f"$Q generate $A {line}", speaker)
    assert done.returncode == 1 and b" -- " in done.stderr
    assert shell("$Q generate $A -n 1 -- '-5 degrees'", speaker).returncode == 0


def test_a_mistyped_option_gets_no_word_about_dashes(run: Run, speaker: Path) -> None:
    result = run("generate", speaker, "Th", "--sede", 5)
    assert "--seed" in result.stderr and "dash" not in result.stderr


@pytest.mark.parametrize("line", [[b"a\xff"], ["Th", "--stop", b"\xff"]])
def test_arguments_that_are_not_utf8(speaker: Path, line: list[Any]) -> None:
    command = [sys.executable, "-m", "q35c", "generate", str(speaker), *line]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 1 and b"not UTF-8" in done.stderr


def test_stop_strings_as_they_are_typed(run: Run, tmp_path: Path) -> None:
    write_fake(tmp_path / "m", bigram=script("Th\nend"))
    assert run("generate", tmp_path / "m", "T", "--stop", r"\n").stdout == "h\n"
    assert run("generate", tmp_path / "m", "T", "--stop", "\n").stdout == "h\n"
    assert r"\n" in run("generate", "--help").stdout
    assert unescaped(r"a\tb\\n\r\d") == "a\tb\\n\r\\d"


def test_tokens_without_a_limit(run: Run, tmp_path: Path) -> None:
    generation = {"stop_ids": []}
    from tests.fake_artifact import CONTEXT, GENERATION

    write_fake(tmp_path / "m", generation={**GENERATION, **generation})
    result = run("generate", tmp_path / "m", "a", "-n", -1)
    assert result.stderr.startswith("[context;") and f"new {CONTEXT} tokens" in result.stderr


def test_too_many_threads_are_a_warning(
    run: Run, speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("generate", speaker, "Th", "--threads", 5000)
    assert (result.exit_code, result.stdout) == (0, "e quick\n")
    assert result.stderr.startswith("warning: threads 5000 is too many: ")
    monkeypatch.setenv("Q35C_THREADS", "5000")
    assert run("generate", speaker, "Th").stderr.startswith(
        "warning: Q35C_THREADS 5000 is too many"
    )


def test_a_terminal_is_told_what_is_waited_for(speaker: Path) -> None:
    terminal, stdin = os.openpty()
    command = [sys.executable, "-m", "q35c", "generate", str(speaker)]
    with subprocess.Popen(command, stdin=stdin, stdout=-1, stderr=-1) as child:
        assert child.stderr is not None and child.stdout is not None
        assert child.stderr.readline().startswith(
            b"reading the text from the terminal: end it with Ctrl-D"
        )
        os.write(terminal, b"Th\n\x04")
        assert child.stdout.read() == b"e quick\n"
    os.close(terminal)
    os.close(stdin)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "ARTIFACT"], "q35c generate"),
        (["export", "ARTIFACT"], "it was compiled already"),
        (["verify", "ARTIFACT", "ARTIFACT"], "it was compiled already"),
        (["generate", ".", "x"], "compile the model in this directory first"),
        (["generate", "absent.q35c", "x"], "give the file that compiling has written"),
        (["compile", "qwen3.5-08b"], "did you mean 'qwen3.5-0.8b'?"),
        (["compile", "qwen"], "qwen3.5-397b-a17b"),
        (
            ["compile", "qwen3.5-0.8b", "--load-format", "dummy", "--precision", "w4-smal"],
            "'w4-small'?",
        ),
        (["compile", "qwen3.5-0.8b", "--load-format", "dummy", "--context", "0"], "--context: "),
        (["genrate"], "did you mean 'generate'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_newcomers_mistakes(
    run: Run,
    speaker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*[str(speaker) if word == "ARTIFACT" else word for word in arguments])
    assert result.exit_code == 1 and said.lower() in result.stderr.lower()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_gone(speaker: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd {tmp_path}/gone; rmdir {tmp_path}/gone; $Q compile . -o x.q35c", speaker)
    assert done.returncode == 1 and b"bug" not in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "error: the system refuses: No space left"),
        (FileNotFoundError(2, "No usable temporary directory found"), "No usable temporary"),
        (OSError("odd"), "the system refuses: odd"),
        (InputError("a\x1b]0;title\x07\r\x9b2J\u202e"), r"a\x1b]0;title\x07\r\x9b2J\u202e"),
        (ValueError("x" * 10**7), "xxx … xxx"),
        (InputError("bad", got="one\nerror: two"), "one\n    error: two"),
    ],
    ids=["full", "no TMPDIR", "no errno", "escapes", "megabytes", "lines"],
)
def test_messages_are_printable_and_short(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(q35c, "load", load)
    text = run("generate", "x.q35c", "x").stderr
    assert said in text and len(text) < 4000
    assert all(character.isprintable() or character == "\n" for character in text)


def test_any_object_can_be_shown() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown([10**5000]) == "[an integer of 16610 bits]"
    assert "Hostile instance" in shown(Hostile())
    assert (shown(1.5), shown(True), shown(""), shown(None)) == ("1.5", "True", "''", "None")
    assert len(shown([*range(10**6)])) < 200 and len(shown(b"x" * 10**6)) < 100
    assert printable("a\udcffb") == r"a\udcffb"


def test_an_error_keeps_its_parts_when_it_is_copied() -> None:
    import pickle

    error = OptionError("bad", where="threads", expected="1", got=2, hint="less")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (OptionError, str(error))
    assert isinstance(copy, Q35CError) and copy.where == "threads"


def test_say_names_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(InputError, match="standard output: No space"):
            say("x")


def test_without_proc_or_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from q35c.user_cache import cache_directory

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OptionError, match="XDG_CACHE_HOME"):
        cache_directory()
