"""Every public function of the runtime, called with every kind of wrong argument: q35c's own errors, no others."""

from __future__ import annotations

import array
import fractions
import math
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c import arguments
from q35c.bench import run_benchmark
from q35c.errors import OptionError, PromptError, Q35CError
from q35c.runtime import Sampler, SamplingOptions, Session
from tests.fake_artifact import CONTEXT, VOCAB, script, write_fake


class Tensor:
    """An array as torch's: an axis, `tolist`, no `Sequence`; its items are scalars without a length."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)
        self.ndim = self._values.ndim

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a 0-d tensor")
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return map(Tensor, self._values)

    def tolist(self) -> Any:
        return self._values.tolist()

    item = tolist


class Index:
    """What is an integer by `__index__` alone."""

    def __index__(self) -> int:
        return 72


class Hostile:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """A model that says "i ther" after "H"."""
    path = tmp_path_factory.mktemp("arguments") / "m.q35c"
    write_fake(path, bigram=script("Hi ther"))
    with q35c.load(path, threads=1) as loaded:
        yield loaded


PROMPTS = {
    "list": [72],
    "tuple": (72,),
    "range": range(72, 73),
    "deque": deque([72]),
    "UserList": UserList([72]),
    "array.array": array.array("i", [72]),
    "numpy": np.array([72]),
    "numpy uint8": np.array([72], np.uint8),
    "numpy scalars": [np.int64(72)],
    "0-d arrays": [np.array(72)],
    "tensor": Tensor([72]),
    "0-d tensors": [Tensor(72)],
    "__index__": [Index()],
    "str subclass": np.str_("H"),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_one_prompt_in_every_form(model: q35c.Model, prompt: Any) -> None:
    assert model.generate(prompt) == "i ther"
    assert model.generate([prompt]) == ["i ther"]  # and a batch of it


BATCHES = {
    "texts": ["H", "t"],
    "tuple": ("H", [ord("t")]),
    "lists": [[72], [116]],
    "2-d array": np.array([[72], [116]]),
    "2-d tensor": Tensor([[72], [116]]),
    "1-d arrays": [np.array([72]), Tensor([116])],
    "array of texts": np.array(["H", "t"]),
}


@pytest.mark.parametrize("prompt", BATCHES.values(), ids=BATCHES)
def test_several_prompts_in_every_form(model: q35c.Model, prompt: Any) -> None:
    assert model.generate(prompt) == ["i ther", "her"]


def test_a_row_of_two_axes_is_a_batch_of_one(model: q35c.Model) -> None:
    assert model.generate(np.array([[72]])) == ["i ther"]


WRONG_PROMPTS = {
    "None": None,
    "number": 72,
    "float": 7.5,
    "True": True,
    "bytes": b"H",
    "bytearray": bytearray(b"H"),
    "memoryview": memoryview(b"H"),
    "set": {72},
    "frozenset": frozenset({72}),
    "dict": {72: 1},
    "encoding": UserDict(input_ids=[72]),
    "generator": (token for token in [72]),
    "iterator": iter([72]),
    "map": map(int, "7"),
    "keys": {72: 1}.keys(),
    "object": object(),
    "hostile": Hostile(),
    "type": list,
    "path": Path("H"),
    "0-d array": np.array(72),
    "empty text": "",
    "empty list": [],
    "empty array": np.array([], int),
    "empty rows": np.zeros((2, 0), int),
    "floats": [72.0],
    "float array": np.array([72.0]),
    "bool": [True],
    "bool array": np.array([True]),
    "numpy bool": [np.bool_(True)],
    "texts of digits": np.array([b"7"]),
    "3-d array": np.zeros((1, 1, 1), int),
    "nested": [[[72]]],
    "mixed": ["H", 72],
    "mixed the other way": [72, "H"],
    "ids and lists": [72, [72]],
    "None among texts": ["H", None],
    "bytes in a list": [b"H"],
    "an empty prompt": ["H", ""],
    "negative": [-1],
    "outside": [VOCAB],
    "huge id": [10**5000],
    "huge range": range(10**12),
    "range beyond memory": range(10**30),
    "surrogate": "a\udcff",
    "longer than the context": [1] * (CONTEXT + 1),
    "complex": [72j],
    "NaN": [math.nan],
}


@pytest.mark.parametrize("prompt", WRONG_PROMPTS.values(), ids=WRONG_PROMPTS)
def test_what_is_no_prompt(model: q35c.Model, prompt: Any) -> None:
    with pytest.raises(PromptError) as caught:
        model.generate(prompt, 2)
    assert len(str(caught.value)) < 2000


def test_a_wrong_prompt_is_numbered(model: q35c.Model) -> None:
    with pytest.raises(PromptError, match="prompt 1, token 2: token id is outside"):
        model.generate([[1], [1, 2, VOCAB]])
    with pytest.raises(PromptError, match="prompt 1: not a prompt"):
        model.generate(["H", 5])
    with pytest.raises(PromptError, match="input_ids"):
        model.generate(UserDict(input_ids=[72]))


WRONG: list[Any] = [
    None, True, False, -1, 0, 1, 10**30, 10**5000, -(10**30), 1.5, -0.0, math.nan, math.inf, -math.inf,
    "", "1", "x", "\0", "a\udcff", "x" * 100_000, b"", b"1", [], [1], ["x"], [None], (), {}, {"a": 1}, set(), {1},
    object(), Hostile(), int, len, 1j, Decimal(1), fractions.Fraction(1, 2), Path("x"), range(3),
    iter([1]), np.int64(1), np.float32(0.5), np.bool_(True), np.array(1), np.array([1, 2]), np.array([[1.5]]),
    np.array(["x"]), Tensor([1]), Tensor(0.5), Index(), lambda *_: None, Exception("x"), ...,
]  # fmt: skip


def calls(model: q35c.Model, session: Session, path: Path) -> dict[str, Callable[[Any], Any]]:
    """Return a call for every parameter of the public functions."""
    sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    generate = ("stream", "session", "do_sample", "seed", "stop", "stop_ids", *sampling)
    found: dict[str, Callable[[Any], Any]] = {
        f"generate {name}": lambda value, name=name: model.generate("H", 2, **{name: value})
        for name in generate
    }
    found |= {
        f"SamplingOptions {name}": lambda value, name=name: SamplingOptions(**{name: value})
        for name in sampling
    }
    found |= {
        f"load {name}": lambda value, name=name: q35c.load(path, **{name: value}).close()
        for name in ("verify", "context", "batch", "mmap")
    }
    found |= {
        f"benchmark {name}": lambda value, name=name: run_benchmark(
            model,
            **{
                "prompt_tokens": [2],
                "new_tokens": [],
                "repetitions": 1,
                "depths": [0],
                name: value,
            },
        )
        for name in ("prompt_tokens", "new_tokens", "depths", "seed", "progress")
    }
    options, logits = SamplingOptions(), np.zeros(VOCAB, np.float32)
    snapshot = session.snapshot()
    return found | {
        "load path": lambda value: q35c.load(value).close(),
        "generate max_new_tokens": lambda value: model.generate("H", value),
        "generate prompt": lambda value: model.generate(value, 1),
        "session context": lambda value: model.session(value).close(),
        "score ids": model.score,
        "score progress": lambda value: model.score([1], value),
        "run_probe probe": lambda value: model.run_probe(value, 64, 1),
        "run_probe address": lambda value: model.run_probe(value, value, value),
        "prefill ids": lambda value: (session.restore(snapshot), session.prefill(value)),
        "prefill progress": lambda value: (session.restore(snapshot), session.prefill([1], value)),
        "decode token": lambda value: (session.restore(snapshot), session.decode(value)),
        "decode_together sessions": lambda value: Session.decode_together(value, [1]),
        "decode_together items": lambda value: Session.decode_together([value], [1]),
        "decode_together tokens": lambda value: Session.decode_together([session], value),
        "restore snapshot": session.restore,
        "Sampler options": lambda value: Sampler(value, 0),
        "Sampler seed": lambda value: Sampler(options, value),
        "Sampler prompt": lambda value: Sampler(options, 0, value).sample(logits),
        "sample logits": lambda value: Sampler(options, 0).sample(value),
        "tokenizer encode": model.tokenizer.encode,
        "tokenizer decode": model.tokenizer.decode,
        "tokenizer decode flag": lambda value: model.tokenizer.decode([1], value),
        "tokenizer token_id": model.tokenizer.token_id,
    }


def names_of_calls() -> list[str]:
    from types import SimpleNamespace

    anything: Any = SimpleNamespace
    fake = anything(score=0, tokenizer=anything(encode=0, decode=0, token_id=0))
    return [*calls(fake, anything(snapshot=lambda: 0, restore=0), Path())]


@pytest.mark.parametrize("name", names_of_calls())
def test_wrong_arguments_raise_our_errors(
    model: q35c.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Some of the values are right for some parameters: then the call works."""
    write_fake(tmp_path / "m.q35c")
    monkeypatch.setenv("Q35C_THREADS", "1")
    monkeypatch.chdir(tmp_path)  # where no file is called "x"
    with model.session() as session:
        call = calls(model, session, tmp_path / "m.q35c")[name]
        refused = 0
        for value in WRONG:
            if name.endswith("progress") and callable(value):
                continue  # what a callback raises is its own
            try:
                call(value)
            except Q35CError as error:
                assert len(str(error)) < 5000
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": np.int64(3)},
        {"max_new_tokens": np.array(3)},
        {"max_new_tokens": Tensor(3)},
        {"temperature": np.float32(0), "max_new_tokens": np.uint8(3)},
        {"temperature": np.float64(0), "top_k": np.int32(4), "top_p": np.float16(0.5)},
        {"temperature": 0, "min_p": np.float32(0), "repetition_penalty": np.int8(1)},
        {"temperature": fractions.Fraction(0), "presence_penalty": Tensor(0.0)},
        {"do_sample": np.bool_(False), "seed": np.uint64(2**64 - 1)},
        {"stream": np.bool_(False), "stop_ids": np.array([5]), "max_new_tokens": 3},
        {"stop": (), "stop_ids": (), "max_new_tokens": 3},
        {"stop": np.array(["zz"]), "stop_ids": [np.int16(5)], "max_new_tokens": 3},
    ],
    ids="-".join,
)
def test_numbers_of_every_library(model: q35c.Model, options: dict[str, Any]) -> None:
    assert model.generate("H", **options)[:3] == "i t"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", True),
        ("max_new_tokens", 3.0),
        ("max_new_tokens", "3"),
        ("max_new_tokens", Decimal(3)),
        ("max_new_tokens", 0),
        ("max_new_tokens", -2),
        ("temperature", "0.7"),
        ("temperature", Decimal("0.7")),
        ("temperature", True),
        ("temperature", np.bool_(True)),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", [0.7]),
        ("top_k", 2.0),
        ("top_k", np.float32(2)),
        ("top_k", -1),
        ("seed", "7"),
        ("seed", 2**64),
        ("do_sample", 1),
        ("do_sample", "no"),
        ("stream", 1),
        ("stream", "yes"),
        ("stop", b"a"),
        ("stop", 5),
        ("stop", {"a"}),
        ("stop", {"a": 1}),
        ("stop", (text for text in ["a"])),
        ("stop", [b"a"]),
        ("stop", ["a", None]),
        ("stop", [""]),
        ("stop", "a\udcff"),
        ("stop_ids", 5),
        ("stop_ids", "5"),
        ("stop_ids", b"5"),
        ("stop_ids", {5}),
        ("stop_ids", {5: 1}),
        ("stop_ids", iter([5])),
        ("stop_ids", [5.0]),
        ("stop_ids", [True]),
        ("stop_ids", [VOCAB]),
        ("stop_ids", range(10**12)),
        ("stop_ids", [[5]]),
        ("session", 5),
        ("session", "x"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_error_names_the_argument(model: q35c.Model, name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        model.generate("H", **{"max_new_tokens": 2, name: value})
    assert caught.value.where == name


@pytest.mark.parametrize("value", [None, b"m.q35c", 5, "", "\0", "a\0b", "\ud800", [], Hostile()])
def test_what_is_no_path(value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        q35c.load(value)
    assert caught.value.where == "path"


def test_a_session_of_another_model(model: q35c.Model, tmp_path: Path) -> None:
    write_fake(tmp_path / "other")
    with (
        q35c.load(tmp_path / "other", threads=1) as other,
        other.session() as session,
        pytest.raises(OptionError, match="another model"),
    ):
        model.generate("H", session=session)


def test_a_callback_is_checked_before_anything_changes(model: q35c.Model) -> None:
    with model.session() as session:
        for step in (session.prefill, session.score):
            with pytest.raises(OptionError, match="progress"):
                step([1, 2], 5)  # type: ignore[arg-type]
        assert session.length == 0


def test_paths_stay_as_they_are(tmp_path: Path) -> None:
    assert arguments.path("p", tmp_path) == arguments.path("p", str(tmp_path)) == tmp_path
    assert arguments.path("p", "a\udcff") == Path("a\udcff")  # a name of bytes that are not UTF-8
