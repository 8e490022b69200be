"""Open a checkpoint: configuration, lazily read weights, tokenizer files.

Nothing from a model directory is imported or run, no pickle is opened, no link is followed;
`auto_map` in config.json is ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from q35c import arguments, family, strictjson
from q35c.config import MAX_CONFIG_BYTES, ModelConfig
from q35c.errors import CheckpointError, ConfigError, InternalError
from q35c.frontend.directory import ModelDirectory
from q35c.frontend.dummy import DummyWeights
from q35c.frontend.shards import Shards

LoadFormat = Literal["auto", "safetensors", "dummy"]
# Files that travel into the artifact, with the most bytes each may have.
FILE_LIMITS = {
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 4 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


class Weights(Protocol):
    """Tensors by canonical name: from shards, or drawn."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to compile. Tensor names are Hugging Face's without the leading `model.`."""

    config: ModelConfig
    weights: Weights
    files: dict[str, bytes]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises InternalError for a name the model does not have."""
        if name not in self.weights.shapes:
            raise InternalError(f"the model has no tensor {name!r}")
        return self.weights.shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows [start, stop) of axis 0 as float32, reading only their bytes."""
        count = self.shape(name)[0]
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise InternalError(f"rows {start}:{stop} of {name!r} are not within 0:{count}")
        return self.weights.rows(name, start, stop)


def open_checkpoint(
    source: str | Path, load_format: LoadFormat = "auto", seed: int = 0
) -> Checkpoint:
    """Open a model directory, a hub id, or (with `load_format="dummy"`) a family name.

    With "dummy" only the configuration and the tokenizer files are read and the weights are drawn
    from `seed`. Raises CheckpointError, ConfigError or UnsupportedConfig.
    """
    arguments.choice("load_format", load_format, get_args(LoadFormat), "load format")
    seed = arguments.integer("seed", seed, 0, 2**64 - 1)
    source = arguments.path("source", source)
    if str(source) in family.names() and not Path(source).exists():
        if load_format != "dummy":
            raise CheckpointError(
                f"{str(source)!r} is a family name, it has no weights",
                hint='give a model directory, or load_format="dummy" for random weights',
            )
        config = family.load(str(source))
        return Checkpoint(config, DummyWeights(config, seed), {})
    directory = _directory(source)
    config = _read_config(directory)
    files = _read_files(directory)
    is_dummy = load_format == "dummy"
    weights = DummyWeights(config, seed) if is_dummy else Shards(directory, config)
    return Checkpoint(config, weights, files)


def _directory(source: str | Path) -> ModelDirectory:
    path = Path(source)
    if not path.exists() and "/" not in str(source):
        raise CheckpointError(
            "no such directory, and no model of the family",
            where=str(source),
            expected=f"a directory, an id of the hub, or of {', '.join(family.names())}",
            hint=arguments.close_match(str(source), family.names()),
        )
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        return ModelDirectory(path)
    snapshot = _download(str(source))
    return ModelDirectory(snapshot, links_into=snapshot.parent.parent / "blobs")


def _download(hub_id: str) -> Path:
    """Fetch a snapshot through the hub client, data files only."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS, etag_timeout=10))
    except Exception as error:  # the client raises its transport library's own types
        raise CheckpointError(
            f"is neither a directory here nor could it be downloaded: {error!s:.300}",
            where=hub_id,
            hint="give the path of a model directory, or check the network and the id",
        ) from error


def _read_config(directory: ModelDirectory) -> ModelConfig:
    where = f"{directory.root}/config.json"
    data = directory.read("config.json", MAX_CONFIG_BYTES)
    document = strictjson.loads(data, where=where, limit=MAX_CONFIG_BYTES, error=ConfigError)
    return ModelConfig.from_hf(document, where)


def _read_files(directory: ModelDirectory) -> dict[str, bytes]:
    present = set(directory.names())
    return {
        name: directory.read(name, limit) for name, limit in FILE_LIMITS.items() if name in present
    }
