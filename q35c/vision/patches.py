"""Cut pictures into patches, in the order in which the vision tower reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from q35c.errors import MediaError
from q35c.vision.packages import pillow
from q35c.vision.parameters import CHANNELS, VisionParameters
from q35c.vision.pictures import read_rgb
from q35c.vision.sizes import image_size


@dataclass(frozen=True, slots=True)
class Frame:
    """What the tower reads at once: a picture, or one group of a clip's frames.

    `patches` u8 [rows * columns, patch bytes]; `rows` and `columns` count patches. Patches of one token lie together, tokens
    row by row; a patch holds channel, frame, row, column.
    """

    patches: np.ndarray
    rows: int
    columns: int

    def tokens(self, merge_size: int) -> int:
        """Return how many tokens the frame takes in the text model."""
        return self.rows * self.columns // merge_size**2


def image_frame(source: Any, parameters: VisionParameters, where: str = "image") -> Frame:
    """Return a picture resized and cut. `source` and errors as in `pictures.read_rgb`."""
    image = read_rgb(source, where)
    height, width = image_size(image.height, image.width, parameters, where)
    resized = resize(image, height, width)
    return cut([resized] * parameters.temporal_patch_size, parameters)


def resize(image: Any, height: int, width: int) -> np.ndarray:
    """Return an RGB Pillow image as u8 [height, width, channels], bicubic, with antialiasing where it shrinks."""
    if image.size != (width, height):
        image = image.resize((width, height), pillow().Resampling.BICUBIC)
    return np.asarray(image)


def cut(frames: Sequence[np.ndarray], parameters: VisionParameters) -> Frame:
    """Return the patches of as many frames as one is deep, each u8 [height, width, channels]."""
    patch, merge = parameters.patch_size, parameters.merge_size
    height, width, _ = frames[0].shape
    if height % parameters.factor or width % parameters.factor:
        raise MediaError(
            "the size is no multiple", expected=parameters.factor, got=f"{width} x {height}"
        )
    blocks = (height // parameters.factor, merge, patch, width // parameters.factor, merge, patch)
    result = np.empty(
        (blocks[0], blocks[3], merge, merge, CHANNELS, len(frames), patch, patch), np.uint8
    )
    for depth, frame in enumerate(frames):
        #                           by 0, my 1, y 2, bx 3, mx 4, x 5, channel 6
        result[:, :, :, :, :, depth] = frame.reshape(*blocks, CHANNELS).transpose(
            0, 3, 1, 4, 6, 2, 5
        )
    rows, columns = height // patch, width // patch
    return Frame(result.reshape(rows * columns, parameters.patch_bytes), rows, columns)
