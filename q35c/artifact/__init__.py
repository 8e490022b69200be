"""The artifact: one safetensors file that holds code, weights, tokenizer and a checked manifest."""

from q35c.artifact.manifest import Manifest
from q35c.artifact.reader import Artifact, read_artifact
from q35c.artifact.writer import ArtifactWriter, WeightEntry, place_weights

__all__ = [
    "Artifact",
    "ArtifactWriter",
    "Manifest",
    "WeightEntry",
    "place_weights",
    "read_artifact",
]
