"""What transformers makes of pictures and clips, with its Pillow back end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from q35c.vision.parameters import VisionParameters

PARAMETERS = VisionParameters()
SETTINGS: dict[str, Any] = {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def sizes(limits: Any) -> dict[str, int]:
    """Return areas by the names that files use."""
    return {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}


IMAGES = Qwen2VLImageProcessorPil(size=sizes(PARAMETERS.image), **SETTINGS)


def levels(normalised: np.ndarray) -> np.ndarray:
    """Return the u8 that the reference's floats stand for, and see that they stand for whole ones."""
    exact = normalised.astype(np.float64) * 127.5 + 127.5
    rounded = np.rint(exact)
    assert np.abs(exact - rounded).max() < 1e-3
    return rounded.astype(np.uint8)


def reference_image(image: Any) -> tuple[np.ndarray, int, int]:
    """Return u8 patches [patches, 1536], rows and columns of patches."""
    made = IMAGES(images=[image], return_tensors="np")
    _, rows, columns = np.asarray(made["image_grid_thw"])[0].tolist()
    return levels(np.asarray(made["pixel_values"])), rows, columns


class _PillowBackend(BaseVideoProcessor):
    """Do with Pillow what the reference does with torchvision, whose resizing differs by one level."""

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        return video

    def rescale_and_normalize(self, images: torch.Tensor, *_: Any) -> torch.Tensor:
        return (images / 255 - 0.5) / 0.5

    def resize(self, image: torch.Tensor, size: Any, resample: Any, **_: Any) -> torch.Tensor:
        flat = image.reshape(-1, *image.shape[-3:])
        target = SizeDict(height=size.height, width=size.width)
        made = [PilBackend.resize(IMAGES, frame.numpy(), target, resample) for frame in flat]
        return torch.from_numpy(np.stack(made)).reshape(*image.shape[:-2], size.height, size.width)


class _Videos(Qwen3VLVideoProcessor, _PillowBackend):
    pass


VIDEOS = _Videos(size=sizes(PARAMETERS.video), **SETTINGS)


def reference_clip(
    frames: np.ndarray, total: int, fps: float, indices: Any = None
) -> tuple[np.ndarray, tuple[int, int, int], list[float]]:
    """Return u8 patches, the grid and the timestamps of u8 frames [frames, rows, columns, channels].

    The reference samples them, or `indices` says which frames they are.
    """
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    metadata.frames_indices = indices
    made = VIDEOS(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=indices is None,
        return_metadata=True,
        return_tensors="pt",
    )
    chosen = list(made["video_metadata"][0].frames_indices)
    times = Qwen3VLProcessor._calculate_timestamps(None, chosen, fps, 2)
    grid = tuple(made["video_grid_thw"][0].tolist())
    return levels(made["pixel_values_videos"].numpy()), grid, times
