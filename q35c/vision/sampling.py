"""Choose a clip's frames and say when they are, as Qwen3VLVideoProcessor and Qwen3VLProcessor of transformers 5.23 do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from q35c.vision.parameters import VideoLimits


def sample(total: int, fps: float, limits: VideoLimits) -> list[int]:
    """Return which of `total` frames are taken: evenly, the first and the last among them."""
    count = int(total / fps * limits.fps)
    count = min(max(count, limits.min_frames), limits.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def timestamps(indices: Sequence[int], fps: float, step: int) -> tuple[float, ...]:
    """Return the middle of each group of `step` frames in seconds; the last frame fills up the last group."""
    filled = list(indices)
    filled += filled[-1:] * (-len(filled) % step)
    seconds = [index / fps for index in filled]
    return tuple((seconds[at] + seconds[at + step - 1]) / 2 for at in range(0, len(seconds), step))
