"""Open a checkpoint: configuration, lazily read weights, tokenizer files.

Nothing from a model directory is imported or run, no pickle is opened, no link out of it is followed without consent;
`auto_map` in config.json is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from q35c import arguments, limits, strictjson
from q35c.config import ModelConfig
from q35c.errors import CheckpointError, ConfigError, InternalError, OptionError
from q35c.frontend import family
from q35c.frontend.directory import ModelDirectory
from q35c.frontend.dummy import DummyWeights
from q35c.frontend.hf_config import MAX_CONFIG_BYTES, read_hf_config, sampling_keys
from q35c.frontend.hf_vision import read_vision_config
from q35c.frontend.shards import Shards, has_tower
from q35c.vision.files import NAMES as PREPROCESSORS
from q35c.vision_config import VisionConfig

LoadFormat = Literal["auto", "safetensors", "dummy"]
# Files beside the weights, with the most bytes each may have.
FILE_LIMITS = {
    "tokenizer.json": limits.MAX_TOKENIZER_BYTES,
    "tokenizer_config.json": limits.MAX_TOKENIZER_CONFIG_BYTES,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 4 << 20,
    "chat_template.jinja": limits.MAX_TEMPLATE_BYTES,
    "chat_template.json": 1 << 20,  # may hold several
    "generation_config.json": 1 << 20,
    **dict.fromkeys(PREPROCESSORS, 1 << 20),
}
# What a tokenizer is made of where there is no tokenizer.json.
SLOW_LIMITS = {"vocab.json": 64 << 20, "merges.txt": 64 << 20}
OTHER_TEMPLATES = "additional_chat_templates"
LARGEST_FLOAT = float(np.finfo(np.float32).max)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


class Weights(Protocol):
    """Tensors by canonical name: from shards, or drawn."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to compile. Tensor names are Hugging Face's without the leading `model.`.

    `where` is the directory it was read from, empty for a family name; `notes` say what of the directory is not taken;
    `document` is its config.json, of which `config` is the text tower, and `tower` the vision tower if that is read too.
    """

    config: ModelConfig
    weights: Weights
    files: dict[str, bytes]
    where: str = ""
    notes: tuple[str, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    tower: VisionConfig | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises InternalError for a name the model does not have."""
        if name not in self.weights.shapes:
            raise InternalError(f"the model has no tensor {name!r}")
        return self.weights.shapes[name]

    def read(
        self, name: str, start: int = 0, stop: int | None = None, largest: float = LARGEST_FLOAT
    ) -> np.ndarray:
        """Return rows [start, stop) of axis 0 as float32, reading only their bytes.

        Raises CheckpointError for a value that is not finite or of a magnitude above `largest`.
        """
        count = self.shape(name)[0]
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise InternalError(f"rows {start}:{stop} of {name!r} are not within 0:{count}")
        rows = self.weights.rows(name, start, stop)
        # NaN passes through both and compares as false.
        if rows.size and not (rows.max() <= largest and rows.min() >= -largest):
            raise self._bad_value(name, rows, start, largest)
        return rows

    def _bad_value(
        self, name: str, rows: np.ndarray, start: int, largest: float
    ) -> CheckpointError:
        first, *others = np.argwhere(~(np.abs(rows) <= largest))[0].tolist()
        value = rows[(first, *others)]
        is_finite = bool(np.isfinite(value))
        return CheckpointError(
            f"tensor {name!r} holds a value that cannot be stored at {[start + first, *others]}",
            where=self.where,
            expected=f"a magnitude of at most {largest:.4g}" if is_finite else "finite values",
            got=f"{value:.4g}",
            hint="the checkpoint is damaged, or overflowed where it was merged or converted; "
            + ('precision="f32" holds more' if is_finite else "make it anew"),
        )


def open_checkpoint(
    source: str | Path,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    *,
    follow_links: bool = False,
    ignore_config: Collection[str] = (),
    vision: bool | None = False,
) -> Checkpoint:
    """Open a model directory, a hub id, or (with `load_format="dummy"`) a family name.

    With "dummy" only the configuration and the tokenizer files are read and the weights are drawn
    from `seed`. `follow_links` consents to links that lead out of the directory, `ignore_config` names keys of config.json
    that are read as if they were not there. `vision` asks for the vision tower; None takes that of a directory which has one,
    but none of a family name. Raises CheckpointError, ConfigError, UnsupportedConfig or OptionError.
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
        tower = family.load_tower(str(source)) if vision else None
        return Checkpoint(config, DummyWeights(config, seed, tower), {}, tower=tower)
    directory = _directory(source, follow_links)
    document, config, notes = _read_config(directory, ignore_config)
    files = _read_files(directory)
    if OTHER_TEMPLATES in directory.names():
        notes.append(f"{OTHER_TEMPLATES}: only the default chat template is taken")
    tower = _find_tower(directory, document, config, vision, load_format, notes)
    if load_format == "dummy":
        weights = DummyWeights(config, seed, tower)
    else:
        weights = Shards(directory, config, tower)
        notes.extend(weights.notes)
    return Checkpoint(config, weights, files, str(directory.root), tuple(notes), document, tower)


def _find_tower(
    directory: ModelDirectory, document: dict[str, Any], config: ModelConfig, vision: bool | None,
    load_format: LoadFormat, notes: list[str],
) -> VisionConfig | None:  # fmt: skip
    """Return the vision tower that is to be read, if any. Raises ConfigError, UnsupportedConfig or OptionError."""
    if vision is False:
        return None
    where = f"{directory.root}/config.json"
    tower = read_vision_config(document, where)
    if tower is None:
        if vision:
            raise OptionError("the checkpoint has no vision tower", where="vision", got=where)
        return None
    if vision is None and load_format != "dummy" and not has_tower(directory):
        notes.append("config.json: vision_config not taken, the weights are those of text alone")
        return None
    if tower.out_hidden_size != config.hidden_size:
        raise ConfigError(
            "the vision tower's rows are not as wide as the text model's", where=f"{where} at vision_config",
            expected=f"out_hidden_size {config.hidden_size}", got=tower.out_hidden_size,
        )  # fmt: skip
    return tower


def _directory(source: str | Path, follow_links: bool) -> ModelDirectory:
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(str(source)):
        path = _download(str(source))
    elif not path.is_dir():
        raise CheckpointError("is not a directory", where=str(path), hint=_no_directory_hint(path))
    return ModelDirectory(path, follow_links)


def _no_directory_hint(path: Path) -> str:
    """Return what to give instead of a path that is no directory."""
    if path.suffix == ".gguf":
        return (
            "GGUF files are not read; give the Hugging Face directory that the file was made from"
        )
    if path.suffix == ".safetensors":
        return "give the directory that holds it, with its config.json"
    if path.suffix == ".q35c":
        return "this is an artifact, compiled already: q35c generate runs it"
    known = f"give a directory, the id of a model on the hub, or one of {', '.join(family.names())}"
    return arguments.close_match(str(path), family.names()) or known


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


def _read_config(
    directory: ModelDirectory, ignore: Collection[str]
) -> tuple[dict[str, Any], ModelConfig, list[str]]:
    """Return config.json, what it says of the text tower, and notes of what it says in vain."""
    where = f"{directory.root}/config.json"
    data = directory.read("config.json", MAX_CONFIG_BYTES)
    document = strictjson.loads(data, where=where, limit=MAX_CONFIG_BYTES, error=ConfigError)
    config = read_hf_config(document, where, ignore)
    sampling = ", ".join(sampling_keys(document))
    is_note = sampling and "generation_config.json" not in directory.names()
    note = (
        f"config.json: {sampling} not taken; defaults of sampling stand in generation_config.json"
    )
    return document, config, [note] if is_note else []


def _read_files(directory: ModelDirectory) -> dict[str, bytes]:
    present = set(directory.names())
    limits = FILE_LIMITS if "tokenizer.json" in present else FILE_LIMITS | SLOW_LIMITS
    return {name: directory.read(name, limit) for name, limit in limits.items() if name in present}
