"""A conversation on the command line: what was said so far, and what is to be answered next."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from q35c.cli.signals import interrupting_once
from q35c.cli.texts import read_json
from q35c.errors import OptionError
from q35c.outputs import write_output

MESSAGES = "messages.json"  # of a conversation that is kept
_SEEDS = 1 << 63


class Talk:
    """The messages of a conversation, changed by what the user says and commands.

    messages    all but the system's
    system      what the system says first; empty: nothing
    thinking    whether the model may reason; None: as its template says
    shown       pictures and clips that the next message will show
    last        the last answer
    """

    def __init__(
        self,
        model: Any,
        system: str = "",
        thinking: bool | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        """`options` are those of `Model.chat`."""
        from q35c.runtime.answering import Conversation

        self.model = model
        self.system, self.thinking = system, thinking
        self.messages: list[dict[str, Any]] = []
        self.tools: list[Any] = []
        self.shown: list[dict[str, Any]] = []
        self.last: Any = None
        self.answers = 0
        self._seed = secrets.randbits(48) if seed is None else seed
        self._attempt = 0
        self._options = options
        self._before: list[dict[str, Any]] = []  # the messages before the last change
        self._conversation = Conversation(model)
        self._kept: Path | None = None

    def close(self) -> None:
        """Give the session back; first write what `resume` goes on from. Raises OptionError, DiskRefused."""
        try:
            if self._kept is not None:
                self.save(self._kept / MESSAGES)
                self._conversation.save(self._kept)
        finally:
            self._conversation.close()

    def resume(self, directory: Path) -> None:
        """Go on from what a directory holds, and keep there what is said. Raises OptionError.

        A directory without messages is a new conversation. What an answer computed is kept too, for this model alone.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot keep a conversation here: {error.strerror}"
            raise OptionError(what, where=str(directory)) from None
        if os.path.lexists(directory / MESSAGES):
            self.load(directory / MESSAGES)
        self._conversation.load(directory)
        self._kept = directory

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """Return the calls of the last answer that have no result yet."""
        places = [at for at, message in enumerate(self.messages) if message["role"] != "tool"]
        if not places:
            return []
        given = len(self.messages) - 1 - places[-1]
        return self.messages[places[-1]].get("tool_calls", [])[given:]

    @property
    def is_due(self) -> bool:
        """Say whether the model is to answer."""
        return (
            bool(self.messages) and self.messages[-1]["role"] != "assistant" and not self.open_calls
        )

    def say(self, text: str) -> None:
        """Say something, which is the result of a call where one is open."""
        self._before, self._attempt = list(self.messages), 0
        calls = self.open_calls
        if calls:
            self.messages.append({"role": "tool", "content": text, "tool_call_id": calls[0]["id"]})
            return
        said: Any = text
        if self.shown:
            said, self.shown = [*self.shown, {"type": "text", "text": text}], []
        self.messages.append({"role": "user", "content": said})

    def show(self, path: Path, is_clip: bool = False) -> None:
        """Show a picture or clip with the next message. Raises MediaError, OptionError; then nothing has changed.

        Messages hold what the file holds, so that a conversation that is saved needs no other file.
        """
        from q35c.vision.pictures import read_file

        kind = "video" if is_clip else "image"
        url = f"data:{kind};base64,{b64encode(read_file(path, str(path))).decode()}"
        part = {"type": kind, kind: url}
        self.model.prompting.check_shown([{"role": "user", "content": [part]}], str(path))
        self.shown.append(part)

    def answer(self, write: Callable[[Any], None]) -> Any:
        """Let the model answer, and write the parts as they come; return the answer, None if there is none.

        Ctrl-C ends the answer, and what came of it stays. Where nothing came, or an error, all is as before.
        """
        made: Any = None
        try:
            # It may come at any moment, that between an answer's end and ours included.
            with contextlib.suppress(KeyboardInterrupt), interrupting_once():
                made = self._write_answer(write)
        finally:
            if made is None:
                self.messages = self._before
        if made is not None:
            self.last = made
            self.answers += 1
            self.messages.append(made.message)
        return made

    def _write_answer(self, write: Callable[[Any], None]) -> Any:
        stream: Any = None
        seed = (self._seed + len(self.messages) + self._attempt) % _SEEDS
        try:
            stream = self._conversation.answer(
                self.history(),
                tools=self.tools or None,
                thinking=self.thinking,
                seed=seed,
                **self._options,
            )
            for part in stream:
                write(part)
        except KeyboardInterrupt:
            if stream is None:
                return None
        finally:
            if stream is not None:
                stream.close()
        assert stream is not None
        made = stream.result
        is_empty = not (made.content or made.reasoning or made.tool_calls)
        return None if is_empty and made.finish_reason == "cancelled" else made

    def history(self) -> list[dict[str, Any]]:
        """Return all messages."""
        begin = [{"role": "system", "content": self.system}] if self.system else []
        return begin + self.messages

    def reset(self) -> None:
        """Forget what was said, but for the system."""
        self.messages, self.shown = [], []

    def undo(self) -> str:
        """Take the last thing the user said back, and all that followed; return it. Raises OptionError."""
        place = self._last_said()
        said = self.messages[place]["content"]
        del self.messages[place:]
        if isinstance(said, str):
            return said
        self.shown = [part for part in said if part["type"] != "text"]
        return "".join(part.get("text", "") for part in said)

    def regenerate(self) -> None:
        """Take the last answer back, so that another one is due. Raises OptionError."""
        self._last_said()
        self._before = list(self.messages)
        self._attempt += 1
        while self.messages[-1]["role"] == "assistant":
            self.messages.pop()

    def _last_said(self) -> int:
        places = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise OptionError("nothing was said yet")
        return places[-1]

    def save(self, path: Path) -> None:
        """Write the messages as JSON, for this user alone. Raises OptionError, DiskRefused."""
        text = json.dumps(self.history(), ensure_ascii=False, indent=1)
        write_output(path, text.encode() + b"\n", mode=0o600)

    def load(self, path: Path) -> None:
        """Go on from messages in a JSON file. Raises OptionError; then nothing has changed."""
        from q35c.runtime.attachments import put_back
        from q35c.runtime.chat.normalise import normalise

        given = read_json(path)
        places, _ = self.model.prompting.take(given)
        messages = put_back(normalise(places), given)
        has_system = messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else ""
        self.messages = messages[1:] if has_system else messages
        self._before = list(self.messages)

    def load_tools(self, path: Path) -> None:
        """Offer the tools whose schemas a JSON file lists. Raises OptionError; then nothing has changed."""
        from q35c.runtime.chat.answer import AnswerParser

        tools = read_json(path)
        AnswerParser(tools)
        self.tools = tools
