"""Pictures and clips on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.seeing import seeing_model, seeing_place
from tests.vision.clips import kind
from tests.vision.pictures import encoded, photo

GREEDY = ("--temperature", 0, "-n", 5)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(photo(64, 96), "PNG"))
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(kind("three frames"))
    return path


def test_generate_asks_about_pictures_and_clips(run: Run, picture: Path, video: Path) -> None:
    shown = ("--image", picture, "--image", picture, "--video", video)
    made = json.loads(run("generate", seeing_place(), "What?", *shown, *GREEDY, "--json").stdout)
    asked = [{"role": "user", "content": "What?"}]
    model = seeing_model()
    prompt = model.encode_chat(asked, images=[picture, picture], videos=[video])
    want = model.generate(prompt, 5, temperature=0)
    assert (made["ids"], made["prompt_tokens"]) == (list(want.ids), len(prompt))


def test_a_raw_prompt_shows_them_before_its_text(run: Run, picture: Path) -> None:
    result = run(
        "generate", seeing_place(), "--raw", "What?", "--image", picture, *GREEDY, "--json"
    )
    want = seeing_model().generate("What?", 5, images=[picture], temperature=0)
    assert json.loads(result.stdout)["ids"] == list(want.ids)


@pytest.mark.parametrize(
    ("option", "words"), [("--image", "no picture"), ("--video", "cannot be decoded")]
)
def test_generate_names_the_file_that_it_cannot_show(
    run: Run, tmp_path: Path, option: str, words: str
) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("Dear")
    result = run("generate", seeing_place(), "What?", option, text)
    assert result.exit_code == 1 and f"{text}: " in result.stderr and words in result.stderr
    missing = run("generate", seeing_place(), "What?", option, tmp_path / "nowhere")
    assert missing.exit_code == 1 and "no such file" in missing.stderr


def test_a_model_of_text_sees_nothing(run: Run, speaker: Path, picture: Path) -> None:
    result = run("generate", speaker, "Th", "--image", picture)
    assert result.exit_code == 1
    assert f"{picture}: the model takes in text alone" in result.stderr


def test_chat_shows_a_picture_with_the_next_message(
    run: Run, picture: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "talk.json"
    said = (f"/image {picture}", "What?", f"/save {kept}", "And now?")
    result = run("chat", seeing_place(), *GREEDY, stdin="".join(f"{line}\n" for line in said))
    assert result.exit_code == 0, result.stderr
    assert "your next message shows it" in result.stderr
    messages = json.loads(kept.read_text())
    image, text = messages[0]["content"]
    assert text == {"type": "text", "text": "What?"} and image["type"] == "image"
    model = seeing_model()
    asked = [{"role": "user", "content": "What?"}]
    want = model.chat(asked, images=[picture], temperature=0, max_new_tokens=5)
    assert messages[1]["content"] == want.content
    again = run("chat", seeing_place(), *GREEDY, "--load", kept, stdin="And now?\n")
    assert again.exit_code == 0, again.stderr
    lines = result.stdout.split("\n")
    assert len(lines) == 3 and again.stdout.split("\n") == lines[1:]


def test_undo_shows_it_again(run: Run, picture: Path, tmp_path: Path) -> None:
    kept = tmp_path / "talk.json"
    said = (f"/image {picture}", "What?", "/undo", "Which?", f"/save {kept}")
    result = run("chat", seeing_place(), *GREEDY, stdin="".join(f"{line}\n" for line in said))
    assert result.exit_code == 0 and "taken back: What?" in result.stderr
    parts = json.loads(kept.read_text())[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"] and parts[1]["text"] == "Which?"


@pytest.mark.parametrize(
    ("command", "words"), [("/image", "no picture"), ("/video", "cannot be decoded")]
)
def test_chat_names_the_file_that_it_cannot_show(
    run: Run, tmp_path: Path, command: str, words: str
) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("Dear")
    result = run("chat", seeing_place(), stdin=f"{command} {text}\n")
    assert result.exit_code == 1 and f"{text}: " in result.stderr and words in result.stderr


def test_chat_with_a_model_of_text_refuses(run: Run, speaker: Path, picture: Path) -> None:
    from tests.chatting import lines, write_chat

    path = picture.with_name("m.q35c")
    write_chat(path, lines("x"), lines("y"), context=512)
    result = run("chat", path, stdin=f"/image {picture}\n")
    assert result.exit_code == 1 and "takes in text alone" in result.stderr
