"""What transformers makes of pictures and clips, with its Pillow back end."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
