"""The shapes of the Qwen3.5 family, for dummy weights, plans and tests.

A real checkpoint is compiled from its own `config.json`, never from this table.
"""

from functools import cache
from importlib import resources

from q35c import strictjson
from q35c.config import ModelConfig
from q35c.errors import ConfigError, OptionError
from q35c.frontend.hf_config import MAX_CONFIG_BYTES, read_hf_config


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


def _billions(name: str) -> float:
    return float(name.removeprefix("qwen3.5-").partition("b")[0])
