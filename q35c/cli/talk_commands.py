"""The commands inside `q35c chat`: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from q35c import arguments
from q35c.cli.talk import Talk
from q35c.errors import OptionError

if TYPE_CHECKING:
    from q35c.runtime.answers import ChatAnswer

Run = Callable[[Talk, str], str]
EXIT = "/exit"


@dataclass(frozen=True)
class Command:
    """A command: what it takes, what it does in a few words, and the function, which returns what to tell the user."""

    takes: str
    help: str
    run: Run


def run_command(talk: Talk, line: str) -> str:
    """Run a command; return what to tell the user. Raises OptionError."""
    name, _, argument = line.partition(" ")
    name = arguments.choice("command", name, [*COMMANDS], "command")
    command, argument = COMMANDS[name], argument.strip()
    is_optional = command.takes.startswith("[")
    if bool(argument) != bool(command.takes) and not is_optional:
        usage = f"{name} {command.takes}".strip()
        raise OptionError("wrong number of arguments", where=name, expected=usage)
    return command.run(talk, argument)


def _reset(talk: Talk, _: str) -> str:
    talk.reset()
    return "a new conversation"


def _system(talk: Talk, text: str) -> str:
    talk.system = text
    return "the system says that from the next answer on" if text else "the system says nothing"


def _undo(talk: Talk, _: str) -> str:
    return f"taken back: {talk.undo()}"


def _regenerate(talk: Talk, _: str) -> str:
    talk.regenerate()
    return ""


def _save(talk: Talk, name: str) -> str:
    talk.save(Path(name).expanduser())
    return f"saved {len(talk.history())} messages"


def _load(talk: Talk, name: str) -> str:
    talk.load(Path(name).expanduser())
    return f"loaded {len(talk.history())} messages"


def _think(talk: Talk, value: str) -> str:
    talk.thinking = arguments.choice("/think", value, ["on", "off"], "setting") == "on"
    return f"thinking is {value}"


def _tools(talk: Talk, name: str) -> str:
    if name == "off":
        talk.tools = []
        return "no tools"
    talk.load_tools(Path(name).expanduser())
    return f"{len(talk.tools)} tools; what you enter after a call is its result"


def _image(talk: Talk, name: str) -> str:
    talk.show(Path(name).expanduser())
    return "your next message shows it"


def _video(talk: Talk, name: str) -> str:
    talk.show(Path(name).expanduser(), is_clip=True)
    return "your next message shows it"


def _stats(talk: Talk, _: str) -> str:
    lines = [f"{len(talk.history())} messages, {talk.answers} answers"]
    if talk.last is not None:
        usage = talk.last.usage
        used = usage.prompt_tokens + usage.new_tokens
        lines.append(f"{used} of {talk.model.context} tokens of context used by the last answer")
        lines.append(describe_answer(talk.last))
    return "\n".join(lines)


def _help(_talk: Talk, _: str) -> str:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    lines = [
        f"{f'{name} {command.takes}':<{width}}  {command.help}"
        for name, command in COMMANDS.items()
    ]
    lines.append('Lines between """ and """ are one message, and so are lines pasted at once.')
    lines.append("A message that begins with a slash begins with two. Ctrl-C stops an answer.")
    return "\n".join(lines)


def _exit(_talk: Talk, _: str) -> str:
    raise EOFError


COMMANDS: dict[str, Command] = {
    "/reset": Command("", "begin a new conversation", _reset),
    "/system": Command("[TEXT]", "let the system say something first, or nothing", _system),
    "/undo": Command("", "take back what you said last, and the answer", _undo),
    "/regen": Command("", "take back the answer, and have another one", _regenerate),
    "/save": Command("FILE", "write the conversation as JSON", _save),
    "/load": Command("FILE", "go on from a conversation in a file", _load),
    "/think": Command("on|off", "let the model think first, or not", _think),
    "/tools": Command("FILE|off", "offer the tools whose JSON schemas a file lists", _tools),
    "/image": Command("FILE", "show a picture with your next message", _image),
    "/video": Command("FILE", "show a clip with your next message", _video),
    "/stats": Command("", "figures of this conversation", _stats),
    "/help": Command("", "this list", _help),
    EXIT: Command("", "end; so does Ctrl-D", _exit),
}


def describe_answer(answer: ChatAnswer) -> str:
    """Return a line about an answer: why it ended, and its speed; and what to do where the context is full."""
    usage = answer.usage
    computed = usage.prompt_tokens - usage.cached_tokens
    rate = computed / usage.prefill_seconds if usage.prefill_seconds else 0.0
    is_full = answer.finish_reason == "context"
    hint = "\nthe context is full: /reset begins anew, /undo takes a turn back" if is_full else ""
    return (
        f"[{answer.finish_reason}; prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} cached, "
        f"the rest at {rate:.1f} tok/s; new {usage.new_tokens} tokens at "
        f"{usage.decode_tokens_per_second:.1f} tok/s]{hint}"
    )
