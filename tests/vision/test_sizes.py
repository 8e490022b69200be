"""The size of a resized picture is the reference's, whatever shape and limits."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as image_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_resize

from q35c.errors import MediaError
from q35c.vision.parameters import ImageLimits, VideoLimits, VisionParameters
from q35c.vision.sizes import image_size, video_size

SIDES = st.one_of(
    st.integers(1, 300), st.integers(1, 9000), st.integers(1, 300).map(lambda n: n * 16)
)
LIMITS = st.tuples(st.integers(1, 1 << 20), st.integers(1 << 12, 1 << 24)).map(sorted)


@given(SIDES, SIDES, LIMITS)
def test_pictures(height: int, width: int, limits: list[int]) -> None:
    parameters = VisionParameters(image=ImageLimits(*limits))
    try:
        want = image_resize(height, width, 32, *limits)
    except ValueError:
        with pytest.raises(MediaError, match="sides differ"):
            image_size(height, width, parameters)
        return
    assert image_size(height, width, parameters) == want


@given(st.integers(1, 900), SIDES, SIDES, LIMITS)
def test_clips(frames: int, height: int, width: int, limits: list[int]) -> None:
    parameters = VisionParameters(video=VideoLimits(*limits))
    try:
        want = video_resize(frames, height, width, 2, 32, *limits)
    except ValueError:
        with pytest.raises(MediaError, match=r"sides differ|more frames"):
            video_size(frames, height, width, parameters)
        return
    assert video_size(frames, height, width, parameters) == want


@given(SIDES, SIDES)
def test_the_published_limits_hold_and_a_size_is_its_own(height: int, width: int) -> None:
    parameters = VisionParameters()
    if max(height, width) > 200 * min(height, width):
        return
    made = image_size(height, width, parameters)
    assert all(side % 32 == 0 and side > 0 for side in made)
    assert 65536 <= made[0] * made[1] <= 16777216
    if max(made) <= 200 * min(made):  # rounding may make a narrow one narrower
        assert image_size(*made, parameters) == made


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((1, 1), (256, 256)),
        ((1, 200), (32, 3648)),
        ((5000, 4000), (4576, 3648)),
        ((256, 300), (256, 288)),
    ],
)
def test_sizes_that_are_known(shape: tuple[int, int], want: tuple[int, int]) -> None:
    assert image_size(*shape, VisionParameters()) == want


def test_a_frame_may_be_capped_by_itself() -> None:
    capped = VisionParameters(video=VideoLimits(max_frame_tokens=768))
    assert video_size(4, 2000, 2000, VisionParameters()) == (1984, 1984)
    assert video_size(4, 2000, 2000, capped) == (864, 864)  # 27 * 27 = 729 tokens


@given(SIDES, SIDES, st.integers(1, 3000), st.integers(2, 40))
def test_the_tower_takes_no_more_than_it_was_compiled_for(
    height: int, width: int, tokens: int, frames: int
) -> None:
    parameters = VisionParameters(max_tokens=tokens)
    if max(height, width) > 200 * min(height, width):
        return
    sizes = [image_size(height, width, parameters)]
    with contextlib.suppress(MediaError):  # frames are scaled up before their sides are compared
        sizes.append(video_size(frames, height, width, parameters))
    for made in sizes:
        assert all(side % 32 == 0 and side > 0 for side in made)
        assert made[0] * made[1] <= tokens * 1024


@given(SIDES, SIDES, st.integers(256, 3000))
def test_a_smaller_tower_is_a_smaller_limit_of_the_reference(
    height: int, width: int, tokens: int
) -> None:
    if max(height, width) <= 200 * min(height, width):
        want = image_resize(height, width, 32, 65536, tokens * 1024)
        assert image_size(height, width, VisionParameters(max_tokens=tokens)) == want
