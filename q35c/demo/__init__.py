"""A small trained model that ships with q35c, and the artifact that is compiled from it once.

See `model/` for the checkpoint and its card, `scripts/train_demo.py` for how it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import q35c
from q35c import arguments
from q35c.artifact import read_artifact
from q35c.errors import ArtifactError, OptionError
from q35c.user_cache import cache_directory

Progress = Callable[[str, float], None]

CHECKPOINT = Path(__file__).parent / "model"
PROMPT = "And it came to pass"


def demo_artifact(progress: Progress | None = None) -> tuple[Path, bool]:
    """Return the compiled demo model and whether it was compiled just now.

    It lies in the user's cache directory, under a name that changes with the checkpoint, with q35c
    and with this machine's instruction set. A damaged one is compiled again.
    """
    from q35c.codegen.targets import find_target

    arguments.callback("progress", progress)
    target = find_target("cpu").name
    path = cache_directory() / f"demo-{_digest(target)}.q35c"
    try:
        with read_artifact(path) as artifact:
            artifact.verify_weights()
            artifact.verify_segments()
        return path, False
    except ArtifactError:
        pass
    from q35c.compile import compile_model

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cannot keep the compiled demo: {error.strerror}",
            where=str(path.parent),
            hint="let XDG_CACHE_HOME name a directory that can be written",
        ) from None
    compile_model(CHECKPOINT, path, target=target, context=2048, progress=progress)
    for old in path.parent.glob("demo-*.q35c"):
        if old != path:
            with contextlib.suppress(OSError):
                old.unlink()
    return path, True


def _digest(target: str) -> str:
    """Hash everything that decides the artifact: version, target, checkpoint and our own code."""
    package = Path(q35c.__file__).parent
    ours = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    theirs = {f"model/{path.name}": path for path in CHECKPOINT.iterdir() if path.is_file()}
    digest = hashlib.sha256(f"{q35c.__version__} {target}".encode())
    for name, path in sorted((ours | theirs).items()):
        digest.update(name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
