"""R2: every field of the manifest, mutated, by someone who also puts every hash and offset right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from q35c import strictjson
from q35c.artifact import layout, read_artifact
from q35c.artifact.manifest import Manifest
from q35c.artifact.reader import parse_manifest
from q35c.artifact.schema import fields_of
from q35c.config import ModelConfig, RopeParameters
from q35c.errors import ArtifactError
from tests.fake_artifact import MODEL, with_manifest, write_small

VALUES: list[Any] = [
    0,
    1,
    -1,
    2**31,
    2**53,
    2**63,
    10**400,
    1.5,
    -0.0,
    True,
    None,
    "",
    "x",
    [],
    [0],
    {},
]
MISSING, DUPLICATE, NAN = object(), object(), object()
# Fields that no offset, size or pointer depends on: another value in them is another valid artifact.
FREE = ("producer", "kernels", "generation")
Place = tuple[str | int, ...]
# Together they hold every field that a model's config can have.
MODELS: dict[str, dict[str, Any]] = {
    "dense": MODEL,
    "mixture of experts": {
        **{key: value for key, value in MODEL.items() if key != "intermediate_size"},
        "model_type": "qwen3_5_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "yarn": {
        **MODEL,
        "rope_parameters": {
            **MODEL["rope_parameters"],
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 1.5,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mutants") / "whole"
    write_small(path)
    return path.read_bytes()


def manifest_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["q35c"])


def places(tree: Any, path: Place = ()) -> Iterator[Place]:
    """Yield the path of every value in a document."""
    if path:
        yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(tree: Any, place: Place, value: Any) -> str:
    """Return the document as canonical JSON text with one value changed."""
    tree = copy.deepcopy(tree)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    mark = "@@mutant@@"
    if value is MISSING:
        del parent[place[-1]]
    elif value is DUPLICATE:
        parent[place[-1]] = [mark, parent[place[-1]]]
    else:
        parent[place[-1]] = mark
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    if value is DUPLICATE:
        key = json.dumps(place[-1])
        return text.replace(f'{key}:["{mark}",', f"{key}:0,{key}:[", 1)
    literal = "NaN" if value is NAN else None if value is MISSING else json.dumps(value)
    return text if literal is None else text.replace(f'"{mark}"', literal)


def forge(data: bytes, text: str) -> bytes:
    """Return the file with this manifest, and with the header it implies where it implies one."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        document = strictjson.loads(text.encode(), where="", limit=1 << 24, error=ArtifactError)
        manifest = Manifest.from_dict(document)
        raw = manifest.to_json()
    except ArtifactError:
        return with_manifest(data, text)
    import hashlib

    digest = hashlib.sha256(raw).hexdigest()
    body = layout.build_header(raw, digest, manifest.segments, manifest.weights) + data[start:]
    size = start + layout.segment_offsets(manifest.segments)[1]
    return body + bytes(max(0, min(size, 1 << 20) - len(body)))


def load_fully(path: Path, data: bytes) -> Manifest | None:
    """Return the manifest if the file is accepted, None if it is refused as it should be."""
    path.write_bytes(data)
    try:
        with read_artifact(path) as artifact:
            artifact.verify_segments()
            artifact.verify_weights()
            return artifact.manifest
    except ArtifactError:
        return None


def test_the_sample_shows_every_field_of_the_schema(whole: bytes) -> None:
    """The mutants are made from a sample document: it must hold every field that the schema has."""

    def check(kind: Any, value: Any) -> None:
        if isinstance(value, dict) and hasattr(kind, "__dataclass_fields__"):
            assert set(value) == set(fields_of(kind))
            for name, inner in fields_of(kind).items():
                check(unwrap(inner), value[name])
        elif isinstance(value, (list, dict)) and value:
            items = list(value.values()) if isinstance(value, dict) else value
            check(unwrap(kind.__args__[-1 if isinstance(value, dict) else 0]), items[0])

    def unwrap(kind: Any) -> Any:
        return kind.__origin__ if hasattr(kind, "__metadata__") else kind

    sample = manifest_of(whole)
    del sample["model"]  # its schema is ModelConfig's own: the next test
    kinds = fields_of(Manifest)
    for name, value in sample.items():
        check(unwrap(kinds[name]), value)
    assert set(sample) | {"model"} == set(kinds)


def test_the_sample_models_show_every_field_of_the_config() -> None:
    assert {key for model in MODELS.values() for key in model} == set(ModelConfig.__slots__)
    ropes = [model["rope_parameters"] for model in MODELS.values()]
    assert {key for rope in ropes for key in rope} == set(RopeParameters.__slots__)


@pytest.mark.parametrize("kind", MODELS)
def test_every_field_with_every_value(tmp_path: Path, kind: str) -> None:
    """All fields on the dense model's manifest, the model's own fields on the others'."""
    write_small(tmp_path / "whole", model=MODELS[kind])
    whole = (tmp_path / "whole").read_bytes()
    sample = manifest_of(whole)
    chosen = [place for place in places(sample) if kind == "dense" or place[0] == "model"]
    accepted = tried = 0
    for place in chosen:
        is_key = isinstance(place[-1], str)
        for value in [*VALUES, NAN, *([MISSING, DUPLICATE] if is_key else [])]:
            text = mutate(sample, place, value)
            tried += 1
            try:
                parse_manifest(text.encode())
            except ArtifactError:
                continue  # the reader goes no further; the cases below go through a file
            manifest = load_fully(tmp_path / "mutant", forge(whole, text))
            if manifest is not None and json.loads(manifest.to_json()) != sample:
                accepted += 1
                assert place[0] in FREE, f"{place} = {value!r} was accepted"
    assert tried > 12 * len(chosen)
    assert accepted > 10 or kind != "dense"


SHAPES: dict[str, Any] = {
    "overlapping weights": ("weights", 1, "offset", 0),
    "weights out of order": ("weights", 0, "offset", 256),
    "a gap between weights": ("weights", 1, "offset", 320),
    "unaligned weight": ("weights", 1, "offset", 257),
    "weight larger than its shape": ("weights", 0, "bytes", 512),
    "enormous shape": ("weights", 0, "shape", [2**31 - 1] * 8),
    "shape that wraps to the right size": (
        "weights",
        0,
        "shape",
        [2**31 - 1, 2**31 - 1, 2**31 - 1, 16],
    ),
    "same name twice": ("weights", 1, "name", "a.weight"),
    "a weight called like a segment": ("weights", 1, "name", "code"),
    "a weight called like the metadata": ("weights", 1, "name", "__metadata__"),
    "overlapping state": ("state", "tensors", 1, "offset", 0),
    "state shape of another model": ("state", "tensors", 1, "shape", [2, 32, 16]),
    "bf16 recurrent state": ("state", "tensors", 1, "dtype", "bf16"),
    "fixed tensor that grows": ("state", "tensors", 1, "layout", "cells32"),
    "cache in another layout": ("state", "tensors", 2, "layout", "int8-pairs"),
    "cache of two types": ("state", "tensors", 2, "dtype", "bf16"),
    "weight in another layout": ("weights", 0, "layout", "conv"),
    "weight in another layout of this shape": ("weights", 0, "layout", "swiglu"),
    "weight in another format": ("weights", 0, "format", "bf16"),
    "weight in a format of rows": ("weights", 0, "format", "q8g64"),
    "weight in no format": ("weights", 0, "format", "i4g63"),
    "vector of integers": ("weights", 1, "format", "i8g64"),
    "weight of more rows": ("weights", 0, "matrix", [33, 2]),
    "weight of more axes": ("weights", 0, "matrix", [1, 32, 2]),
    "rows in a layout of another type": ("row_layouts", "q8g64", "bf16-pairs"),
    "rows in another layout": ("row_layouts", "q8g64", "int8-sums-starts"),
    "larger batch": ("batch", 5),
    "larger context": ("context", 288),
    "smaller context": ("context", 128),
    "context of part of a block": ("context", 100),
    "larger largest context": ("max_context", 512),
    "more threads than the arena has scratch for": ("max_threads", 9),
    "smaller arena": ("arena_bytes", 64),
    "larger decode": ("entries", 1, "sequences", 5),
    "more tokens of each sequence": ("entries", 1, "tokens", 2),
    "no entry for a batch": ("entries", 1, "logits", "last"),
    "no entry for the last logits": ("entries", 0, "inputs", ["tokens"]),
    "entry that returns more logits": ("entries", 0, "logits", "all"),
    "entry that returns logits of what it only appends": ("entries", 3, "logits", "last"),
    "pieces of another size than the last": ("entries", 3, "tokens", 8),
    "another symbol": ("entries", 0, "symbol", "decode"),
    "more steps than the clock has words for": ("entries", 0, "steps", [0, 0]),
    "a step of a kernel that is not there": ("entries", 1, "steps", [1]),
    "a step with a weight that is not there": ("entries", 1, "step_weights", [2]),
    "a step without a weight's number": ("entries", 1, "step_weights", [0, 0]),
    "fewer kernels than the steps name": ("kernels", []),
    "a smaller clock": ("io", "fields", "clock", "shape", [2]),
    "another program as a probe": ("probes", 0, "symbol", "decode"),
    "smaller vocabulary": ("model", "vocab_size", 256),
    "stop id outside the vocabulary": ("generation", "stop_ids", [270]),
    "fewer features": ("target", "cpu_features", []),
    "another target": ("target", "name", "cuda:sm_90"),
    "another backend": ("target", "backend", "cuda"),
    "path as a name": ("segments", "../../etc/passwd", {"bytes": 1, "sha256": "0" * 64}),
    "control characters": ("producer", "a\nb"),
    "surrogate": ("producer", "\ud800"),
}


# What contradicts nothing else in the manifest: only the code's trailer tells.
PLAUSIBLE = {
    "more tokens of each sequence",
    "weight in another layout of this shape",
    "more threads than the arena has scratch for",
    "another symbol",
    "rows in another layout",
    "fewer features",
    "another program as a probe",
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_attack(tmp_path: Path, whole: bytes, name: str) -> None:
    *place, value = SHAPES[name]
    tree = manifest_of(whole)
    if place[0] == "segments":
        tree["segments"][place[1]] = None
    text = mutate(tree, tuple(place), value)
    assert load_fully(tmp_path / "mutant", forge(whole, text)) is None
    if name in PLAUSIBLE:
        parse_manifest(text.encode())
    else:
        with pytest.raises(ArtifactError):
            parse_manifest(text.encode())


def test_keeping_memory_consistent_does_not_help(tmp_path: Path, whole: bytes) -> None:
    """A plan that adds up but is not the one the code was made for: the code's trailer tells."""
    tree = manifest_of(whole)
    tree["arena_bytes"] = tree["memory"]["arena"] = 64
    tree["memory"]["peak"] -= 4096 - 64
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    Manifest.from_dict(json.loads(text))
    path = tmp_path / "mutant"
    path.write_bytes(forge(whole, text))
    with pytest.raises(ArtifactError, match="another manifest"), read_artifact(path) as artifact:
        artifact.verify_segments()


def test_a_state_with_room_to_spare_is_refused(whole: bytes) -> None:
    """Every sum that depends on the state's size is put right: only its own tensors tell."""
    tree = manifest_of(whole)
    tree["state"]["bytes"] += 64
    tree["memory"]["state_per_sequence"] += 64
    tree["memory"]["peak"] += 64 * tree["batch"]
    with pytest.raises(ArtifactError, match=r"state\.bytes"):
        Manifest.from_dict(tree)
