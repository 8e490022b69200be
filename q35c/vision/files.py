"""Read the preprocessor files of a checkpoint: what they say of sizes and sampling; all else must be what is computed here.

Settings stand in `preprocessor_config.json` and `video_preprocessor_config.json`, or, in newer checkpoints, together in
`processor_config.json`, which wins. A key that is absent has the default of transformers' class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.vision.parameters import (
    MOST_PIXELS,
    ImageLimits,
    VideoLimits,
    VisionParameters,
    check_parameters,
)

PROCESSOR, IMAGE, VIDEO = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
NAMES = (PROCESSOR, IMAGE, VIDEO)

_HALF = [0.5, 0.5, 0.5]
_BICUBIC = 3
# What transformers takes where a file does not say: the defaults of its classes for pictures and for clips.
_COMMON_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": None,
    "do_pad": None,
    "resample": _BICUBIC,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_IMAGE_DEFAULTS: dict[str, Any] = _COMMON_DEFAULTS | {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
_VIDEO_DEFAULTS: dict[str, Any] = _COMMON_DEFAULTS | {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "patch_size": 16,
    "image_mean": _HALF,
    "image_std": _HALF,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "do_sample_frames": True,
    "fps": 2,
    "num_frames": None,
    "min_frames": 4,
    "max_frames": 768,
    "cap_pixels_per_frame": None,
    "max_video_tokens": 768,
    "max_duration": None,
}
# Of these, one meaning is computed.
_FIXED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "do_sample_frames": (True,),
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "resample": (_BICUBIC,),
    "image_mean": (_HALF, 0.5),
    "image_std": (_HALF, 0.5),
    "num_frames": (None,),
    "max_duration": (None,),
    "image_processor_type": (
        "Qwen2VLImageProcessor",
        "Qwen2VLImageProcessorFast",
        "Qwen2VLImageProcessorPil",
    ),
    "video_processor_type": ("Qwen3VLVideoProcessor",),
}
# Of bookkeeping, of what is returned and where it is computed, and sizes of steps that are off.
_BOOKKEEPING = """auto_map processor_class feature_extractor_type image_processor_type video_processor_type data_format
input_data_format device return_tensors return_metadata disable_grouping image_seq_length default_to_square crop_size pad_size
video_metadata max_image_size transformers_version"""
_IRRELEVANT = frozenset(_BOOKKEEPING.split())
_AREAS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}


def read_parameters(documents: Mapping[str, Mapping[str, Any]]) -> VisionParameters | None:
    """Return what the files say, None if there is none about pictures. `documents` are the JSON objects by file name.

    Clips without a file of their own have the family's published sizes and sampling. Raises ConfigError for a value
    that cannot be, UnsupportedConfig by name for a key or value that asks for something else than is computed.
    """
    shared = documents.get(PROCESSOR, {})
    image = _document(shared, "image_processor", documents, IMAGE)
    video = _document(shared, "video_processor", documents, VIDEO)
    if image is None:
        if video is not None:
            raise ConfigError("clips without settings of pictures", where=video[1], expected=IMAGE)
        return None
    pictures = _Settings(*image, _IMAGE_DEFAULTS)
    sizes = pictures.sizes()
    limits = ImageLimits(*pictures.areas())
    pictures.finish()
    clips = _video_limits(video, sizes)
    parameters = VisionParameters(**sizes, image=limits, video=clips)
    check_parameters(parameters, image[1])
    return parameters


def _document(
    shared: Mapping[str, Any], key: str, documents: Mapping[str, Mapping[str, Any]], name: str
) -> tuple[Mapping[str, Any], str] | None:
    """Return the settings of one kind and where they stand."""
    if key in shared:
        value, where = shared[key], f"{PROCESSOR} at {key}"
        if not isinstance(value, dict):
            raise ConfigError("must be a JSON object", where=where, got=type(value).__name__)
        return cast(dict[str, Any], value), where
    return (documents[name], name) if name in documents else None


def _video_limits(
    video: tuple[Mapping[str, Any], str] | None, sizes: dict[str, int]
) -> VideoLimits:
    if video is None:
        return VideoLimits()
    clips = _Settings(*video, _VIDEO_DEFAULTS)
    if (found := clips.sizes()) != sizes:
        raise UnsupportedConfig(
            "patches of clips differ from those of pictures",
            where=video[1],
            expected=sizes,
            got=found,
        )
    low, high = clips.areas()
    limits = VideoLimits(
        min_pixels=low,
        max_pixels=high,
        fps=clips.number("fps"),
        min_frames=clips.integer("min_frames", 1 << 16),
        max_frames=clips.integer("max_frames", 1 << 16),
        max_frame_tokens=clips.frame_tokens(),
    )
    clips.finish()
    return limits


class _Settings:
    """The keys of one file, each read once, as in `q35c.fields`, but with the defaults of a class."""

    def __init__(self, document: Mapping[str, Any], where: str, defaults: Mapping[str, Any]):
        self._where = where
        self._left = dict(defaults) | dict(document)
        # Older files state areas beside or instead of `size`, and they win.
        self._loose = {name: self._left.pop(name, None) for name in _AREAS.values()}

    def sizes(self) -> dict[str, int]:
        names = ("patch_size", "temporal_patch_size", "merge_size")
        return {name: self.integer(name, 64) for name in names}

    def areas(self) -> tuple[int, int]:
        """Return the least and most pixels: areas, whatever their names are."""
        size = self._left.pop("size")
        if not isinstance(size, dict):
            raise self._bad("size", "an object of shortest_edge and longest_edge", size)
        renamed: dict[str, Any] = {}
        for key, value in cast(dict[str, Any], size).items():
            if value is not None and key not in _AREAS.keys() | self._loose.keys():
                raise UnsupportedConfig(f"unknown key {key!r:.80}", where=f"{self._where} at size")
            renamed[_AREAS.get(key, key)] = value
        renamed |= {key: value for key, value in self._loose.items() if value is not None}
        low, high = (self._area(renamed, name) for name in _AREAS.values())
        return low, high

    def _area(self, size: dict[str, Any], name: str) -> int:
        value = size.get(name)
        if type(value) is not int or not 1 <= value <= MOST_PIXELS:
            raise self._bad(f"size.{name}", f"an integer from 1 to {MOST_PIXELS}", value)
        return value

    def integer(self, name: str, high: int) -> int:
        value = self._left.pop(name)
        if type(value) is not int or not 1 <= value <= high:
            raise self._bad(name, f"an integer from 1 to {high}", value)
        return value

    def number(self, name: str) -> float:
        value = self._left.pop(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 1e-3 <= value <= 1e3:
            raise self._bad(name, "a number from 0.001 to 1000", value)
        return float(value)

    def frame_tokens(self) -> int | None:
        """Return the most tokens of a frame if frames are capped; transformers 5.23 does not unless told so."""
        is_capped = self._left.pop("cap_pixels_per_frame")
        tokens = self.integer("max_video_tokens", 1 << 20)
        if is_capped not in (None, True, False):
            raise self._bad("cap_pixels_per_frame", "true or false", is_capped)
        return tokens if is_capped else None

    def finish(self) -> None:
        """Refuse every key that is left and may change what is computed."""
        factor = self._left.pop("rescale_factor")
        if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
            raise self._unsupported("rescale_factor", "1/255", factor)
        for key, value in self._left.items():
            if key in _FIXED:
                if not any(type(value) is type(good) and value == good for good in _FIXED[key]):
                    raise self._unsupported(key, " or ".join(map(repr, _FIXED[key])), value)
            elif key not in _IRRELEVANT and not key.startswith("_"):
                raise UnsupportedConfig(f"unknown key {key!r:.80}", where=self._where)

    def _bad(self, name: str, expected: str, value: Any) -> ConfigError:
        return ConfigError(
            f"bad value of {name!r}", where=self._where, expected=expected, got=value
        )

    def _unsupported(self, name: str, expected: str, value: Any) -> UnsupportedConfig:
        return UnsupportedConfig(
            f"{name} is not supported", where=self._where, expected=expected, got=value
        )
