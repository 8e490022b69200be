"""A day on a machine with an NVIDIA GPU, in minutes: is what was packed right there, and how fast is it?

    python scripts/gpu_pack.py gpu              # where the compiler is
    python scripts/gpu_day.py gpu               # where the GPU is: needs numpy, tokenizers, click, jinja2; torch if eager shall stand beside
    Q35C_LIBCUDA=... python scripts/gpu_day.py dry

Writes a table to standard output and to DIRECTORY/day.md, after every part, so that what ends early leaves what it has. Parts:
the device and its bandwidth, calls of kernels beside what the checking machine gave, the same under compute-sanitizer, the demo
model beside eager PyTorch's logits, and shapes of the family with random weights: prefill and decode beside the bytes that they
must read, and beside eager PyTorch here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import gpu_weights  # noqa: E402

import q35c  # noqa: E402
from q35c.runtime.cuda.blocks import Memory  # noqa: E402
from q35c.runtime.cuda.context import Context  # noqa: E402
from q35c.runtime.cuda.driver import Driver  # noqa: E402
from q35c.verify import check_promise, compare_logits  # noqa: E402

SANITIZER = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED_CASES = 60  # under the sanitizer a call takes a hundred times as long
TOLERANCE = 2e-3  # of the largest value: tensor cores round products' sums in another way
NEW_TOKENS, PROMPT = 64, 512


@dataclass
class Day:
    """What was packed, what was found, and how much time is left."""

    folder: Path
    end: float
    only: str | None
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failures: int = 0

    def add(self, part: str, what: str, found: str) -> None:
        self.rows.append((part, what, found))
        print(f"{part:<24} {what:<44} {found}", flush=True)
        lines = ["| part | what | found |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        (self.folder / "day.md").write_text("\n".join(lines) + "\n")

    def part(self, name: str, action: Callable[[Day], None], seconds: float = 0) -> None:
        """Do a part if there is time for it; what it raises is a row of the table."""
        if self.only not in (None, name):
            return
        if time.monotonic() + seconds > self.end:
            self.add(name, "left out", "no time")
            return
        begin = time.monotonic()
        try:
            action(self)
        except Exception as error:
            self.failures += not name.startswith("eager")
            traceback.print_exc()
            self.add(name, "FAILED", f"{type(error).__name__}: {error}".replace("\n", " "))
        self.add(name, "seconds", f"{time.monotonic() - begin:.1f}")

    def check(self, part: str, what: str, problems: list[str]) -> None:
        self.failures += bool(problems)
        self.add(part, what, "right" if not problems else "WRONG: " + "; ".join(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--only", help="one part: as the table calls it")
    parser.add_argument("--cases", type=int, default=10**6, help="the most calls of kernels")
    options = parser.parse_args()
    day = Day(options.folder, time.monotonic() + options.seconds, options.only)
    day.part("device", describe_device)
    day.part("kernels", lambda day: run_cases(day, options.cases))
    day.part("demo", check_demo, 10)
    for head in sorted(day.folder.glob("*.head"), key=lambda path: path.stat().st_size):
        day.part(f"shape {head.stem}", lambda day, head=head: measure_shape(day, head), 30)
    day.part("sanitizer", sanitize, 60)
    for head in sorted(day.folder.glob("*.head"), key=lambda path: path.stat().st_size):
        day.part(f"eager {head.stem}", lambda day, head=head: measure_eager(day, head), 60)
    raise SystemExit(day.failures > 0)


# --- the device -----------------------------------------------------------------------------------


def describe_device(day: Day) -> None:
    context = Context(0)
    context.open()
    major, minor = context.capability
    version = context.driver.version
    day.add("device", context.title, f"compute capability {major}.{minor}, CUDA {version / 1000:.1f}")  # fmt: skip
    have = context.available_memory().bytes
    day.add("device", "memory that is left", f"{have / 2**30:.1f} GiB")
    seconds, size = fill_seconds(context, min(have // 16, 8 << 30))
    day.add(
        "device", f"filling {size / 2**30:.2f} GiB", f"{size / seconds / 1e12:.2f} TB/s written"
    )
    context.close()
    rate = copy_bandwidth()
    day.add("device", "copying with torch, read and written", f"{rate / 1e12:.2f} TB/s" if rate else "no torch here")  # fmt: skip


def fill_seconds(context: Context, size: int) -> tuple[float, int]:
    """Return the least seconds that the device takes to fill memory, of five times, and its bytes."""
    driver, found = context.driver, []
    with context.current():
        memory = Memory(driver)
        address, stream = memory.allocate(size), memory.stream()
        for _ in range(5):
            begin = time.perf_counter()
            driver.call("cuMemsetD8Async", address, 0, size, stream.handle)
            stream.synchronize()
            found.append(time.perf_counter() - begin)
        memory.close()
    return min(found), size


def copy_bandwidth() -> float | None:
    """Return the bytes a second, read and written, that torch copies with; None without torch or device."""
    try:
        import torch

        source = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    except Exception:
        return None
    target = torch.empty_like(source)
    best = 1e9
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


# --- kernels --------------------------------------------------------------------------------------


class Runner:
    """Run recorded calls on the device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[dict[str, Any]] = json.loads((folder / "cases.json").read_text())
        self.context = Context(0)
        self.context.open()
        self.modules: dict[str, int] = {}

    def results(self, most: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Yield calls, evenly chosen, and what is wrong with their results."""
        step = max(1, len(self.cases) // most)
        with self.context.current("kernels"):
            for case in self.cases[::step]:
                yield case, self.problems(case)

    def problems(self, case: dict[str, Any]) -> list[str]:
        with np.load(self.folder / case["file"]) as arrays:
            before = {k.removeprefix("before"): arrays[k] for k in arrays if k.startswith("before")}
            after = {k.removeprefix("after"): arrays[k] for k in arrays if k.startswith("after")}
        got = self.launch(case, before)
        return [f"{case['symbol']} argument {k}: {wrong}" for k in after if (wrong := difference(got[k], after[k]))]  # fmt: skip

    def launch(self, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a call and return its arrays, each in a buffer of its exact size."""
        import ctypes

        driver = self.context.driver
        memory = Memory(driver)
        stream = memory.stream()
        addresses = {}
        for key, array in arrays.items():
            held = np.ascontiguousarray(array)
            addresses[key] = memory.allocate(max(1, held.nbytes))
            driver.call("cuMemcpyHtoDAsync_v2", addresses[key], held.ctypes.data, held.nbytes, stream.handle)  # fmt: skip
        values = (ctypes.c_uint64 * len(case["arguments"]))()
        for index, kind in enumerate(case["arguments"]):
            place = kind["same"] if isinstance(kind, dict) else index
            values[index] = addresses[str(place)] if not isinstance(kind, int) else kind % 2**64
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(values))(*(first + 8 * i for i in range(len(values))))
        function = self.function(case, driver)
        driver.call("cuLaunchKernel", function, *case["grid"], *case["block"], case["shared"], stream.handle, pointers, None)  # fmt: skip
        results = {key: np.empty_like(np.ascontiguousarray(array)) for key, array in arrays.items()}
        for key, result in results.items():
            driver.call("cuMemcpyDtoHAsync_v2", result.ctypes.data, addresses[key], result.nbytes, stream.handle)  # fmt: skip
        stream.synchronize()
        memory.close()
        return results

    def function(self, case: dict[str, Any], driver: Driver) -> int:
        if case["text"] not in self.modules:
            image = (self.folder / f"{case['text']}.image").read_bytes()
            self.modules[case["text"]] = driver.size("cuModuleLoadData", image)
        function = driver.size("cuModuleGetFunction", self.modules[case["text"]], case["symbol"].encode())  # fmt: skip
        if case["shared"] > 48 << 10:
            driver.call("cuFuncSetAttribute", function, 8, case["shared"])
        return function


def difference(got: np.ndarray, want: np.ndarray) -> str:
    """Say how results differ by more than another order of sums explains; empty if they do not."""
    if want.dtype.kind != "f":
        count = int(np.count_nonzero(got != want))
        share = count / max(1, want.size)
        return f"{count} of {want.size} integers differ" if share > TOLERANCE else ""
    if (np.isnan(got) != np.isnan(want)).any():
        return f"{int(np.isnan(got).sum())} values are NaN, not {int(np.isnan(want).sum())}"
    largest = float(np.nanmax(np.abs(want), initial=0.0))
    off = float(np.nanmax(np.abs(got - want), initial=0.0))
    return "" if off <= TOLERANCE * max(largest, 1e-6) else f"off by {off:.3g} of {largest:.3g}"


def run_cases(day: Day, most: int) -> None:
    runner = Runner(day.folder / "cases")
    count, problems = 0, []
    for _, wrong in runner.results(most):
        count += 1
        problems += wrong
    if len(problems) > 5:
        problems = [*problems[:5], f"and {len(problems) - 5} more"]
    day.check("kernels", f"{count} calls beside the checking machine", problems)


def sanitize(day: Day) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        day.add("sanitizer", "left out", "compute-sanitizer is not here")
        return
    for tool in SANITIZER:
        again = [sys.executable, __file__, str(day.folder), "--only", "kernels", "--cases", str(SANITIZED_CASES)]  # fmt: skip
        command = [program, f"--tool={tool}", "--error-exitcode=9", *again]
        left = max(10, day.end - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        (day.folder / f"{tool}.txt").write_text("\n".join(said[:2000]))
        day.check("sanitizer", tool, [] if done.returncode == 0 else said[-1:] or [done.stderr[-200:]])  # fmt: skip


# --- the demo model -------------------------------------------------------------------------------


def check_demo(day: Day) -> None:
    with np.load(day.folder / "demo.npz") as kept:
        ids, want = kept["ids"].tolist(), kept["logits"]
    for path in sorted(day.folder.glob("demo-*.q35c")):
        with q35c.load(path, device="cuda:0") as model:
            precision = model.manifest.precision
            got = model.score(ids)
            with model.session() as session, model.session() as other:
                cut = len(ids) - 16
                rows = [session.prefill(ids[:cut])]
                saved = session.snapshot()
                rows += [session.decode(token) for token in ids[cut:]]
                other.restore(saved)
                batch = q35c.Session.decode_together([other], [ids[cut]])
            compared = compare_logits(got, want)
            path_difference = float(np.abs(np.stack(rows) - got[cut - 1 :]).max() / np.ptp(want))
            problems = list(check_promise(precision, compared, path_difference))
            if not np.array_equal(batch[0], rows[1]):
                problems.append("decode after a snapshot has other bits")
            figures = f"{compared.difference:.1e} of the range, mean KL {compared.mean_kl:.1e}"
            day.check("demo", f"{precision} beside eager PyTorch: {figures}", problems)


# --- shapes with random weights -------------------------------------------------------------------


def measure_shape(day: Day, head: Path) -> None:
    path = head.with_suffix(".q35c")
    begin = time.monotonic()
    gpu_weights.fill(head, path)
    name, size = f"shape {head.stem}", path.stat().st_size
    day.add(name, f"random weights, {size / 2**30:.2f} GiB", f"written in {time.monotonic() - begin:.1f} s")  # fmt: skip
    begin = time.monotonic()
    with q35c.load(path, device="cuda:0", verify=False) as model:
        day.add(name, "loaded", f"{time.monotonic() - begin:.1f} s")
        ids = np.random.default_rng(0).integers(0, model.vocab_size, PROMPT).tolist()
        ids = ids[: model.context // 2]
        measure_prefill(day, name, model, ids)
        for batch in (1, model.batch):
            measure_decode(day, name, model, ids, batch)
        slowest(day, name, model, ids)
    path.unlink()


def measure_prefill(day: Day, name: str, model: Any, ids: list[int]) -> None:
    found = []
    with model.session() as session:
        for _ in range(4):
            session.reset()
            begin = time.perf_counter()
            session.prefill(ids)
            found.append(time.perf_counter() - begin)
    rate = len(ids) / min(found[1:])
    day.add(name, f"prefill of {len(ids)}", f"{rate:.0f} tok/s")


def measure_decode(day: Day, name: str, model: Any, ids: list[int], batch: int) -> None:
    sessions = [model.session() for _ in range(batch)]
    for session in sessions:
        session.prefill(ids)
    tokens = [1] * batch
    for _ in range(4):
        q35c.Session.decode_together(sessions, tokens)
    count = min(NEW_TOKENS, model.context - sessions[0].length - 1)
    begin = time.perf_counter()
    for _ in range(count):
        logits = q35c.Session.decode_together(sessions, tokens)
    seconds = (time.perf_counter() - begin) / count
    finite = np.isfinite(logits).all()
    size = gpu_weights.decode_bytes(model.manifest, [session.length for session in sessions])
    day.add(
        name, f"decode, {batch} sequences of {len(ids)}",
        f"{batch / seconds:.1f} tok/s, {1e3 * seconds:.3f} ms a step, {size / seconds / 1e12:.3f} TB/s of {size / 1e9:.3f} GB"
        + ("" if finite else ", logits NOT FINITE"),
    )  # fmt: skip
    day.failures += not finite


def slowest(day: Day, name: str, model: Any, ids: list[int]) -> None:
    """Say which families of kernels take how much of a step, launched one by one."""
    with model.session() as session, model.record() as recordings:
        session.prefill(ids)
        session.decode(1)
        session.decode(1)
    for recording in (recordings[0], recordings[-1]):
        entry = model.manifest.entry(recording.entry)
        spent: dict[str, float] = {}
        for step, nanoseconds in zip(entry.steps, np.diff(recording.cycles), strict=True):
            family = model.manifest.kernels[step].family
            spent[family] = spent.get(family, 0.0) + nanoseconds / 1e3
        whole = sum(spent.values())
        most = sorted(spent.items(), key=lambda item: -item[1])[:6]
        said = ", ".join(f"{family} {us:.0f}" for family, us in most)
        day.add(name, f"{recording.entry}: {len(entry.steps)} launches, µs between events", f"{whole:.0f}: {said}")  # fmt: skip


def measure_eager(day: Day, head: Path) -> None:
    """Measure transformers' model in bf16 on the same device, as far as it can be made."""
    import torch

    from q35c.frontend.trace import causal_lm_class, hf_config

    config = gpu_weights.manifest_of(head).model
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = causal_lm_class(config)(hf_config(config)).eval()
    name = f"eager {head.stem}"
    ids = torch.randint(0, config.vocab_size, (1, PROMPT), device="cuda")
    with torch.no_grad():
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = model(ids, use_cache=True)
            torch.cuda.synchronize()
            prefill = time.perf_counter() - begin
        for step in range(20):
            if step == 4:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            out = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        torch.cuda.synchronize()
    decode = (time.perf_counter() - begin) / 16
    day.add(name, "transformers in bf16", f"prefill {PROMPT / prefill:.0f} tok/s, decode {1 / decode:.1f} tok/s")  # fmt: skip


if __name__ == "__main__":
    main()
