"""The manifest: what an artifact says about itself, as frozen dataclasses with limits.

These classes are the schema (see `schema.py`). `Manifest.from_dict` additionally has everything recomputed that follows
from other fields (see `consistency.py`) and refuses a manifest that disagrees.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, cast

from q35c import strictjson
from q35c.artifact.consistency import check_consistent
from q35c.artifact.entries import ROWS, Entry, TextEntries, text_entries
from q35c.artifact.kernels import Kernel
from q35c.artifact.leaves import (
    Bytes,
    Format,
    Generation,
    Io,
    Memory,
    Probe,
    Segment,
    State,
    Text,
    Weight,
)
from q35c.artifact.schema import Items, Pattern, Range, Reader, decode, encode
from q35c.artifact.target import Target
from q35c.artifact.tower import Vision
from q35c.config import MAX_CONTEXT, ModelConfig
from q35c.errors import ArtifactVersionError
from q35c.layouts import blobs
from q35c.layouts.rows import RowLayout

FORMAT = 4
_PLAN_MARK = b"\nq35c-plan:"
TRAILER_BYTES = len(_PLAN_MARK) + 2 * hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about an artifact but its data."""

    format: Literal[4]
    producer: Text
    model: Annotated[ModelConfig, Reader(ModelConfig.from_dict)]
    vision: Vision | None
    target: Target
    precision: Annotated[str, Pattern(r"[a-z0-9_\-]{1,32}")]
    context: Annotated[int, Range(1, MAX_CONTEXT)]
    max_context: Annotated[int, Range(1, MAX_CONTEXT)]
    batch: Annotated[int, Range(1, 1024)]
    entries: Annotated[tuple[Entry, ...], Items(3, 16)]
    io: Io
    row_layouts: Annotated[Mapping[Format, RowLayout], Items(0, 8)]
    arena_bytes: Bytes
    max_threads: Annotated[int, Range(1, 1024)]
    barrier_bytes: Annotated[int, Range(64, blobs.MAX_BARRIER_BYTES)]
    state: State
    weights: Annotated[tuple[Weight, ...], Items(1, 16384)]
    weights_bytes: Bytes
    kernels: Annotated[tuple[Kernel, ...], Items(0, 4096)]
    probes: Annotated[tuple[Probe, ...], Items(0, 16)]
    segments: Annotated[Mapping[str, Segment], Items(2, 16, r"[a-z][a-z0-9_]{0,31}")]
    generation: Generation
    memory: Memory

    @classmethod
    def from_dict(cls, document: object) -> "Manifest":
        """Check a parsed manifest completely. Raises ArtifactError or ArtifactVersionError."""
        if isinstance(document, dict):
            version: object = cast(dict[str, object], document).get("format")
            if type(version) is int and version != FORMAT:
                raise ArtifactVersionError(
                    "the artifact has another format version",
                    expected=FORMAT,
                    got=version,
                    hint="compile the model again, or install the q35c that wrote this file",
                )
        manifest = decode(cls, cast(object, document), "$")
        check_consistent(manifest)
        return manifest

    def to_json(self) -> bytes:
        """Return the canonical JSON form."""
        return strictjson.dumps(encode(self))

    def entry(self, name: str) -> Entry | None:
        """Return the entry of that name, or None."""
        return next((entry for entry in self.entries if entry.name == name), None)

    @property
    def text_entries(self) -> TextEntries:
        """Return the entries that generating text takes; a checked manifest has them."""
        return text_entries(self.entries, self.context, self.batch)

    @property
    def takes_rows(self) -> bool:
        """Say whether the entries of prompts take rows of pictures in place of tokens."""
        return all(ROWS in entry.inputs for entry in self.text_entries[:3])

    @property
    def text_weights_bytes(self) -> int:
        """Return the bytes of the weights without those that only pictures need."""
        first = len(self.weights) if self.vision is None else self.vision.tower.first_weight
        return self.weights[first].offset if first < len(self.weights) else self.weights_bytes

    @property
    def tower_bytes(self) -> int:
        """Return the bytes that seeing pictures takes beside those of text: weights, buffers, inputs and rows."""
        if self.vision is None:
            return 0
        tower = self.vision.tower
        weights = self.weights_bytes - self.text_weights_bytes
        return weights + tower.io.bytes + max(0, tower.arena_bytes - self.arena_bytes)

    @property
    def plan_digest(self) -> bytes:
        """Return the SHA-256 of everything that generated code relies on.

        The code segment ends with it, so that whoever vouches for the code's hash vouches for the
        offsets, sizes and limits that the code was made for. Hashes and sampling are not part of it.
        """
        plan = {name: encode(getattr(self, name)) for name in _PLAN_FIELDS}
        return hashlib.sha256(strictjson.dumps(plan)).digest()

    def with_weights_hash(self, sha256: str) -> "Manifest":
        """Return the manifest with the hash of the weights filled in."""
        weights = replace(self.segments["weights"], sha256=sha256)
        return replace(self, segments={**self.segments, "weights": weights})

    @property
    def code_trailer(self) -> bytes:
        """Return the last bytes of the code segment, which bind the code to this plan."""
        return _PLAN_MARK + self.plan_digest.hex().encode()


_NOT_OF_PLAN = ("producer", "kernels", "segments", "generation")
_PLAN_FIELDS = tuple(f.name for f in fields(Manifest) if f.name not in _NOT_OF_PLAN)
