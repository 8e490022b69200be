"""`q35c tokenize` and `q35c perplexity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.fake_artifact import VOCAB, write_fake


def test_tokens_of_a_text(run: Run, speaker: Path) -> None:
    result = run("tokenize", speaker, "a é")
    assert result.exit_code == 0 and "| 'a'" in result.stdout and " 97 |" in result.stdout
    assert result.stdout.endswith("\n4 tokens, 3 characters, 4 bytes\n")
    assert run("tokenize", speaker, "a b", "--ids").stdout == "97 32 98\n"
    made = json.loads(run("tokenize", speaker, "a<|im_end|>", "--json").stdout)
    assert made == {"ids": [97, 257], "pieces": ["a", "<|im_end|>"]}


def test_tokens_of_files_and_standard_input(run: Run, speaker: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab\n")
    assert run("tokenize", speaker, "--ids", "--file", path).stdout == "97 98 10\n"
    assert run("tokenize", speaker, "--ids", stdin="ab\n").stdout == "97 98\n"
    assert run("tokenize", speaker, "--ids", stdin="").stdout == "\n"
    refused = run("tokenize", speaker, stdin=b"\xff")
    assert refused.exit_code == 1 and "not UTF-8" in refused.stderr


def test_no_code_is_needed_to_tokenize(run: Run, tmp_path: Path) -> None:
    write_fake(tmp_path / "m.q35c", with_code=False)
    assert run("tokenize", tmp_path / "m.q35c", "a", "--ids").stdout == "97\n"
    write_fake(tmp_path / "n.q35c", segments={})
    refused = run("tokenize", tmp_path / "n.q35c", "a")
    assert refused.exit_code == 1 and "no tokenizer" in refused.stderr


def test_perplexity_of_a_text(run: Run, tmp_path: Path) -> None:
    write_fake(tmp_path / "m.q35c", noise=0.0001)  # all tokens alike
    path = tmp_path / "text.txt"
    path.write_text("hello " * 100)
    result = run("perplexity", tmp_path / "m.q35c", path, "--threads", 1)
    assert result.exit_code == 0 and result.stdout.startswith("perplexity 269.99")
    assert "599 tokens at" in result.stdout and "bits a byte" in result.stdout
    made = json.loads(
        run("perplexity", tmp_path / "m.q35c", "-", "--window", 64, "--json", stdin="abc").stdout
    )
    assert made["perplexity"] == pytest.approx(VOCAB, rel=1e-3)
    assert (made["tokens"], made["window"], made["text_bytes"]) == (2, 64, 2)


@pytest.mark.parametrize(
    ("options", "text", "said"),
    [
        ((), "a", "too short"),
        (("--window", "1"), "abc", "--window"),
        (("--window", "999"), "abc", "--window"),
        (("--threads", "0"), "abc", "--threads"),
    ],
)
def test_refused_texts(
    run: Run, speaker: Path, options: tuple[str, ...], text: str, said: str
) -> None:
    result = run("perplexity", speaker, "-", *options, stdin=text)
    assert result.exit_code == 1 and said in result.stderr
    missing = run("perplexity", speaker, "/nowhere/text")
    assert missing.exit_code == 1 and "cannot be read" in missing.stderr
