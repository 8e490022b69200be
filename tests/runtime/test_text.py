"""Tokens to text piece by piece, and stop strings: nothing torn, nothing leaked, nothing lost."""

from __future__ import annotations

import random

import pytest

from q35c.errors import OptionError, TokenizerError
from q35c.runtime.tokenizer import StopScanner, TextStream, Tokenizer, check_stops
from tests.fake_artifact import END, tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer())


def stream(tokens: list[int], backend: Tokenizer) -> list[str]:
    text = TextStream(backend)
    return [*(text.push(token) for token in tokens), text.finish()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "wörld",
        "日本語",
        "a🙂b",
        "👨‍👩‍👧‍👦",
        "\ufffd",
        "a\ufffd\ufffdb",
        "e\u0301",
        "\0\r\n",
    ],
)
def test_pieces_are_whole_characters(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    assert ids == list(text.encode())  # one token per byte: the hardest case
    pieces = stream(ids, byte_tokenizer)
    assert "".join(pieces) == text == byte_tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_appears_with_its_last_token(byte_tokenizer: Tokenizer) -> None:
    assert stream(list("a🙂b".encode()), byte_tokenizer) == ["a", "", "", "", "🙂", "b", ""]


def test_random_bytes_add_up_to_the_whole_text(byte_tokenizer: Tokenizer) -> None:
    seed = 3
    random.seed(seed)
    for case in range(400):
        alphabet = random.choice(
            [
                range(256),
                range(128, 256),
                [0xE2, 0x82, 0xAC],
                [0xF0, 0x9F, 0x99, 0x82, 65],
                [255, 65],
            ]
        )
        ids = random.choices(list(alphabet), k=random.choice((1, 5, 40, 90)))
        pieces = stream(ids, byte_tokenizer)
        assert "".join(pieces) == byte_tokenizer.decode(ids), f"seed {seed}, case {case}: {ids}"


def test_an_endless_run_of_broken_bytes_flows(byte_tokenizer: Tokenizer) -> None:
    text = TextStream(byte_tokenizer)
    lengths = [len(text.push(255)) for _ in range(200)]
    assert sum(lengths) >= 199 and max(lengths[1:]) == 1
    assert len(text._ids) <= 17  # the work per token stays bounded


def test_special_tokens_add_nothing(byte_tokenizer: Tokenizer) -> None:
    assert "".join(stream([72, END, 105, END], byte_tokenizer)) == "Hi"
    assert byte_tokenizer.decode([END], skip_special_tokens=False) == "<|endoftext|>"


def naive(text: str, stops: list[str]) -> str:
    """Cut before the stop string that ends first; of two that end together, before the longer."""
    places = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(places)[1]] if places else text


def test_stop_scanner_equals_searching_the_whole_text() -> None:
    seed = 4
    random.seed(seed)
    for case in range(3000):
        letters = "ab" if case % 2 else "abc"
        text = "".join(random.choices(letters, k=random.randrange(25)))
        stops = [
            "".join(random.choices(letters, k=random.randint(1, 5)))
            for _ in range(random.randint(1, 3))
        ]
        scanner, got, rest = StopScanner(stops), "", text
        while rest and scanner.found is None:
            size = random.randint(1, 4)
            got += scanner.push(rest[:size])
            rest = rest[size:]
            # What is out must be right already: nothing of a stop string, nothing of what follows it.
            assert naive(text, stops).startswith(got), f"seed {seed}, case {case}: {text} {stops}"
        if scanner.found is None:
            got += scanner.finish()
        else:
            assert scanner.found in stops
        assert got == naive(text, stops), f"seed {seed}, case {case}: {text} {stops}"


def test_stop_scanner_holds_no_more_than_it_must() -> None:
    scanner = StopScanner(["STOP"])
    assert [scanner.push(piece) for piece in ("a S", "TO", "x", "ST", "OP!")] == [
        "a ",
        "",
        "STOx",
        "",
        "",
    ]
    assert scanner.found == "STOP"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["x" * 1001], [1], ["a"] * 65])
def test_stops_are_checked(stop: object) -> None:
    with pytest.raises(OptionError):
        check_stops(stop)  # type: ignore[arg-type]


def test_stops_of_any_form() -> None:
    assert check_stops(None) == () and check_stops("ab") == ("ab",) and check_stops(["a"]) == ("a",)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"model": {"type": "BPE"}}',
        b'{"version": "1.0", "model": {"type": "Unknown"}}',
        tokenizer()[:-30],
        tokenizer().replace(b'"BPE"', b'"WordPiece"'),
    ],
)
def test_a_broken_tokenizer_is_a_tokenizer_error(document: bytes) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(document)


@pytest.mark.parametrize("text", ["\ud800", 5, None, b"x"])
def test_text_that_cannot_be_encoded(byte_tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(TokenizerError):
        byte_tokenizer.encode(text)  # type: ignore[arg-type]
