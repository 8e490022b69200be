"""The manifest: what an artifact says about itself, as frozen dataclasses with limits.

These classes are the schema (see `schema.py`). `Manifest.from_dict` additionally recomputes everything
that follows from other fields (offsets, sizes, memory, the shapes that the model config implies) and
refuses a manifest that disagrees.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

from q35c import strictjson
from q35c.artifact import layout
from q35c.artifact.kernels import Kernel, Symbol
from q35c.artifact.schema import Items, Pattern, Range, Reader, decode, encode, refuse
from q35c.config import FULL, LINEAR, MAX_CONTEXT, MAX_STOP_IDS, ModelConfig
from q35c.errors import ArtifactVersionError
from q35c.layouts import blobs
from q35c.layouts.cache import CELLS, CacheLayout, cache_layout, stored_shape

FORMAT = 3
PLAN_MARK = b"\nq35c-plan:"

Flag = bool
Name = Annotated[str, Pattern(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,119}")]
Text = Annotated[str, Pattern(r"[ -~]{1,200}")]
Hash = Annotated[str, Pattern(r"[0-9a-f]{64}")]
Bytes = Annotated[int, Range(1, 2**45)]
Offset = Annotated[int, Range(0, 2**45)]
Dim = Annotated[int, Range(1, 2**31 - 1)]
Index = Annotated[int, Range(0, 2**16)]
Shape = Annotated[tuple[Dim, ...], Items(1, 8)]
TokenId = Annotated[int, Range(0, 2**24)]
DType = Literal["f32", "bf16", "i64", "i32", "i8", "u8"]


@dataclass(frozen=True, slots=True)
class Target:
    """The machine that the code was compiled for; features as in /proc/cpuinfo."""

    name: Annotated[str, Pattern(r"cpu:[a-z0-9_.\-]{1,60}")]
    cpu_features: Annotated[tuple[Annotated[str, Pattern(r"[a-z0-9_]{1,32}")], ...], Items(0, 128)]
    lanes: Annotated[int, Range(1, 64)]


@dataclass(frozen=True, slots=True)
class Entry:
    """A function of the code: its symbol, what its rows are and which rows it returns logits of.

    Step i calls kernel `steps[i]` of the manifest with weight `step_weights[i]`, -1 for none; those in
    `single_row_steps` compute one row, whatever T is.
    """

    name: Symbol
    symbol: Symbol
    rows: Literal["sequence", "batch"]
    max_tokens: Annotated[int, Range(1, 65536)]
    logits: Literal["none", "last", "all"]
    steps: Annotated[tuple[Index, ...], Items(1, 2**16)]
    step_weights: Annotated[tuple[Annotated[int, Range(-1, 2**16)], ...], Items(1, 2**16)]
    single_row_steps: Annotated[tuple[Index, ...], Items(0, 2**16)]

    @property
    def logits_rows(self) -> int:
        """Return how many rows of logits a call may write."""
        return blobs.logits_rows(self.logits, self.max_tokens)


@dataclass(frozen=True, slots=True)
class IoField:
    """A tensor in the io block, `offset` bytes from its start."""

    offset: Offset
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Io:
    """The block through which tokens go in and logits come out."""

    bytes: Bytes
    fields: Annotated[Mapping[str, IoField], Items(6, 6)]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of a sequence's state; one that grows with the context does so along axis 1."""

    name: Name
    offset: Offset
    dtype: Literal["f32", "bf16", "i8"]
    shape: Shape
    growth: Literal["fixed", "context"]

    @property
    def bytes(self) -> int:
        return blobs.tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class State:
    """The state of one sequence at the full context; all zero is the empty sequence."""

    bytes: Bytes
    tensors: Annotated[tuple[StateTensor, ...], Items(1, 4096)]


@dataclass(frozen=True, slots=True)
class Weight:
    """A packed weight, `offset` bytes from the first weight; `bytes` excludes the padding."""

    name: Name
    offset: Offset
    bytes: Bytes
    dtype: DType
    shape: Shape
    layout: Text
    sources: Annotated[tuple[Name, ...], Items(0, MAX_STOP_IDS)]


@dataclass(frozen=True, slots=True)
class Probe:
    """A function that measures the machine: each thread does `work` bytes or operations for a unit of T."""

    name: Literal["clock", "read", "cache", "int8", "bf16", "f32"]
    symbol: Symbol
    work: Annotated[int, Range(1, 2**30)]


@dataclass(frozen=True, slots=True)
class Segment:
    """A hashed stretch of the file; `bytes` excludes the padding."""

    bytes: Bytes
    sha256: Hash


@dataclass(frozen=True, slots=True)
class Generation:
    """How to sample when the caller does not say; `stop_ids` end a sequence."""

    do_sample: Flag
    temperature: Annotated[float, Range(0, 1000)]
    top_k: Annotated[int, Range(0, 2**24)]
    top_p: Annotated[float, Range(0, 1)]
    min_p: Annotated[float, Range(0, 1)]
    repetition_penalty: Annotated[float, Range(1e-3, 1000)]
    presence_penalty: Annotated[float, Range(-1000, 1000)]
    stop_ids: Annotated[tuple[TokenId, ...], Items(0, MAX_STOP_IDS)]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes the runtime needs: `peak` is for the whole batch at the full context."""

    weights: Bytes
    state_per_sequence: Bytes
    arena: Bytes
    io: Bytes
    peak: Bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about an artifact but its data."""

    format: Literal[3]
    producer: Text
    model: Annotated[ModelConfig, Reader(ModelConfig.from_dict)]
    target: Target
    precision: Annotated[str, Pattern(r"[a-z0-9_\-]{1,32}")]
    context: Annotated[int, Range(1, MAX_CONTEXT)]
    batch: Annotated[int, Range(1, 1024)]
    entries: Annotated[tuple[Entry, ...], Items(3, 16)]
    io: Io
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
    def plan_digest(self) -> bytes:
        """Return the SHA-256 of everything that generated code relies on.

        The code segment ends with it, so that whoever vouches for the code's hash vouches for the
        offsets, sizes and limits that the code was made for. Hashes and sampling are not part of it.
        """
        plan = encode(self)
        for name in ("producer", "kernels", "segments", "generation"):
            del plan[name]
        return hashlib.sha256(strictjson.dumps(plan)).digest()

    def with_weights_hash(self, sha256: str) -> "Manifest":
        """Return the manifest with the hash of the weights filled in."""
        weights = replace(self.segments["weights"], sha256=sha256)
        return replace(self, segments={**self.segments, "weights": weights})

    @property
    def code_trailer(self) -> bytes:
        """Return the last bytes of the code segment, which bind the code to this plan."""
        return PLAN_MARK + self.plan_digest.hex().encode()


def check_consistent(manifest: Manifest) -> None:
    """Recompute what follows from other fields. Raises ArtifactError naming the field."""
    _check_entries(manifest)
    expected_io = blobs.io_layout(
        blobs.max_tokens(manifest.entries),
        manifest.batch,
        max(entry.logits_rows for entry in manifest.entries),
        manifest.model.vocab_size,
        max(len(entry.steps) for entry in manifest.entries),
    )
    _check_equal("$.io", encode(manifest.io), expected_io)
    _check_state(manifest)
    _check_weights(manifest)
    _check_segments(manifest)
    expected_memory = layout.memory_plan(
        weights=manifest.weights_bytes,
        state=manifest.state.bytes,
        arena=manifest.arena_bytes,
        io=manifest.io.bytes,
        batch=manifest.batch,
    )
    _check_equal("$.memory", encode(manifest.memory), expected_memory)
    for token in manifest.generation.stop_ids:
        if token >= manifest.model.vocab_size:
            raise refuse("$.generation.stop_ids", "id is outside the vocabulary", got=token)
    aligned = {"$.arena_bytes": manifest.arena_bytes, "$.barrier_bytes": manifest.barrier_bytes}
    for path, size in aligned.items():
        if size % blobs.ALIGNMENT:
            raise refuse(path, "size is not a multiple of 64", got=size)


def expected_state(
    config: ModelConfig, context: int, layout: CacheLayout
) -> Counter[tuple[str, tuple[int, ...]]]:
    """Return how many state tensors of each growth and shape a model has.

    Per linear-attention layer the conv inputs f32[K-1, C] and the delta state f32[Hv, Dk, Dv]; per
    full-attention layer keys and values in this layout.
    """
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    conv = (config.linear_conv_kernel_dim - 1, 2 * key_heads * key_dim + value_heads * value_dim)
    delta = (value_heads, key_dim, value_dim)
    heads, dim = config.num_key_value_heads, config.head_dim
    keys, values = (
        tuple(stored_shape(kind, heads, dim, context, layout)) for kind in ("keys", "values")
    )
    shapes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for kind in config.layer_types:
        if kind == LINEAR:
            shapes.update([("fixed", conv), ("fixed", delta)])
        elif kind == FULL:
            shapes.update([("context", keys), ("context", values)])
    return shapes


def _check_entries(manifest: Manifest) -> None:
    names = [entry.name for entry in manifest.entries]
    if len(set(names)) != len(names):
        raise refuse("$.entries", "two entries have one name", got=names)
    required = {"prefill": ("sequence", "last"), "decode": ("batch", "all"), "extend": ("sequence", "none")}  # fmt: skip
    for index, entry in enumerate(manifest.entries):
        kind = ("sequence", "all") if entry.name == "score" else required.get(entry.name)
        if kind is not None and (entry.rows, entry.logits) != kind:
            got = (entry.rows, entry.logits)
            raise refuse(f"$.entries[{index}]", "wrong rows or logits", expected=kind, got=got)
        if entry.rows == "batch" and entry.max_tokens != manifest.batch:
            raise refuse(
                f"$.entries[{index}].max_tokens",
                "a batch entry takes one token per sequence",
                expected=manifest.batch,
                got=entry.max_tokens,
            )
    if missing := sorted(required.keys() - set(names)):
        raise refuse("$.entries", f"entry {missing[0]!r} is missing", got=names)
    extend, prefill = (names.index(name) for name in ("extend", "prefill"))
    sizes = [entry.max_tokens for entry in manifest.entries]
    _check_equal(f"$.entries[{extend}].max_tokens", sizes[extend], sizes[prefill])
    for index, entry in enumerate(manifest.entries):
        _check_steps(f"$.entries[{index}]", entry, manifest)


def _check_steps(path: str, entry: Entry, manifest: Manifest) -> None:
    for name, numbers, things in (
        ("steps", entry.steps, manifest.kernels),
        ("step_weights", entry.step_weights, manifest.weights),
    ):
        _check_equal(f"{path}.{name} length", len(numbers), len(entry.steps))
        if max(numbers) >= len(things):
            raise refuse(f"{path}.{name}", "no such item", expected=len(things), got=max(numbers))


def _check_state(manifest: Manifest) -> None:
    if manifest.context % CELLS:
        raise refuse("$.context", f"not a multiple of {CELLS}", got=manifest.context)
    tensors = manifest.state.tensors
    specs = [(tensor.dtype, tensor.shape) for tensor in tensors]
    offsets, total = blobs.pack_tensors(specs)
    _check_equal("$.state.tensors offsets", [tensor.offset for tensor in tensors], offsets)
    _check_equal("$.state.bytes", manifest.state.bytes, total)
    _check_unique("$.state.tensors", [tensor.name for tensor in tensors])
    found = Counter((tensor.growth, tensor.shape) for tensor in tensors)
    cache, *others = sorted({t.dtype for t in tensors if t.growth == "context"}) or ["f32"]
    if others:
        raise refuse("$.state.tensors", "keys and values have two types", got=(cache, *others))
    has_pairs = "avx512_bf16" in manifest.target.cpu_features  # then the kernels want them
    form = cache_layout({"i8": "int8"}.get(cache, cache), has_pairs)
    expected = expected_state(manifest.model, manifest.context, form)
    _check_equal("$.state.tensors", found, expected)
    for index, tensor in enumerate(tensors):
        if tensor.growth == "fixed" and tensor.dtype != "f32":
            raise refuse(f"$.state.tensors[{index}].dtype", "recurrent state must be f32")


def _check_weights(manifest: Manifest) -> None:
    weights = manifest.weights
    specs = [(weight.dtype, weight.shape) for weight in weights]
    offsets, total = blobs.pack_tensors(specs)
    _check_equal("$.weights offsets", [weight.offset for weight in weights], offsets)
    sizes = [blobs.tensor_bytes(dtype, shape) for dtype, shape in specs]
    _check_equal("$.weights sizes", [weight.bytes for weight in weights], sizes)
    _check_equal("$.weights_bytes", manifest.weights_bytes, total)
    taken = [*manifest.segments, "__metadata__"]  # one table of names in the file's header
    _check_unique("$.weights", [weight.name for weight in weights] + taken)


def _check_segments(manifest: Manifest) -> None:
    for name in ("code", "weights"):
        if name not in manifest.segments:
            raise refuse("$.segments", f"segment {name!r} is missing")
    _check_equal(
        "$.segments.weights.bytes", manifest.segments["weights"].bytes, manifest.weights_bytes
    )


def _check_unique(path: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise refuse(path, "two tensors have one name", got=twice[0])


def _check_equal(path: str, got: Any, expected: Any) -> None:
    if got == expected:
        return
    if isinstance(got, list):
        pairs = enumerate(zip(cast(list[Any], got), expected, strict=True))
        index, (got, expected) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        path = f"{path} [{index}]"
    raise refuse(path, "does not follow from the other fields", expected=expected, got=got)
