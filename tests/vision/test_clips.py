"""Clips become the patches, grids and times that transformers makes of them, bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata, load_video

from q35c.errors import MediaError, OptionError
from q35c.vision.clips import Clip, ClipFrames, clip_frames
from q35c.vision.parameters import VideoLimits, VisionParameters
from q35c.vision.sampling import sample, timestamps
from tests.vision.clips import KINDS, clip, frames, kind
from tests.vision.reference import PARAMETERS, VIDEOS, reference_clip


def check(made: ClipFrames, want: tuple[np.ndarray, tuple[int, int, int], list[float]]) -> None:
    patches, grid, times = want
    assert (len(made.frames), made.frames[0].rows, made.frames[0].columns) == grid
    assert np.array_equal(np.concatenate([frame.patches for frame in made.frames]), patches)
    assert list(made.seconds) == times


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_any_kind_is_as_in_the_reference(name: str, tmp_path: Path) -> None:
    place = tmp_path / "clip"
    place.write_bytes(kind(name))
    with av.open(str(place)) as container:
        stream = container.streams.video[0]
        fps, declared = float(stream.average_rate), stream.frames
        everything = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    check(clip_frames(place, PARAMETERS), reference_clip(everything, len(everything), fps))
    if declared:  # the reference's reader cannot do without
        reader = {
            "backend": "pyav",
            "sample_indices_fn": lambda metadata: VIDEOS.sample_frames(metadata),
        }
        chosen, metadata = load_video(str(place), **reader)
        want = reference_clip(chosen, declared, fps, metadata.frames_indices)
        check(clip_frames(place.read_bytes(), PARAMETERS), want)


@pytest.mark.parametrize(
    ("count", "fps", "shape"),
    [
        (90, 30.0, (180, 320)),
        (7, 25.0, (64, 64)),
        (3, 24.0, (50, 70)),
        (250, 29.97, (31, 47)),
        (20, 1.0, (240, 320)),
    ],
)
def test_frames_are_sampled_as_in_the_reference(
    count: int, fps: float, shape: tuple[int, int]
) -> None:
    array = frames(count, shape)
    want = reference_clip(array, count, fps)
    check(clip_frames(Clip(array, fps), PARAMETERS), want)
    pictures = [Image.fromarray(frame) for frame in array]
    check(clip_frames(Clip(pictures, fps), PARAMETERS), want)


def test_frames_without_a_rate_have_that_of_the_reference() -> None:
    array = frames(40)
    check(clip_frames(array, PARAMETERS), reference_clip(array, 40, 24))


@given(
    st.integers(2, 100_000),
    st.floats(0.1, 1000),
    st.floats(0.1, 60),
    st.lists(st.integers(1, 900), min_size=2, max_size=2).map(sorted),
)
def test_which_frames_and_when(
    total: int, fps: float, rate: float, frame_limits: list[int]
) -> None:
    low, high = frame_limits
    limits = VideoLimits(fps=rate, min_frames=low, max_frames=high)
    processor = type(
        "", (), {"fps": rate, "num_frames": None, "min_frames": low, "max_frames": high}
    )()
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    want = type(VIDEOS).sample_frames(processor, metadata)
    found = sample(total, fps, limits)
    assert found == want.tolist()
    assert list(timestamps(found, fps, 2)) == Qwen3VLProcessor._calculate_timestamps(
        None, want, fps, 2
    )


def test_a_clip_that_lies_is_turned_upright() -> None:
    """The reference's reader leaves it lying; pictures are turned by their EXIF, and so are clips."""
    data = clip("mp4", "mpeg4", "yuv420p", count=4, shape=(64, 96))
    matrix = bytearray(data)
    place = matrix.index(b"tkhd") + 4 + 40  # of version 0: the matrix lies 40 bytes behind its name
    quarter = [0, 1 << 16, 0, -(1 << 16) % (1 << 32), 0, 0, 0, 0, 1 << 30]
    matrix[place : place + 36] = b"".join(value.to_bytes(4, "big") for value in quarter)
    lying = clip_frames(data, PARAMETERS).frames[0]
    upright = clip_frames(bytes(matrix), PARAMETERS).frames[0]
    assert (upright.rows, upright.columns) == (lying.columns, lying.rows)
    with av.open(io.BytesIO(bytes(matrix))) as container:
        first = next(container.decode(video=0))
        assert first.rotation % 360 == 270
        picture = np.rot90(first.to_ndarray(format="rgb24"), -1)
    still = clip_frames(Clip([picture, picture], 1.0), PARAMETERS).frames[0]
    assert np.array_equal(still.patches[:, :256], upright.patches[:, :256])


def test_a_file_that_ends_early_is_the_frames_it_has() -> None:
    data = clip("mpegts", "libx264", "yuv420p")
    made = clip_frames(data[: len(data) * 9 // 10], PARAMETERS)
    assert 0 < len(made.frames) <= 2 and made.seconds[-1] < 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "cannot be decoded"),
        (Path("nowhere.mp4"), "no such file"),
        (Path("/dev/zero"), "no such file"),
        (7, "no clip"),
        (Clip(7), "no clip"),
        ([], "more frames"),
        (frames(1), "more frames"),
        (frames(8, (2, 500)), "sides differ"),
        ([frames(1)[0]] * 3 + [frames(1, (64, 64))[0]], "differ in size"),
        ([b"", b""], r"video\[0\]: is no picture"),
    ],
)
def test_what_is_no_clip_is_refused(source: Any, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        clip_frames(source, PARAMETERS)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "25", True])
def test_a_rate_is_a_positive_number(fps: Any) -> None:
    with pytest.raises(OptionError, match="fps"):
        clip_frames(Clip(frames(4), fps), PARAMETERS)


def test_reading_may_not_take_for_ever() -> None:
    with pytest.raises(MediaError, match="takes too long"):
        clip_frames(kind("AVI MPEG-4"), PARAMETERS, max_seconds=0)


def test_frames_may_be_capped() -> None:
    capped = VisionParameters(video=VideoLimits(max_frame_tokens=4))
    made = clip_frames(frames(8), capped)
    assert made.frames[0].tokens(2) <= 4
