"""Get the peers and the model files they run, once, into a cache directory.

CACHE/env/        a virtual environment with torch, transformers, onnxruntime-genai, gguf
CACHE/llama.cpp/  llama-bench, llama-quantize, llama-server and the libraries, built from llama-cpp-python's source
CACHE/models/     the models, each written under another name first and renamed when it is whole
CACHE/logs/       what every step printed
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

from q35c.artifact.manifest import Manifest
from q35c.artifact.reader import read_artifact
from q35c.frontend.checkpoint import open_checkpoint

REPOSITORY = Path(__file__).parents[2]
TORCH = (
    "torch==2.13.*"  # by itself and first, so that a CPU build that lies on the machine is taken
)
PACKAGES = (
    "transformers==5.23.*",
    "onnxruntime-genai",
    "onnx",
    "onnx_ir",
    "gguf",
    "sentencepiece",
    "click",
    "jinja2",
    "tokenizers",
    "safetensors",
)
LLAMA_SOURCE = "llama-cpp-python"
_LLAMA_TOOLS = ("llama-bench", "llama-quantize", "llama-server")
_LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_APP=OFF",
)
_LARGE_PARAMETERS = 8e9  # a bf16 file of more is not written first
_DONOR = "qwen3.5-0.8b"
_ORT_OPTIONS = (
    "int4_accuracy_level=4",
    "exclude_vision=true",
    "prune_lm_head=true",
    "block_size=128",
)


class Unavailable(Exception):
    """A peer cannot be had here; the message says why and where the log is."""


class Cache:
    """The directory of everything that is made once; every method makes what is missing."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self.root = root
        self.llama_home = root / "llama.cpp"
        self._say = say
        for name in ("models", "logs"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def python(self) -> str:
        """Return the peers' Python, with all packages installed."""
        python = self.root / "env/bin/python"
        stamp = self.root / "env/complete"
        if not stamp.exists():
            self._run("environment", [sys.executable, "-m", "venv", str(self.root / "env")])
            install = [str(python), "-m", "pip", "install"]
            self._run("pip-torch", [*install, TORCH])
            self._run("pip-peers", [*install, *PACKAGES])
            stamp.touch()
        return str(python)

    def llama(self) -> Path:
        """Return the directory of llama.cpp's programs, built for this machine."""
        home = self.llama_home
        programs = home / "build/bin"
        if all((programs / tool).exists() for tool in _LLAMA_TOOLS):
            return programs
        source = self._llama_source(home)
        configure = ["cmake", "-S", str(source), "-B", str(home / "build"), *_LLAMA_OPTIONS]
        self._run("cmake", configure)
        build = ["cmake", "--build", str(home / "build"), "-j", str(os.cpu_count() or 1)]
        self._run("build llama.cpp (about 10 minutes)", [*build, "--target", *_LLAMA_TOOLS])
        return programs

    def versions(self) -> dict[str, str]:
        """Return the releases of the peers that are there."""
        found = {}
        if sources := sorted(self.llama_home.glob("llama_cpp_python-*/")):
            found["llama.cpp"] = sources[-1].name.replace("_", "-")
        for path in (self.root / "env").glob("lib/python*/site-packages/*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            if name in ("torch", "transformers", "onnxruntime_genai", "onnxruntime"):
                found[name] = version
        return found

    def gguf(self, model: str, kind: str) -> Path:
        """Return a GGUF file; `kind` is bf16, f32, or a type of llama-quantize such as Q4_K_M."""
        path = self.root / "models" / f"{_file_stem(model)}-{kind}.gguf"
        if path.exists():
            return path
        part = path.with_suffix(".part")
        if kind in ("bf16", "f32"):
            command = [self.python(), "-m", "peer.gguf_model", model, str(part), "--type", kind]
        else:
            command = self._quantize_command(model, part, kind)
        self._run(f"write {path.name}", command)
        part.rename(path)
        return path

    def checkpoint(self, model: str) -> Path:
        """Return a Hugging Face checkpoint of a family shape with random weights."""
        path = self.root / "models" / f"{model}-hf"
        if not path.exists():
            part = path.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            tokenizer = str(REPOSITORY / "q35c/demo/model")
            module = [self.python(), "-m", "peer.checkpoint_model"]
            self._run(f"write {path.name}", [*module, model, str(part), "--tokenizer", tokenizer])
            part.rename(path)
        return path

    def ort(self, model: str) -> Path:
        """Return the int4 model that onnxruntime-genai's builder makes."""
        path = self.root / "models" / f"{model}-ort-int4-b128"
        if not path.exists():
            part = path.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            builder = [self.python(), "-m", "onnxruntime_genai.models.builder"]
            files = ["-i", str(self.checkpoint(model)), "-o", str(part)]
            scratch = ["-c", str(self.root / "ort-scratch")]
            kind = ["-p", "int4", "-e", "cpu", "--extra_options", *_ORT_OPTIONS]
            self._run(f"write {path.name}", [*builder, *files, *scratch, *kind])
            part.rename(path)
        return path

    def artifact(self, model: str, precision: str, context: int, batch: int = 1) -> Path:
        """Return a compiled artifact; a change of q35c's source compiles it again."""
        stem = f"{_file_stem(model)}-{precision}-{context}-{batch}"
        path = self.root / "models" / f"{stem}-{source_digest()}.q35c"
        if not path.exists():
            for old in path.parent.glob(f"{stem}-*.q35c"):
                old.unlink()
            form = "auto" if Path(model).exists() else "dummy"
            command = [sys.executable, "-m", "q35c", "compile", model, "-o", str(path)]
            command += ["--load-format", form, "--precision", precision]
            self._run(
                f"compile {stem}", [*command, "--context", str(context), "--batch", str(batch)]
            )
        return path

    def ask(self, module: str, *arguments: str) -> dict[str, object]:
        """Run one of our modules in the peers' environment and return the JSON that it prints."""
        text = self.call(module, *arguments)
        return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])

    def call(self, module: str, *arguments: str) -> str:
        """Run one of our modules in the peers' environment and return what it prints."""
        return self._run(module, [self.python(), "-m", module, *arguments])

    def _quantize_command(self, model: str, part: Path, kind: str) -> list[str]:
        tool = str(self.llama() / "llama-quantize")
        checkpoint = open_checkpoint(model, "auto" if Path(model).exists() else "dummy")
        if sum(prod(checkpoint.shape(name)) for name in checkpoint.names) > _LARGE_PARAMETERS:
            module = [self.python(), "-m", "peer.gguf_large", model, str(part), kind]
            return [*module, "--quantize", tool, "--donor", str(self.gguf(_DONOR, kind))]
        return [tool, str(self.gguf(model, "bf16")), str(part), kind, str(os.cpu_count() or 1)]

    def _llama_source(self, home: Path) -> Path:
        home.mkdir(exist_ok=True)
        if not list(home.glob("llama_cpp_python-*/vendor/llama.cpp")):
            fetch = [self.python(), "-m", "pip", "download", "--no-deps", "-d", str(home)]
            self._run("source of llama.cpp", [*fetch, "--no-binary", LLAMA_SOURCE, LLAMA_SOURCE])
            with tarfile.open(next(home.glob("llama_cpp_python-*.tar.gz"))) as archive:
                archive.extractall(home, filter="data")
        return next(home.glob("llama_cpp_python-*/vendor/llama.cpp"))

    def _run(self, title: str, command: Sequence[str]) -> str:
        """Run one step at a low priority; return what it printed. Raises Unavailable if it fails."""
        if not title.startswith("peer."):
            self._say(title)
        log = self.root / "logs" / f"{title.partition(' (')[0].replace(' ', '-')}.log"
        try:
            done = subprocess.run(
                ["nice", "-n", "5", *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **module_path()},
            )
        except OSError as error:
            raise Unavailable(f"{title}: {error}") from None
        log.write_text(done.stdout)
        if done.returncode:
            last = (done.stdout.strip().splitlines() or ["no output"])[-1]
            raise Unavailable(f"{title} failed: {last[:300]} (all of it: {log})")
        return done.stdout


def default_cache() -> Path:
    """Return where peers and models stay unless the caller says otherwise."""
    return Path(os.environ.get("Q35C_PEERS_CACHE", Path.home() / ".cache/q35c-peers"))


def module_path() -> dict[str, str]:
    """Return the environment in which a child finds q35c and these modules."""
    return {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'bench'}"}


def source_digest() -> str:
    """Return a hash of the compiler's source."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "q35c").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def open_manifest(artifact: Path) -> Manifest:
    """Return what an artifact says about itself."""
    with read_artifact(artifact) as opened:
        return opened.manifest


def _file_stem(model: str) -> str:
    path = Path(model).resolve()
    return f"{path.parent.name}-{path.name}" if Path(model).exists() else model
