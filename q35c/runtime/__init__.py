"""The runtime: loads an artifact and generates. Needs numpy; tokenizers and jinja2 only for text.

It never imports torch, transformers, tvm or the compiler's packages.
"""

from q35c.runtime.generate import Generation, Stream, Timings
from q35c.runtime.load import load_model
from q35c.runtime.model import Model
from q35c.runtime.multimodal import MultimodalPrompt, Picture
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.sampling import Sampler, SamplingOptions
from q35c.runtime.saved import Checkpoint, Snapshot
from q35c.runtime.session import Session
from q35c.runtime.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "Generation",
    "Model",
    "MultimodalPrompt",
    "Picture",
    "PrefixCache",
    "Sampler",
    "SamplingOptions",
    "Session",
    "Snapshot",
    "Stream",
    "Timings",
    "Tokenizer",
    "load_model",
]
