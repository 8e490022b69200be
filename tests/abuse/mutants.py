"""R1 and R21: random mutants of an artifact, judged by rules that know nothing of the reader.

    python -m tests.abuse.mutants --small 200000 --whole 5000 --seed 1
    python -m tests.abuse.mutants --bug "padding is not looked at"

Runs in 512 MiB of address space with an alarm after two seconds of work at a mutant. Exit 0: every mutant was refused with
ArtifactError or loaded as what it should be. Exit 1 names the seed and what went wrong. `--bug` plants a bug in the reader
first, so that it must be found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
import re
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from q35c.artifact import layout
from q35c.errors import ArtifactError
from tests.fake_artifact import write_fake, write_small

# Another value in these makes another valid artifact, and in the others one that only the code's plan tells apart.
FREE = {"producer", "kernels", "generation"}
PLANNED = {"barrier_bytes", "entries", "max_threads", "model", "precision", "probes", "row_layouts", "segments", "state", "target", "weights"}  # fmt: skip
SECONDS = 2
ADDRESS_SPACE = 512 << 20
# Each is behind those that it takes names from.
CHAIN = tuple(
    f"q35c.artifact.{name}"
    for name in (
        "schema",
        "kernels",
        "leaves",
        "entries",
        "target",
        "consistency",
        "manifest",
        "reader",
    )
)
_SCHEMA, _CHECKS, _READER = CHAIN[0], CHAIN[5], CHAIN[7]
BUGS: dict[str, tuple[str, str, str]] = {
    "the hash of a segment is skipped": (_READER, "if digest.hexdigest() != segment.sha256:", "if False:"),
    "the hash of the weights is skipped": (_READER, 'if sha256 != self.manifest.segments["weights"].sha256:', "if False:"),
    "padding is not looked at": (_READER, 'if any(b"".join(', 'if False and any(b"".join('),
    "only the header's length is compared": (_READER, "if header != implied:", "if len(header) != len(implied):"),
    "a file may be too long": (_READER, "if size != len(header) + end:", "if size < len(header) + end:"),
    "the manifest's form is not compared": (_READER, "if manifest.to_json() != text:", "if False:"),
    "the code's plan is not compared": (_READER, "if not data.endswith(self._code_trailer):", "if False:"),
    "numbers have no upper bound": (_SCHEMA, "and limit.low <= value <= limit.high", "and limit.low <= value"),
    "true is a number": (_SCHEMA, "if type(value) is not kind:", "if not isinstance(value, kind):"),
    "offsets of weights are not compared": (_CHECKS, '_check_equal("$.weights offsets"', '(lambda *_: None)("$.weights offsets"'),
    "offsets of the state are not compared": (_CHECKS, '_check_equal("$.state.tensors offsets"', '(lambda *_: None)("$.state.tensors offsets"'),
    "a stop id may be one too large": (_CHECKS, "if token >= manifest.model.vocab_size:", "if token > manifest.model.vocab_size:"),
}  # fmt: skip


def plant(bug: str) -> None:
    """Run the sources of the reader again, one of them with the bug in it."""
    module, right, wrong = BUGS[bug]
    for name in CHAIN:
        loaded = importlib.import_module(name)
        assert loaded.__file__ is not None
        source = Path(loaded.__file__).read_text()
        if name == module:
            assert source.count(right) == 1, f"{bug}: {right!r} is not in {name} once"
            source = source.replace(right, wrong)
        exec(compile(source, loaded.__file__, "exec"), loaded.__dict__)


class Harness:
    """Make mutants of one artifact and judge what becomes of them."""

    def __init__(self, data: bytes, place: Path, random_: random.Random) -> None:
        self.data, self.place, self.random = data, place, random_
        self.start = 8 + int.from_bytes(data[:8], "little")
        self.text = json.loads(data[8 : self.start])["__metadata__"]["q35c"]
        self.document: dict[str, Any] = json.loads(self.text)
        self.numbers = [
            match.span() for match in re.finditer(r"(?<=[:,\[])-?\d+(?:\.\d+)?", self.text)
        ]
        self.values = sorted({int(self.text[a:b]) for a, b in self.numbers if self.text[a:b].isdigit()})  # fmt: skip
        self.reader: Any = importlib.import_module(_READER)

    def check_original(self) -> None:
        self.place.write_bytes(self.data)
        if self._read() is None:
            raise AssertionError("the file itself does not load")

    def raw(self) -> None:
        """Bytes changed anywhere: only the file itself may load."""
        mutant = self._bytes(self.data)
        self.place.write_bytes(mutant)
        manifest = self._read()
        if manifest is not None and mutant != self.data:
            raise AssertionError("another file loaded")

    def manifest(self, is_whole: bool) -> None:
        """A manifest changed by someone who puts its hash, and the file's header, right."""
        text = self._manifest_text()
        try:
            manifest = self.reader.parse_manifest(text)
        except ArtifactError:
            return
        if manifest.to_json() != text:
            raise AssertionError(f"a manifest in another form is accepted: {text!r:.300}")
        document = json.loads(text)
        changed = {key for key in document if document[key] != self.document[key]}
        if changed - FREE - PLANNED:
            raise AssertionError(f"a manifest with another {changed} is accepted")
        check_sane(document)
        if is_whole and changed:
            digest = hashlib.sha256(text).hexdigest()
            header = layout.build_header(text, digest, manifest.segments, manifest.weights)
            self.place.write_bytes(header + self.data[self.start :])
            if self._read() is not None and changed - FREE - {"segments"}:
                raise AssertionError(f"a file with another {changed} loaded")

    def _read(self) -> Any:
        try:
            with self.reader.read_artifact(self.place) as artifact:
                artifact.verify_segments()
                artifact.verify_weights()
                return artifact.manifest
        except ArtifactError:
            return None

    def _bytes(self, data: bytes) -> bytes:
        made, draw = bytearray(data), self.random
        low = draw.choice((0, self.start)) if data is self.data else 0
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            low = min(low, len(made) - 1)
            at, span = draw.randrange(low, len(made)), draw.choice((1, 1, 4, 64))
            kind = draw.randrange(7)
            if kind == 0:
                made[at : at + span] = draw.randbytes(len(made[at : at + span]))
            elif kind == 1:
                made[at] ^= 1 << draw.randrange(8)
            elif kind == 2:
                del made[at : at + span]
            elif kind == 3:
                made[at:at] = made[at : at + span]
            elif kind == 4:
                made += bytes(span)
            elif kind == 5:
                del made[-span:]
            else:
                other = draw.randrange(len(made))
                made[at : at + span], made[other : other + span] = made[other : other + span], made[at : at + span]  # fmt: skip
        return bytes(made)

    def _manifest_text(self) -> bytes:
        draw = self.random
        if draw.random() < 0.3:
            return self._bytes(self.text.encode())
        text = self.text
        for begin, end in sorted(
            draw.sample(self.numbers, draw.choice((1, 1, 1, 2))), reverse=True
        ):
            old = text[begin:end]
            number = int(old) if old.isdigit() else 1
            near = draw.choice(self.values) + draw.choice((-1, 0, 0, 0, 1))
            new = draw.choice((0, 1, -1, number + 1, number - 1, 2 * number, 2**31, 2**63, 0.5, 7.0, True, None, "x", [1], near, near, near, near, near))  # fmt: skip
            text = text[:begin] + json.dumps(new) + text[end:]
        return text.encode()


def check_sane(document: dict[str, Any]) -> None:
    """Demand what the schema promises of the fields that may differ, said again here."""
    sampling = document["generation"]
    for name, low, high in (
        ("temperature", 0, 1000), ("top_p", 0, 1), ("min_p", 0, 1), ("top_k", 0, 2**24),
        ("repetition_penalty", 1e-3, 1000), ("presence_penalty", -1000, 1000),
    ):  # fmt: skip
        value = sampling[name]
        if isinstance(value, bool) or not low <= value <= high:
            raise AssertionError(f"{name} is {value!r}")
    for tensors, size in (
        (document["weights"], document["weights_bytes"]),
        (document["state"]["tensors"], document["state"]["bytes"]),
    ):
        end = 0
        for tensor in tensors:
            if tensor["offset"] != end:
                raise AssertionError(f"{tensor['name']} lies at {tensor['offset']}, not {end}")
            end += layout.align(layout.tensor_bytes(tensor["dtype"], tensor["shape"]))
        if size != end:
            raise AssertionError(f"{size} bytes of tensors, not {end}")
    vocabulary = document["model"]["vocab_size"]
    for token in sampling["stop_ids"]:
        if isinstance(token, bool) or not 0 <= token < vocabulary:
            raise AssertionError(f"a stop id is {token!r} of {vocabulary}")


def hunt(small: int, whole: int, seed: int, bug: str | None) -> None:
    """Judge so many mutants of a small file's bytes and manifest, and of a file with real code."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        little, large, place = (Path(folder, name) for name in ("little", "large", "mutant"))
        write_small(little)
        write_fake(large)
        if bug:
            plant(bug)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        signal.signal(signal.SIGPROF, _too_slow)
        few, real = (Harness(path.read_bytes(), place, draw) for path in (little, large))
        for harness in (few, real):
            harness.check_original()
        wholes = set(draw.sample(range(small + whole), whole))
        for number in range(small + whole):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            harness = real if number in wholes else few
            if number % 2:
                harness.raw()
            else:
                harness.manifest(is_whole=number in wholes or number % 20 == 0)
            signal.setitimer(signal.ITIMER_PROF, 0)


def _too_slow(_number: int, _frame: object) -> NoReturn:
    raise AssertionError(f"a mutant took more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=200_000)
    parser.add_argument("--whole", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bug", choices=BUGS)
    given = parser.parse_args()
    try:
        hunt(given.small, given.whole, given.seed, given.bug)
    except Exception as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(f"seed {given.seed}: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
