"""Pictures and clips in messages: which parts show something, and what a text may name."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q35c.errors import MediaError, OptionError
from q35c.runtime.attachments import Attachment, attach, show, take_attachments
from q35c.runtime.chat.normalise import normalise
from q35c.vision.clips import Clip

DATA = b"not a picture yet"
URL = "data:image/png;base64," + base64.b64encode(DATA).decode()
ARRAY = np.zeros((4, 4, 3), np.uint8)
PLACE, CLIP = {"type": "image"}, {"type": "video"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, DATA),
        ({"type": "image_url", "image_url": URL}, DATA),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, DATA),
        ({"type": "image", "image": URL}, DATA),
        ({"type": "image", "url": URL}, DATA),
        ({"image": DATA}, DATA),
        ({"type": "image", "image": ARRAY}, ARRAY),
        ({"type": "image", "image": Path("x.png")}, Path("x.png")),
        ({"type": "image", "image": "data:;base64,AAAA"}, b"\0\0\0"),
        ({"type": "image", "image": "DATA:image/svg+xml;charset=utf-8;BASE64,AAAA"}, b"\0\0\0"),
    ],
)
def test_parts_that_show_a_picture(part: dict[str, Any], source: Any) -> None:
    messages = [{"role": "system", "content": "Hi"}, user({"type": "text", "text": "What?"}, part)]
    made, found = take_attachments(messages)
    assert made == [messages[0], user({"type": "text", "text": "What?"}, PLACE)]
    (attachment,) = found
    assert attachment.source is source or attachment.source == source
    assert attachment == Attachment(attachment.source, False, "messages[1].content[1]")


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "video", "video": DATA}, DATA),
        ({"type": "video_url", "video_url": {"url": URL.replace("image/png", "video/mp4")}}, DATA),
        ({"type": "video", "video": [URL, ARRAY]}, [DATA, ARRAY]),
        ({"type": "video", "video": Clip([URL], 3.0)}, Clip([DATA], 3.0)),
    ],
)
def test_parts_that_show_a_clip(part: dict[str, Any], source: Any) -> None:
    made, found = take_attachments([user(part)])
    assert made == [user(CLIP)]
    assert found == [Attachment(source, True, "messages[0].content[0]")]


def test_they_come_in_order() -> None:
    first, second = {"type": "image", "image": b"1"}, {"type": "video", "video": b"2"}
    _, found = take_attachments([user(first, second), {"role": "tool", "content": [first]}])
    assert [one.source for one in found] == [b"1", b"2", b"1"]
    assert found[2].where == "messages[1].content[0]"


@pytest.mark.parametrize(
    "text",
    [
        "photo.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/x",
        "data:image/png,x",
        "",
        "https://example.org/a.png",
    ],
)
def test_a_text_in_a_message_is_a_data_url_or_refused(text: str) -> None:
    for part in (
        {"type": "image", "image": text},
        {"type": "image_url", "image_url": {"url": text}},
        {"type": "video", "video": [text]},
        {"type": "image", "image": Attachment(text, False, "messages[0].content[0]")},
    ):
        with pytest.raises(MediaError, match=r"messages\[0\].content\[0\].*only data URLs"):
            take_attachments([user(part)])


def test_a_caller_may_let_texts_name_files_but_not_addresses() -> None:
    _, found = take_attachments([user({"type": "image", "image": "photo.jpg"})], allow_files=True)
    assert found[0].source == Path("photo.jpg")
    for address in ("http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png,x"):
        with pytest.raises(MediaError, match="addresses are not fetched"):
            take_attachments([user({"type": "image", "image": address})], allow_files=True)


def test_a_data_url_that_is_none() -> None:
    with pytest.raises(MediaError, match="base64"):
        take_attachments([user({"type": "image", "image": "data:image/png;base64,AAA"})])
    with pytest.raises(MediaError, match="base64"):
        take_attachments([user({"type": "image", "image": "data:image/png;base64,A A="})])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, "shows nothing"),
        ({"type": "image_url", "image_url": {}}, "shows nothing"),
        ({"type": "video", "video": None}, "shows nothing"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "does not hear"),
    ],
)
def test_parts_that_show_nothing(part: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        take_attachments([user({"type": "text", "text": "x"}, part)])
    assert caught.value.where == "messages[0].content[1]"


def test_text_and_what_is_no_message_stay() -> None:
    messages = ["x", user({"type": "text", "text": "y"}), {"role": "user", "content": "z"}]
    assert take_attachments(messages) == (messages, [])


def test_what_a_caller_attaches_is_named_by_its_number() -> None:
    found = attach(["a.png", URL, ARRAY], "images", is_clip=False)
    assert [one.where for one in found] == ["images[0]", "images[1]", "images[2]"]
    assert [one.source for one in found[:2]] == [Path("a.png"), DATA]
    for wrong in ("a.png", b"x", 7):
        with pytest.raises(OptionError, match="images"):
            attach(wrong, "images", is_clip=False)
    with pytest.raises(MediaError, match=r"images\[1\]"):
        attach(["a.png", "https://example.org/x"], "images", is_clip=False)


def test_the_last_user_shows_what_is_attached_before_what_he_says() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    shown = show(
        messages,
        attach([DATA], "images", is_clip=False) + attach(["c.mp4"], "videos", is_clip=True),
    )
    places, found = take_attachments(shown)
    assert places == [messages[0], user(PLACE, CLIP, {"type": "text", "text": "b"}), messages[2]]
    assert [one.where for one in found] == ["images[0]", "videos[0]"]
    assert found[1].source == Path("c.mp4")
    with pytest.raises(OptionError, match="no message of a user"):
        show([{"role": "system", "content": "a"}], found)


def test_normalised_content_keeps_places_in_order() -> None:
    content = ["a", PLACE, {"type": "text", "text": "b"}, CLIP]
    said = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    assert normalise([user(*content)]) == [user(said[0], PLACE, said[1], CLIP)]
    assert normalise([user("a", "b")]) == [{"role": "user", "content": "ab"}]
    with pytest.raises(OptionError, match="a system shows no pictures"):
        normalise([{"role": "system", "content": [PLACE]}])
