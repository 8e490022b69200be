"""The shapes of the Qwen3.5 family, for dummy weights, plans and tests.

A real checkpoint is compiled from its own `config.json`, never from this table.
"""

from functools import cache
from importlib import resources

from q35c import strictjson
from q35c.config import ModelConfig
from q35c.errors import ConfigError, OptionError
from q35c.frontend.hf_config import MAX_CONFIG_BYTES, read_hf_config
from q35c.vision_config import VisionConfig

# Depth, hidden size, heads and inner width of the vision towers; the largest one is that of all models from 9B on.
_SMALL, _MEDIUM, _LARGE = (12, 768, 12, 3072), (24, 1024, 16, 4096), (27, 1152, 16, 4304)
_TOWERS = {"qwen3.5-0.8b": _SMALL, "qwen3.5-2b": _MEDIUM, "qwen3.5-4b": _MEDIUM}


@cache
def names() -> tuple[str, ...]:
    """List the models by name, such as `qwen3.5-0.8b`, smallest first."""
    files = [entry.name for entry in resources.files(__name__).iterdir()]
    found = [name.removesuffix(".json") for name in files if name.endswith(".json")]
    return tuple(sorted(found, key=_billions))


def load(name: str) -> ModelConfig:
    """Return the configuration of one model. Raises OptionError for an unknown name."""
    if name not in names():
        raise OptionError(f"no model {name!r:.80} in the family", expected=", ".join(names()))
    data = (resources.files(__name__) / f"{name}.json").read_bytes()
    document = strictjson.loads(data, where=name, limit=MAX_CONFIG_BYTES, error=ConfigError)
    return read_hf_config(document, where=name)


def load_tower(name: str) -> VisionConfig:
    """Return the configuration of one model's vision tower. Raises OptionError for an unknown name."""
    hidden = load(name).hidden_size
    depth, width, heads, inner = _TOWERS.get(name, _LARGE)
    return VisionConfig(
        depth=depth, hidden_size=width, num_heads=heads, intermediate_size=inner, out_hidden_size=hidden,
        patch_size=16, temporal_patch_size=2, num_position_embeddings=2304, image_token_id=248056,
        video_token_id=248057, vision_start_token_id=248053, vision_end_token_id=248054,
    )  # fmt: skip


def _billions(name: str) -> float:
    return float(name.removeprefix("qwen3.5-").partition("b")[0])
