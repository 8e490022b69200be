"""Compare an artifact with eager PyTorch in float32, the oracle, on one sequence of tokens.

Needs the `compile` extra and memory for the whole model in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from q35c import arguments
from q35c.errors import OptionError
from q35c.verify_pictures import PictureComparison, check_picture, compare_picture

if TYPE_CHECKING:
    from q35c.frontend.checkpoint import Checkpoint
    from q35c.runtime import Model

Logits = NDArray[np.float32]
Progress = Callable[[str, float], None]

TIE = 1e-4  # of the logits' range: two tokens this close may swap places
_DECODED_TOKENS = 16
_RANDOM_TOKENS = 128
# Psalm 23 in the King James version: what most models of language have read, and the demo model's kind of text.
PARAGRAPH = """The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth
me beside the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Yea,
though I walk through the valley of the shadow of death, I will fear no evil: for thou art with me; thy rod and thy
staff they comfort me. Thou preparest a table before me in the presence of mine enemies: thou anointest my head with
oil; my cup runneth over. Surely goodness and mercy shall follow me all the days of my life: and I will dwell in the
house of the LORD for ever.""".replace("\n", " ")
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Promise:
    """What a precision keeps; differences are shares of the oracle's range, KL is in nats."""

    path_difference: float
    difference: float | None = None
    mean_kl: float | None = None


PROMISES = {
    "f32": Promise(path_difference=1e-4, difference=1e-3),
    # A row's value or a key that lies on the edge between two bf16 values may be rounded either way: on 12 texts up to
    # 2.3e-3 (AVX2), where f32 differs by less than 1e-5.
    "bf16": Promise(path_difference=3e-3, mean_kl=1e-3),
    # A last bit of difference may move an activation to the next int8 code. The KL are budgets on text of the
    # kind that a model was trained on; they are never loosened.
    "w8": Promise(path_difference=5e-2, mean_kl=1e-3),
    "w4": Promise(path_difference=5e-2, mean_kl=0.02),
    "w4-small": Promise(path_difference=5e-2, mean_kl=0.06),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Logits f32[S, V] against the oracle's."""

    difference: float  # largest absolute difference, as a share of the oracle's range
    mean_kl: float  # KL(oracle || artifact), mean over positions, nats
    max_kl: float
    agreement: float  # share of positions with the same likeliest token
    clear_disagreements: int  # positions with another likeliest token that is no tie


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The result of `verify_artifact`; `failures` is empty if every promise is kept."""

    precision: str
    tokens: int
    against_oracle: Comparison
    path_difference: float  # prefill and decode against score, as a share of the range
    failures: tuple[str, ...]
    picture: PictureComparison | None = None  # of an artifact that sees


def verify_artifact(
    artifact: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    text: str | None = None,
    ids: Sequence[int] | None = None,
    load_format: Any = "auto",
    seed: int = 0,
    follow_links: bool = False,
    ignore_config: Collection[str] = (),
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Compare on `ids`, on `text`, on `tokens` random ids drawn from `seed`, or else on a paragraph of English.

    Random ids are nothing that a model was trained on: there even eager PyTorch in bf16 is far from fp32. An
    artifact without a tokenizer is compared on 128 of them.
    `source` is what the artifact was compiled from; `load_format` and `seed` matter for dummy
    weights, `follow_links` and `ignore_config` are those of `open_checkpoint`. Raises what loading and checkpoints raise.
    """
    import q35c

    arguments.path("source", source)
    report = arguments.callback("progress", progress) or (lambda stage, fraction: None)
    consents = {"follow_links": follow_links, "ignore_config": ignore_config}
    with q35c.load(artifact, threads, device=device) as model:
        listed = _choose_ids(model, tokens, text, ids, seed)
        report("run artifact", 0.0)
        got = model.score(listed, lambda done, total: report("run artifact", done / total))
        stepped = step_logits(model, listed)
        precision = model.manifest.precision
        caches = {t.dtype for t in model.manifest.state.tensors if t.growth == "context"}
        report("load PyTorch model", 0.0)
        oracle = load_oracle(source, load_format, seed, **consents)
        report("run PyTorch model", 0.0)
        want = oracle_logits(oracle, listed)
        picture = None
        if model.manifest.vision is not None:
            report("compare a picture", 0.0)
            options = {"load_format": load_format, **consents}
            picture = compare_picture(model, oracle, source, listed, seed, **options)
    compared = compare_logits(got, want)
    path = _largest_difference(stepped, got[-len(stepped) :]) / _range(want)
    # A rounded cache is no reference; what it loses is less than what bf16 weights do.
    promised = "bf16" if precision == "f32" and caches - {"f32"} else precision
    failures = check_promise(promised, compared, path)
    if picture is not None:
        failures += check_picture(picture, PROMISES[promised].difference)
    return ParityReport(precision, len(listed), compared, path, failures, picture)


def compare_logits(got: Logits, want: Logits) -> Comparison:
    """Compare logits [S, V] row by row; NaN in `got` makes every figure NaN or worse."""
    if got.shape != want.shape:
        raise OptionError(
            "the artifact and the source are different models", expected=want.shape, got=got.shape
        )
    spread = _range(want)
    kl = row_kl(got, want)
    chosen, wanted = got.argmax(-1), want.argmax(-1)
    rows = np.arange(len(want))
    gap = want[rows, wanted] - want[rows, chosen]
    return Comparison(
        difference=_largest_difference(got, want) / spread,
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        agreement=float((chosen == wanted).mean()),
        clear_disagreements=int((gap > TIE * spread).sum()),
    )


def row_kl(got: Logits, want: Logits) -> NDArray[np.float64]:
    """Return KL(softmax(want) || softmax(got)) of every row in nats, computed in float64."""
    rows = max(1, _CHUNK_BYTES // (want.shape[-1] * 8 * 4))
    parts: list[NDArray[np.float64]] = []
    for start in range(0, len(want), rows):
        p = _log_softmax(want[start : start + rows])
        q = _log_softmax(got[start : start + rows])
        parts.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(parts)


def check_promise(precision: str, compared: Comparison, path: float) -> tuple[str, ...]:
    """Return a sentence for every promise of the precision that is not kept; NaN keeps none."""
    promise = PROMISES.get(precision)
    if promise is None:
        return (f"no promise is known for precision {precision}",)
    failures: list[str] = []

    def require(what: str, got: float, limit: float | None) -> None:
        if limit is not None and not got <= limit:
            failures.append(f"{what} is {got:.3g}, promised {limit:.0e} at most")

    require("max difference / range", compared.difference, promise.difference)
    require("mean KL", compared.mean_kl, promise.mean_kl)
    require("difference of prefill + decode from score / range", path, promise.path_difference)
    if promise.difference is not None and compared.clear_disagreements:
        failures.append(f"{compared.clear_disagreements} positions prefer another token")
    return tuple(failures)


def step_logits(model: Model, ids: Sequence[int]) -> Logits:
    """Return the logits of the last tokens by the other path: prefill, then token by token."""
    cut = max(1, len(ids) - _DECODED_TOKENS)
    with model.session() as session:
        rows = [session.prefill(ids[:cut])]
        rows += [session.decode(token) for token in ids[cut:]]
    return np.stack(rows)


def load_oracle(
    source: str | os.PathLike[str], load_format: Any = "auto", seed: int = 0, **consents: Any
) -> Any:
    """Return transformers' eager causal language model in float32, weights as stored.

    transformers reads a directory itself, which checks our reader, too. Where it does not find every tensor under the names
    and in the files that it knows, and for dummy weights, the tensors come from the checkpoint as it is compiled: none
    is ever left as it was initialised. `consents` are those of `open_checkpoint`.
    """
    from transformers.utils import logging

    from q35c.frontend.checkpoint import open_checkpoint

    # Its bar and its advice to install faster kernels would drown ours.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    checkpoint = open_checkpoint(str(source), load_format, seed, **consents)
    read = None if load_format == "dummy" else _read_by_transformers(checkpoint)
    return _fill_model(checkpoint) if read is None else read


def oracle_logits(oracle: Any, ids: Sequence[int]) -> Logits:
    """Run the oracle on one sequence: logits f32[S, V]."""
    import torch

    with torch.no_grad():
        return oracle(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def _read_by_transformers(checkpoint: Checkpoint) -> Any:
    """Return the model with the weights that transformers finds, None where it cannot read the directory or misses some."""
    import torch

    from q35c.frontend.trace import causal_lm_class, hf_config

    try:
        model, found = causal_lm_class(checkpoint.config).from_pretrained(
            checkpoint.where,
            config=hf_config(checkpoint.config),  # what a config.json means is decided in one place
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (
        Exception
    ):  # of any type: another name of a file, of a tensor, or an index that it does not take
        return None
    lost = [*found["missing_keys"], *found["mismatched_keys"], *(found.get("error_msgs") or ())]
    return None if lost else model.eval()


def _fill_model(checkpoint: Checkpoint) -> Any:
    """Build transformers' model from the checkpoint's own tensors."""
    import torch

    from q35c.frontend.trace import causal_lm_class, hf_config

    settings = hf_config(checkpoint.config)
    settings._experts_implementation = "eager"
    model = causal_lm_class(checkpoint.config)(settings).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(checkpoint.read(name.removeprefix("model."))))
    return model


def _choose_ids(
    model: Model, tokens: int | None, text: str | None, ids: Sequence[int] | None, seed: int
) -> list[int]:
    from q35c.runtime.prompts import check_ids

    seed = arguments.integer("seed", seed, 0, 2**64 - 1)
    if ids is not None:
        return check_ids(ids, model.vocab_size, model.context)
    if text is None and tokens is None and "tokenizer" in model.manifest.segments:
        return model.tokenizer.encode(PARAGRAPH)[: model.context]
    if text is not None:
        return model.tokenizer.encode(arguments.text("text", text))
    tokens = min(_RANDOM_TOKENS, model.context) if tokens is None else tokens
    tokens = arguments.integer("tokens", tokens, 1, model.context)
    return np.random.default_rng(seed).integers(0, model.vocab_size, tokens).tolist()


def _range(want: Logits) -> float:
    return float(want.max()) - float(want.min())


def _largest_difference(got: Logits, want: Logits) -> float:
    return float(np.abs(got - want).max())


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
