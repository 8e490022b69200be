"""The artifact: one safetensors file that holds code, weights, tokenizer and a checked manifest.

Writing one is `artifact.writer`'s: running a model does not import it.
"""

from q35c.artifact.manifest import Manifest
from q35c.artifact.reader import Artifact, read_artifact

__all__ = ["Artifact", "Manifest", "read_artifact"]
