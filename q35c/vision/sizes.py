"""Choose the size that a picture or a clip is resized to: multiples of the factor, the area within limits.

The formulas are those of transformers 5.23 (Qwen2VLImageProcessor and Qwen3VLVideoProcessor), rounding included. Where the
compiled tower takes fewer tokens, that is the most pixels in them, for each frame.
"""

from __future__ import annotations

import math

from q35c.errors import MediaError
from q35c.vision.parameters import MOST_PIXELS, VisionParameters

MAX_ASPECT = 200


def image_size(
    height: int, width: int, parameters: VisionParameters, where: str | None = None
) -> tuple[int, int]:
    """Return height and width in pixels of a resized picture. Raises MediaError for an absurd shape."""
    check_aspect(height, width, where)
    most = _tower_pixels(parameters)
    high = min(parameters.image.max_pixels, most)
    low = min(parameters.image.min_pixels, high)
    return _within(most, parameters.factor, _fit(1, 1, height, width, parameters.factor, low, high))


def video_size(
    frames: int, height: int, width: int, parameters: VisionParameters, where: str | None = None
) -> tuple[int, int]:
    """Return height and width in pixels of every resized frame; `frames` are those sampled.

    The limits count the pixels of all of them together. Raises MediaError for an absurd shape or a single frame.
    """
    step = parameters.temporal_patch_size
    if frames < step:
        raise MediaError(
            "a clip needs more frames", where=where, expected=f"at least {step}", got=frames
        )
    factor = parameters.factor
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width, where)
    paired = round(frames / step) * step
    most = _tower_pixels(parameters)
    high = min(_most_pixels(frames, parameters), frames * most)
    low = min(parameters.video.min_pixels, high)
    return _within(most, factor, _fit(frames, paired, height, width, factor, low, high))


def check_aspect(height: int, width: int, where: str | None = None) -> None:
    """Refuse sides that differ too much. Raises MediaError."""
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise MediaError(
            "the sides differ too much",
            where=where,
            expected=f"one side at most {MAX_ASPECT} times the other",
            got=f"{width} x {height} pixels",
            hint="cut it into pieces",
        )


def _tower_pixels(parameters: VisionParameters) -> int:
    """Return the most pixels that the tower takes at once."""
    tokens = MOST_PIXELS if parameters.max_tokens is None else parameters.max_tokens
    return tokens * parameters.factor**2


def _within(most: int, factor: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return a size that the tower takes: the reference's may be larger for narrow pictures and odd numbers of frames."""
    shrink = math.sqrt(max(1.0, size[0] * size[1] / most))
    height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in size)
    short = min(height, width)
    longest = most // short // factor * factor
    return min(height, max(longest, short)), min(width, max(longest, short))


def _most_pixels(frames: int, parameters: VisionParameters) -> int:
    """Return the most pixels of all frames, with each frame's own limit if there is one."""
    video = parameters.video
    if video.max_frame_tokens is None:
        return video.max_pixels
    frame = min(video.max_frame_tokens * parameters.factor**2, video.max_pixels // frames)
    return max(frame, int(video.min_pixels * 1.05)) * frames


def _fit(
    frames: int, paired: int, height: int, width: int, factor: int, low: int, high: int
) -> tuple[int, int]:
    """Return multiples of `factor` near a shape. `paired` is the number of frames as it is compared with the limits.

    Python rounds halves to even, as the reference does: 48 becomes 64, and so does 80.
    """
    near = [round(side / factor) * factor for side in (height, width)]
    area = paired * near[0] * near[1]
    pixels = frames * height * width
    if area > high:
        shrink = math.sqrt(pixels / high)
        near = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif area < low:
        grow = math.sqrt(low / pixels)
        near = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return near[0], near[1]
