"""How a model wants its pictures and clips: sizes, sampling, patches.

The values are the published ones of the family; a checkpoint's preprocessor files may say otherwise (`files.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from q35c.errors import ConfigError
from q35c.fields import Fields

CHANNELS = 3
MOST_PIXELS = 1 << 28  # in any of these limits
_MOST_FRAMES = 1 << 16


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The least and most pixels that a picture is resized to."""

    min_pixels: int = 65536
    max_pixels: int = 16777216


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """The least and most pixels of all sampled frames together, and how frames are sampled.

    `max_frame_tokens` bounds each frame's tokens; None leaves that to `max_pixels`.
    """

    min_pixels: int = 4096
    max_pixels: int = 25165824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    max_frame_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class VisionParameters:
    """How pictures become patches: `patch_size` pixels square, `temporal_patch_size` frames deep.

    `merge_size` x `merge_size` patches become one token. `max_tokens` is the most of one picture or frame that the compiled
    tower takes; None: as many as the limits allow.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image: ImageLimits = field(default_factory=ImageLimits)
    video: VideoLimits = field(default_factory=VideoLimits)
    max_tokens: int | None = None

    @property
    def factor(self) -> int:
        """Return what both sides of a resized picture are multiples of, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_bytes(self) -> int:
        """Return the length of a patch: one byte a channel, frame, row and column."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical JSON form, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Any, where: str = "vision") -> VisionParameters:
        """Read the canonical form. Raises ConfigError or UnsupportedConfig."""
        items = Fields(document, where)
        image, video = items.nested("image"), items.nested("video")
        sizes = {name: items.integer(name, 1, high) for name, high in _SIZES.items()}
        most = items.integer("max_tokens", 1, MOST_PIXELS, default=None)
        items.finish()
        parameters = cls(
            **sizes, image=_image_limits(image), video=_video_limits(video), max_tokens=most
        )
        check_parameters(parameters, where)
        return parameters


_SIZES = {"patch_size": 64, "temporal_patch_size": 2, "merge_size": 4}


def _image_limits(items: Fields) -> ImageLimits:
    names = [item.name for item in fields(ImageLimits)]
    limits = ImageLimits(**{name: items.integer(name, 1, MOST_PIXELS) for name in names})
    items.finish()
    return limits


def _video_limits(items: Fields) -> VideoLimits:
    limits = VideoLimits(
        min_pixels=items.integer("min_pixels", 1, MOST_PIXELS),
        max_pixels=items.integer("max_pixels", 1, MOST_PIXELS),
        fps=items.number("fps", 1e-3, 1e3),
        min_frames=items.integer("min_frames", 1, _MOST_FRAMES),
        max_frames=items.integer("max_frames", 1, _MOST_FRAMES),
        max_frame_tokens=items.integer("max_frame_tokens", 1, MOST_PIXELS, default=None),
    )
    items.finish()
    return limits


def check_parameters(parameters: VisionParameters, where: str) -> None:
    """Refuse limits that contradict each other. Raises ConfigError."""
    image, video = parameters.image, parameters.video
    pairs = {
        "image pixels": (image.min_pixels, image.max_pixels),
        "video pixels": (video.min_pixels, video.max_pixels),
        "video frames": (video.min_frames, video.max_frames),
    }
    for name, (low, high) in pairs.items():
        if low > high:
            raise ConfigError(
                f"the least {name} exceed the most",
                where=where,
                expected=f"at most {high}",
                got=low,
            )
    if image.max_pixels < parameters.factor**2:
        raise ConfigError(
            "the most image pixels hold no token",
            where=where,
            expected=f"at least {parameters.factor**2}",
            got=image.max_pixels,
        )
