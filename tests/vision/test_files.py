"""What preprocessor files say, in both namings, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.vision.files import IMAGE, PROCESSOR, VIDEO, read_parameters
from q35c.vision.parameters import ImageLimits, VideoLimits, VisionParameters
from tests.vision.reference import IMAGES, PARAMETERS, SETTINGS, sizes

# As published with the family.
PICTURES: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
CLIPS: dict[str, Any] = PICTURES | {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
del CLIPS["image_processor_type"]


def test_the_published_files_are_the_defaults() -> None:
    assert read_parameters({IMAGE: PICTURES, VIDEO: CLIPS}) == VisionParameters()


def test_one_file_for_both_is_read_and_wins() -> None:
    other = PICTURES | {"size": {"longest_edge": 65536, "shortest_edge": 1024}}
    both = {
        "image_processor": other,
        "video_processor": CLIPS,
        "processor_class": "Qwen3VLProcessor",
    }
    want = VisionParameters(image=ImageLimits(1024, 65536))
    assert read_parameters({PROCESSOR: both, IMAGE: PICTURES, VIDEO: CLIPS}) == want


def test_a_file_of_the_processor_alone_leaves_the_others() -> None:
    documents = {PROCESSOR: {"processor_class": "Qwen3VLProcessor"}, IMAGE: PICTURES}
    assert read_parameters(documents) == VisionParameters()


def test_what_transformers_writes_is_read() -> None:
    videos = Qwen3VLVideoProcessor(size=sizes(PARAMETERS.video), **SETTINGS)
    written = {IMAGE: IMAGES.to_json_string(), VIDEO: videos.to_json_string()}
    documents = {name: json.loads(text) for name, text in written.items()}
    assert read_parameters(documents) == VisionParameters()


def test_areas_may_have_their_own_names() -> None:
    loose = PICTURES | {"min_pixels": 2048, "max_pixels": 4096}
    inside = PICTURES | {"size": {"min_pixels": 2048, "max_pixels": 4096}}
    for document in (loose, inside):
        found = read_parameters({IMAGE: document})
        assert found is not None and found.image == ImageLimits(2048, 4096)


def test_frames_are_capped_only_where_a_file_says_so() -> None:
    for value, want in ((True, 768), (False, None), (None, None)):
        found = read_parameters({IMAGE: PICTURES, VIDEO: CLIPS | {"cap_pixels_per_frame": value}})
        assert found is not None and found.video == VideoLimits(max_frame_tokens=want)


def test_without_files_there_are_no_parameters() -> None:
    assert read_parameters({}) is None
    assert read_parameters({PROCESSOR: {"processor_class": "Qwen3VLProcessor"}}) is None


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("image_mean", [0.48145466, 0.4578275, 0.40821073], UnsupportedConfig),
        ("image_std", [0.5, 0.5], UnsupportedConfig),
        ("resample", 2, UnsupportedConfig),
        ("rescale_factor", 1.0, UnsupportedConfig),
        ("rescale_factor", 1, UnsupportedConfig),
        ("do_resize", False, UnsupportedConfig),
        ("do_normalize", 1, UnsupportedConfig),
        ("do_center_crop", True, UnsupportedConfig),
        ("image_processor_type", "SiglipImageProcessor", UnsupportedConfig),
        ("do_magic", True, UnsupportedConfig),
        ("patch_size", 0, ConfigError),
        ("merge_size", "2", ConfigError),
        ("size", 7, ConfigError),
        ("size", {"longest_edge": 65536}, ConfigError),
        ("size", {"longest_edge": 1, "shortest_edge": 1}, ConfigError),
        ("size", {"longest_edge": 65536, "shortest_edge": 65537}, ConfigError),
        ("size", {"longest_edge": 65536, "shortest_edge": 1, "height": 4}, UnsupportedConfig),
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: Any, error: type) -> None:
    with pytest.raises(error) as caught:
        read_parameters({IMAGE: PICTURES | {key: value}})
    assert key in str(caught.value) or "pixels" in str(caught.value)
    assert IMAGE in str(caught.value)


@pytest.mark.parametrize("missing", ["image_mean", "image_std", "patch_size"])
def test_an_absent_key_has_the_default_of_the_class(missing: str) -> None:
    document = {key: value for key, value in PICTURES.items() if key != missing}
    if missing == "patch_size":
        found = read_parameters({IMAGE: document})
        assert found is not None and found.patch_size == 14
        return
    with pytest.raises(UnsupportedConfig, match=missing):
        read_parameters({IMAGE: document})


@pytest.mark.parametrize(
    "clips",
    [
        {"patch_size": 14},
        {"fps": 0},
        {"fps": True},
        {"num_frames": 8},
        {"min_frames": 900},
        {"max_frames": 0},
    ],
    ids=str,
)
def test_clips_are_checked_too(clips: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)video"):
        read_parameters({IMAGE: PICTURES, VIDEO: CLIPS | clips})


def test_clips_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match="without settings of pictures"):
        read_parameters({VIDEO: CLIPS})


def test_the_canonical_form_is_read_back() -> None:
    for parameters in (
        VisionParameters(),
        VisionParameters(
            image=ImageLimits(1024, 9216), video=VideoLimits(max_frame_tokens=9, fps=1.5)
        ),
    ):
        assert VisionParameters.from_dict(parameters.to_dict()) == parameters


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("patch_size", 0),
        ("image.min_pixels", 1 << 40),
        ("video.fps", "2"),
        ("video.x", 1),
        ("image.max_pixels", 64),
    ],
)
def test_a_canonical_form_that_cannot_be_is_refused(path: str, value: Any) -> None:
    document = VisionParameters().to_dict()
    *rooms, key = path.split(".")
    place = document
    for room in rooms:
        place = place[room]
    place[key] = value
    with pytest.raises(ConfigError):
        VisionParameters.from_dict(document)
