"""q35c: compile a Qwen3.5 checkpoint into one file, and generate text from it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from q35c import errors as errors
from q35c.errors import Q35CError as Q35CError
from q35c.version import __version__ as __version__

if TYPE_CHECKING:
    from q35c.runtime.answering import ChatAnswer as ChatAnswer
    from q35c.runtime.answering import Conversation as Conversation
    from q35c.runtime.generate import Generation as Generation
    from q35c.runtime.model import Model as Model
    from q35c.runtime.multimodal import MultimodalPrompt as MultimodalPrompt
    from q35c.runtime.multimodal import Picture as Picture
    from q35c.runtime.prefix import PrefixCache as PrefixCache
    from q35c.runtime.saved import Snapshot as Snapshot
    from q35c.runtime.session import Session as Session
    from q35c.vision.clips import Clip as Clip

_RUNTIME = (
    "Generation",
    "Model",
    "MultimodalPrompt",
    "Picture",
    "PrefixCache",
    "Session",
    "Snapshot",
)
__all__ = [
    "ChatAnswer",
    "Clip",
    "Conversation",
    "Generation",
    "Model",
    "MultimodalPrompt",
    "Picture",
    "PrefixCache",
    "Q35CError",
    "Session",
    "Snapshot",
    "__version__",
    "errors",
    "load",
]


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    verify: bool | None = None,
    *,
    context: int | None = None,
    batch: int | None = None,
    mmap: bool = True,
    device: str | None = None,
) -> Model:
    """Open a compiled model. See `q35c.runtime.load_model` for the arguments and errors."""
    from q35c.runtime.load import load_model

    return load_model(path, threads, verify, context=context, batch=batch, mmap=mmap, device=device)


def __getattr__(name: str) -> object:
    """Import the runtime's classes when they are first asked for."""
    if name in _RUNTIME:
        from q35c import runtime

        return getattr(runtime, name)
    if name in ("ChatAnswer", "Conversation"):
        from q35c.runtime import answering

        return getattr(answering, name)
    if name == "Clip":
        from q35c.vision.clips import Clip

        return Clip
    raise AttributeError(f"module 'q35c' has no attribute {name!r}")
