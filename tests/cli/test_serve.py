"""`q35c serve` as people start it: a real engine on a model without a compiler, signals, refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from q35c.errors import OptionError
from q35c.serve.run import cache_size, read_keys
from tests.cli.conftest import Run, start
from tests.serve.harness import events


@contextmanager
def serving(
    *arguments: object, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the command until the block ends; yield its URL and the process."""
    child = start("serve", *arguments, "--port", 0, environment=environment)
    try:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline().decode()
        assert line.startswith("serving "), line + child.stderr.read().decode()
        yield line.split()[-1], child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def ask(url: str, **fields: object) -> httpx.Response:
    body = {"model": "speaker", "prompt": "Th", "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=20, trust_env=False)


def test_it_answers_and_ends_on_a_signal(speaker: Path) -> None:
    with serving(speaker, "--prefix-cache", "64MiB") as (url, child):
        assert ask(url).json()["choices"][0]["text"] == "e quick"
        streamed = events(ask(url, stream=True).text)
        assert "".join(e["choices"][0]["text"] for e in streamed[:-1]) == "e quick"
        scored = ask(url, echo=True, logprobs=1, max_tokens=0).json()
        assert scored["choices"][0]["logprobs"]["tokens"] == ["T", "h"]
        chat = {"model": "speaker", "messages": [{"role": "user", "content": "T"}], "max_tokens": 3}
        for path in ("chat/completions", "messages"):
            answer = httpx.post(f"{url}/v1/{path}", json=chat, trust_env=False)
            assert answer.status_code == 200, answer.text
        numbers = httpx.get(f"{url}/metrics", trust_env=False).text
        assert "q35c_generated_tokens_total 22.0" in numbers
        child.send_signal(signal.SIGTERM)
        out, error = child.communicate(timeout=30)
    assert child.returncode == 0 and out == b""
    log = error.decode()
    assert log.count(" /v1/completions 200 ") == 3 and "quick" not in log and "Traceback" not in log


def test_prefixes_outlive_the_process(speaker: Path, tmp_path: Path) -> None:
    prompt = "T" * 150
    for cached in (0, 128):
        with serving(speaker, "--prefix-cache", "64MiB", "--cache-dir", tmp_path) as (url, child):
            usage = ask(url, prompt=prompt, max_tokens=1).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached
            child.send_signal(signal.SIGTERM)
            _, error = child.communicate(timeout=30)
        assert child.returncode == 0 and b"Traceback" not in error
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_second_signal_ends_it_at_once(speaker: Path) -> None:
    with serving(speaker, "--drain", 60) as (url, child):
        body = {"model": "speaker", "prompt": "zz", "max_tokens": 200, "logit_bias": {"256": -100}}
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "n": 8}, timeout=20, trust_env=False):  # fmt: skip
            child.send_signal(signal.SIGINT)
            child.send_signal(signal.SIGINT)
            _, error = child.communicate(timeout=30)
    assert child.returncode == 0 and b"Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "::"], "--insecure"),
        (["--host", "no.such.host.invalid"], "--host: no address"),
        (["--port", "99999"], "--port: value"),
        (["--prefix-cache", "lots"], "--prefix-cache: not a size"),
        (["--api-key-file", "missing.txt"], "missing.txt"),
        (["--max-queue", "0"], "--max-queue: value"),
        (["--drain", "-1"], "--drain: value"),
        (["--queue-timeout", "-1"], "--queue-timeout: value"),
        (["--batch", "1025"], "--batch: value"),
        (["--served-model-name", "*"], "--served-model-name: no name"),
    ],
)
def test_what_is_refused_before_it_begins(
    run: Run,
    speaker: Path,
    arguments: list[str],
    said: str,
) -> None:
    given = [] if "--port" in arguments else ["--port", "0"]
    result = run("serve", speaker, *given, *arguments)
    assert result.exit_code == 1 and said in result.stderr


def test_a_port_in_use_is_named(run: Run, speaker: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", speaker, "--port", port)
    assert result.exit_code == 1 and f"127.0.0.1 port {port}" in result.stderr


def test_keys_come_from_a_file_or_the_environment(speaker: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(file) == ("one", "two")
    with serving(speaker, "--host", "0.0.0.0", Q35C_API_KEY="sesame") as (url, child):
        local = url.replace("0.0.0.0", "127.0.0.1")
        assert ask(local).status_code == 401
        headers = {"authorization": "Bearer sesame"}
        models = httpx.get(f"{local}/v1/models", headers=headers, trust_env=False)
        assert models.status_code == 200
        command = Path(f"/proc/{child.pid}/cmdline").read_bytes()
        assert b"sesame" not in command


@pytest.mark.parametrize("content", ["", "\n", "two words\n", "\xe9\n", "x" * 2000])
def test_a_file_of_wrong_keys_is_refused_without_showing_them(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(OptionError) as refused:
        read_keys(file)
    assert "words" not in str(refused.value).replace(str(file), "")


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("500", 500), ("2GiB", 2 << 30), ("1 MiB", 1 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert cache_size(text) == size
    assert 0 < cache_size("25%") < 1 << 60


@pytest.mark.parametrize("text", ["", "-1", "1.5GiB", "91%", "%", "1 GB", "9" * 16])
def test_no_sizes(text: str) -> None:
    with pytest.raises(OptionError):
        cache_size(text)


def test_it_says_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['starlette'] = None\nsys.modules['starlette.responses'] = None\n"
        "from q35c.cli import main\nmain(['serve', 'x.q35c'])\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 1 and "pip install 'q35c[serve]'" in child.stderr


def test_the_server_imports_no_compiler() -> None:
    program = (
        "import sys, json\nimport q35c.serve.run\n"
        "heavy = {'torch', 'transformers', 'tvm', 'pydantic', 'onnx', 'safetensors'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True
    )
    assert json.loads(child.stdout) == []
