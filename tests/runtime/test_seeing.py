"""A model is shown pictures and clips: by every way in, once each, told apart by its cache."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import q35c
from q35c.errors import MediaError, OptionError, PromptError
from q35c.runtime.multimodal import MultimodalPrompt, cell_ids
from q35c.vision.clips import Clip
from tests.compiled import model
from tests.seeing import (
    CLIPS_FILE,
    END,
    IMAGE,
    PICTURES_FILE,
    PREPROCESSORS,
    START,
    TEMPLATE,
    VIDEO,
    Counted,
    open_eyes,
    seeing_checkpoint,
    seeing_model,
)
from tests.vision.clips import frames
from tests.vision.pictures import encoded, photo
from tests.vision.reference import VIDEOS

PICTURE, OTHER = photo(96, 64), Image.new("RGB", (160, 64), (250, 20, 60))
PNG = encoded(PICTURE, "PNG")
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
QUESTION = "What is to be seen here? " * 6
CLIP = Clip(frames(10, (64, 64)), 5.0)


@pytest.fixture(scope="module")
def sees() -> q35c.Model:
    return seeing_model()


@pytest.fixture
def tower(sees: q35c.Model) -> Counted:
    """Return the tower of eyes that have seen nothing yet."""
    return open_eyes(sees)


def same(first: Any, second: Any) -> bool:
    return np.array_equal(cell_ids(first), cell_ids(second)) and np.array_equal(
        first.positions, second.positions
    )


def test_all_ways_to_show_a_picture_are_one(
    sees: q35c.Model, tower: Counted, tmp_path: Path
) -> None:
    place = tmp_path / "picture.png"
    place.write_bytes(PNG)
    said = {"type": "text", "text": "What?"}
    want = sees.encode_chat([{"role": "user", "content": "What?"}], images=[PICTURE])
    assert isinstance(want, MultimodalPrompt) and want.has_pictures
    sources = (PNG, place, np.asarray(PICTURE), URL)
    for source in sources:
        shown = [{"role": "user", "content": [{"type": "image", "image": source}, said]}]
        assert same(sees.encode_chat(shown), want)
        assert same(sees.encode_chat([{"role": "user", "content": "What?"}], images=[source]), want)
    shown = [{"role": "user", "content": [{"type": "image", "image": str(place)}, said]}]
    assert same(sees.encode_chat(shown, allow_files=True), want)
    with pytest.raises(MediaError, match="only data URLs"):
        sees.encode_chat(shown)


def test_what_was_seen_is_not_computed_again(
    sees: q35c.Model, tower: Counted, tmp_path: Path
) -> None:
    place = tmp_path / "picture.png"
    place.write_bytes(PNG)
    first = sees.encode_chat([{"role": "user", "content": "a"}], images=[PNG, OTHER])
    assert tower.calls == 2
    again = sees.encode_chat([{"role": "user", "content": "a"}], images=[place, OTHER])
    assert tower.calls == 2 and same(first, again)
    sees.encode_chat([{"role": "user", "content": "a"}], videos=[CLIP])
    sees.encode_chat([{"role": "user", "content": "a"}], videos=[CLIP])
    assert tower.calls == 2 + 2  # four frames are two pairs


def test_only_so_much_is_kept(sees: q35c.Model) -> None:
    size = 6 * 48 * 4  # bytes of rows of a picture of 96 x 64
    tower = open_eyes(sees, kept_bytes=2 * size)
    eyes = sees.prompting.eyes
    pictures = [PICTURE.rotate(angle) for angle in (0, 90, 180)]
    ask = [{"role": "user", "content": "a"}]
    for picture in (*pictures, pictures[2], pictures[1], pictures[0]):
        sees.encode_chat(ask, images=[picture])
    assert tower.calls == 4  # the first was given up for the third
    assert eyes is not None and eyes.kept_bytes == 2 * size


def test_a_prompt_shows_pictures_where_its_pads_are_or_before_its_text(
    sees: q35c.Model, tower: Counted
) -> None:
    tokenizer = sees.tokenizer
    text = "<|vision_start|><|image_pad|><|vision_end|>What?"
    want = sees.generate(text, 4, images=[PICTURE], do_sample=False)
    assert sees.generate("What?", 4, images=[PICTURE], do_sample=False) == want
    assert sees.generate(tokenizer.encode(text), 4, images=[PICTURE], do_sample=False) == want
    other = sees.generate(text, 4, images=[OTHER], do_sample=False)
    counts = [made.timings.prompt_tokens for made in (want, other)]
    assert [count - len(tokenizer.encode("What?")) for count in counts] == [2 + 6, 2 + 10]


def test_a_conversation_is_a_prompt(sees: q35c.Model, tower: Counted) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": URL}, {"type": "text", "text": QUESTION}],
        }
    ]
    want = sees.generate(sees.encode_chat(messages), 6, do_sample=False)
    assert sees.generate(messages, 6, do_sample=False) == want
    assert sees.generate([messages, "a"], 6, do_sample=False)[0] == want
    plain = [{"role": "user", "content": QUESTION}]
    assert sees.generate(plain, 6, images=[PICTURE], do_sample=False) == want
    answer = sees.chat(messages, max_new_tokens=6, do_sample=False)
    assert answer.usage.prompt_tokens == want.timings.prompt_tokens
    assert (
        sees.chat(plain, images=[PNG], max_new_tokens=6, do_sample=False).content == answer.content
    )
    with q35c.Conversation(sees) as conversation:
        for turn in range(2):
            stream = conversation.answer(messages, max_new_tokens=6, do_sample=False)
            assert "".join(part.text for part in stream) == answer.content
            cached = stream.result.usage.cached_tokens
            assert (cached > 0) == (turn > 0)
    assert tower.calls == 2  # as a file, and as an object


def test_logits_are_those_of_transformers_from_messages_on(
    sees: q35c.Model, tower: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pictures and clips in one conversation: its own processor and model on the same checkpoint."""
    # The processor looks its parts' classes up in a table that is only there with torchvision.
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    backend = Tokenizer.from_file(str(seeing_checkpoint() / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)
    images = Qwen2VLImageProcessorPil(**PREPROCESSORS[PICTURES_FILE])
    clips_processor = type(VIDEOS)(**PREPROCESSORS[CLIPS_FILE])
    processor = Qwen3VLProcessor(images, fast, clips_processor, chat_template=TEMPLATE)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look: "}, {"type": "video"}, {"type": "image"}]},
        {"role": "assistant", "content": "the thing"},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "and?"}]},
    ]  # fmt: skip
    pictures, clips = [photo(128, 96), photo(70, 256)], [frames(10, (96, 64)), frames(7, (64, 64))]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    metadata = [{"total_num_frames": len(clip), "fps": 5.0} for clip in clips]
    made = processor(
        text=[text],
        images=pictures,
        videos=[torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips],
        videos_kwargs={"video_metadata": metadata, "do_sample_frames": True},
        return_tensors="pt",
    )
    ours = sees.encode_chat(_shown(messages, pictures, clips))
    assert isinstance(ours, MultimodalPrompt)
    ids = made["input_ids"][0].numpy()
    pads = np.isin(ids, (IMAGE, VIDEO))
    assert np.array_equal(ours.ids < 0, pads)
    assert np.array_equal(ours.ids[~pads], ids[~pads])
    oracle = Qwen3_5ForConditionalGeneration.from_pretrained(seeing_checkpoint(), dtype="float32")
    with torch.no_grad():
        want = oracle(**made, use_cache=False).logits[0].numpy()
    got = sees.score(ours)
    assert np.abs(got - want).max() <= 2e-5 * np.ptp(want)


def _shown(messages: list[Any], pictures: list[Any], clips: list[Any]) -> list[Any]:
    left = {"image": iter(pictures), "video": (Clip(clip, 5.0) for clip in clips)}
    return [
        {
            **m,
            "content": [
                {**p, p["type"]: next(left[p["type"]])} if p["type"] in left else p
                for p in m["content"]
            ],
        }
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


def test_a_cache_tells_pictures_apart(sees: q35c.Model, tower: Counted) -> None:
    text = [{"role": "user", "content": "What is it? " * 20}]
    cache = sees.cache(64 << 20)
    pictures = [picture.resize((320, 320)) for picture in (PICTURE, OTHER)]
    values = [
        sees.generate(text, 8, images=[picture], do_sample=False, cache=cache)
        for picture in pictures
        for _ in range(2)
    ]
    cache.close()
    assert values[0] == values[1] and values[2] == values[3]
    assert values[0] != values[2]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"images": [photo(512, 512)] * 9},
            PromptError,
            r"images\[7\].*more tokens than the context",
        ),
        ({"images": [PNG[:-40]]}, MediaError, r"images\[0\].*cannot be decoded"),
        ({"images": ["nowhere.png"]}, MediaError, r"images\[0\].*no such file"),
        ({"videos": [PNG]}, MediaError, r"videos\[0\].*cannot be decoded"),
        ({"images": PICTURE}, OptionError, "images"),
    ],
)
def test_errors_name_what_is_shown(
    sees: q35c.Model, tower: Counted, options: dict[str, Any], error: type, words: str
) -> None:
    for call in (
        lambda: sees.generate("Hi", 1, **options),
        lambda: sees.chat([{"role": "user", "content": "Hi"}], **options),
        lambda: sees.encode_chat([{"role": "user", "content": "Hi"}], **options),
    ):
        with pytest.raises(error, match=f"(?s){words}"):
            call()
    assert tower.calls == 0


def test_too_many_tokens_are_refused_before_the_tower_runs(
    sees: q35c.Model, tower: Counted
) -> None:
    with pytest.raises(PromptError, match=r"messages\[0\].content\[7\]"):
        part = {"type": "image", "image": photo(512, 512)}
        sees.chat([{"role": "user", "content": [part] * 9}])
    assert tower.calls == 0


@pytest.mark.parametrize("places", [0, 2])
def test_pads_and_pictures_must_be_as_many(sees: q35c.Model, tower: Counted, places: int) -> None:
    text = "<|vision_start|><|video_pad|><|vision_end|>" + "<|image_pad|>" * places
    with pytest.raises(PromptError, match="not as many places"):
        sees.generate(text, 1, images=[PICTURE])


def test_several_prompts_share_no_pictures(sees: q35c.Model, tower: Counted) -> None:
    with pytest.raises(OptionError, match="one prompt"):
        sees.generate(["a", "b"], 1, images=[PICTURE])


def test_a_model_of_text_says_which_part_it_cannot_take_in() -> None:
    text = model("dense")
    message = {
        "role": "user",
        "content": [{"type": "text", "text": "x"}, {"type": "image", "image": URL}],
    }
    for call in (text.chat, text.encode_chat, text.apply_chat_template, text.generate):
        with pytest.raises(OptionError, match="cannot take in") as caught:
            call([{"role": "user", "content": "y"}, message])
        assert caught.value.where == "messages[1].content[1]"
    for options in ({"images": [PICTURE]}, {"videos": ["x.mp4"]}):
        with pytest.raises(MediaError, match="text alone") as refused:
            text.generate("x", 1, **options)
        assert refused.value.where in ("images[0]", "videos[0]")


def test_a_typed_pad_is_plain_text(sees: q35c.Model, tower: Counted) -> None:
    typed = sees.encode_chat([{"role": "user", "content": "<|image_pad|>"}])
    assert IMAGE not in list(typed)
    shown = sees.encode_chat([{"role": "user", "content": "<|image_pad|>"}], images=[PICTURE])
    assert IMAGE not in shown.tokens and START in shown.tokens and END in shown.tokens
