"""Compare what an artifact makes of a picture with eager PyTorch in float32: its rows, and the logits behind them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from q35c.artifact import Manifest
    from q35c.runtime import Model
    from q35c.vision_config import VisionConfig

Rows = NDArray[np.float32]
MOST_SIDE = 18  # patches of the picture's larger side

# The least cosine of a row, by the format of the tower's weights; f32 by the largest difference instead.
COSINES = {"bf16": 0.999, "i8g32": 0.99}
DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True)
class PictureComparison:
    """A picture of random pixels, compared; differences are shares of the oracle's range."""

    grid: tuple[int, int]  # rows and columns of patches
    precision: str  # format of the tower's weights
    difference: float
    least_cosine: float  # of a row
    logits_difference: float  # of the token behind the picture


def random_picture(manifest: Manifest, seed: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Return patches of random pixels, and a grid that is no square and that the artifact takes."""
    assert manifest.vision is not None
    config, tower = manifest.vision.config, manifest.vision.tower
    rows = max(2, min(MOST_SIDE - 4, int((4 * tower.tokens) ** 0.5) // 4 * 2))
    columns = max(2, min(MOST_SIDE, 4 * tower.tokens // rows) // 2 * 2)
    shape = (rows * columns, config.patch_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8), (rows, columns)


def compare_picture(
    model: Model, oracle: Any, source: str | os.PathLike[str], ids: Sequence[int], seed: int, **options: Any
) -> PictureComparison:  # fmt: skip
    """Compare a random picture, and the logits of a prompt of the ids with the picture in their midst.

    `oracle` is the eager text model; `options` are those of `open_checkpoint`.
    """
    from q35c.runtime import MultimodalPrompt, Picture

    patches, grid = random_picture(model.manifest, seed)
    got = model.see(patches, grid)
    want = oracle_rows(source, patches, grid, seed=seed, **options)
    height, width = grid[0] // 2, grid[1] // 2
    head, tail = list(ids[:8]), list(ids[-8:])
    prompt = MultimodalPrompt.join([head, Picture(got, height, width), tail])
    with model.session() as session:
        logits = session.prefill(prompt)
    exact = MultimodalPrompt.join([head, Picture(want, height, width), tail])
    expected = oracle_last_logits(oracle, exact)
    cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    return PictureComparison(
        grid,
        tower_format(model.manifest),
        float(np.abs(got - want).max() / np.ptp(want)),
        float(cosines.min()),
        float(np.abs(logits - expected).max() / np.ptp(expected)),
    )


def check_picture(found: PictureComparison, promised: float | None) -> tuple[str, ...]:
    """Return a sentence for every promise that is not kept; `promised` is the logits' largest difference, if there is one."""
    failures: list[str] = []
    least = COSINES.get(found.precision)
    if least is None and not found.difference <= DIFFERENCE:
        failures.append(
            f"rows of a picture differ by {found.difference:.3g}, promised {DIFFERENCE:.0e} at most"
        )
    if least is not None and not found.least_cosine >= least:
        failures.append(
            f"a row of a picture has a cosine of {found.least_cosine:.5f}, promised {least} at least"
        )
    # What a tower rounds grows in the layers behind it: no bound was measured.
    if least is None and promised is not None and not found.logits_difference <= promised:
        failures.append(
            f"logits behind a picture differ by {found.logits_difference:.3g}, promised {promised:.0e} at most"
        )
    return tuple(failures)


def tower_format(manifest: Manifest) -> str:
    """Return the format of most of a tower's matrices."""
    assert manifest.vision is not None
    weights = manifest.weights[manifest.vision.tower.first_weight :]
    formats = [weight.format for weight in weights if weight.layout == "linear"]
    return max(set(formats), key=formats.count)


def oracle_rows(
    source: str | os.PathLike[str], patches: NDArray[np.uint8], grid: tuple[int, int], seed: int = 0, **options: Any
) -> Rows:  # fmt: skip
    """Return what transformers' eager tower makes of a picture in float32."""
    import torch

    from q35c.frontend.checkpoint import open_checkpoint
    from q35c.frontend.tensors import TOWER_PREFIX
    from q35c.frontend.trace_vision import PIXEL_SCALE

    checkpoint = open_checkpoint(str(source), seed=seed, vision=True, **options)
    assert checkpoint.tower is not None
    model = eager_tower(checkpoint.tower)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = torch.from_numpy(checkpoint.read(f"{TOWER_PREFIX}{name}"))
            parameter.copy_(stored.reshape(parameter.shape))
        pixels = torch.from_numpy(patches).float() * PIXEL_SCALE - 1
        return model(pixels, grid_thw=torch.tensor([[1, *grid]])).pooler_output.numpy()


def eager_tower(config: VisionConfig) -> Any:
    """Return transformers' tower in float32, with weights as they are drawn at first."""
    from q35c.frontend.trace_vision import hf_vision_config, vision_module

    return vision_module().Qwen3_5VisionModel(hf_vision_config(config)).float().eval()


def oracle_last_logits(oracle: Any, prompt: Any) -> Rows:
    """Run the eager text model on a prompt with pictures: logits f32[V] of the last token."""
    import torch

    ids = torch.from_numpy(np.maximum(prompt.ids, 0))
    with torch.no_grad():
        embedded = oracle.get_input_embeddings()(ids)
        embedded[torch.from_numpy(prompt.ids < 0)] = torch.from_numpy(prompt.rows)
        positions = torch.from_numpy(prompt.positions.astype(np.int64))[:, None]
        made = oracle(inputs_embeds=embedded[None], position_ids=positions, use_cache=False)
    return made.logits[0, -1].numpy()
