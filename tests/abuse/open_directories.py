"""Child process: open every model directory below argv[1] under an audit hook; print a JSON report.

For each directory: the error's class and message (None if it opened and every tensor could be
read), and every forbidden thing that happened meanwhile.
"""

import json
import os
import sys
from pathlib import Path

from q35c.errors import Q35CError
from q35c.frontend.checkpoint import open_checkpoint

FORBIDDEN = (
    "compile", "ctypes.", "exec", "import", "marshal.", "os.exec", "os.fork", "os.posix_spawn",
    "os.system", "pickle.", "socket.", "subprocess.", "urllib.",
)  # fmt: skip
PATH_EVENTS = ("open", "os.listdir", "os.scandir", "os.chdir", "os.mkdir", "os.remove", "os.rename")

allowed: Path | None = None  # None: not watching
events: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    if allowed is None:
        return
    if event in PATH_EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        if not path.is_relative_to(allowed):
            events.append(f"{event} {path}")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE:
            events.append(f"open for writing {path}")
    elif event.startswith(FORBIDDEN):
        events.append(f"{event} {arguments!r:.200}")


def attempt(directory: Path) -> dict[str, object]:
    global allowed
    events.clear()
    allowed = directory
    error: BaseException | None = None
    try:
        checkpoint = open_checkpoint(directory)
        for name in checkpoint.names:
            checkpoint.read(name)
    except Exception as caught:
        error = caught
    finally:
        allowed = None
    return {
        "error": None if error is None else type(error).__name__,
        "is_ours": isinstance(error, Q35CError),
        "message": str(error),
        "events": list(events),
    }


def main() -> None:
    root = Path(sys.argv[1])
    attempt(root / "good")  # everything that is imported lazily is imported now
    sys.addaudithook(watch)
    report = {entry.name: attempt(entry) for entry in sorted(root.iterdir())}
    report["does not exist"] = attempt(root / "does not exist")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
