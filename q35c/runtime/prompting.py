"""Make a model's prompts of what callers say and show: texts, ids, conversations, pictures, clips."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from q35c import arguments
from q35c.artifact import Artifact
from q35c.errors import OptionError, PromptError, TokenizerError
from q35c.runtime.attachments import Attachment, attach, show, take_attachments
from q35c.runtime.multimodal import MultimodalPrompt, Prompt, check_prompt
from q35c.runtime.prompts import encode_prompt, split_prompts
from q35c.runtime.seeing import Eyes, assemble, refuse_attachments
from q35c.runtime.stored_template import read_template
from q35c.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from q35c.runtime.chat import Message


class Prompting:
    """The tokenizer, the chat template and the eyes of a model. Safe to share between threads."""

    def __init__(
        self, artifact: Artifact, context: int, eyes: Eyes | None, check_usable: Callable[[], None]
    ) -> None:
        """Made by `Model`. `check_usable` is called before the file is read."""
        self.eyes = eyes
        self._check_usable = check_usable
        self._artifact, self._context = artifact, context
        self._lazy = threading.RLock()  # a signal handler may need the same
        self._tokenizer: Tokenizer | None = None
        self._template: tuple[str, dict[str, str]] | None = None

    @property
    def has_text(self) -> bool:
        """Say whether there is a tokenizer."""
        return self._artifact.has_segment("tokenizer")

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, built on first use. Raises TokenizerError if there is none."""
        with self._lazy:
            if self._tokenizer is None:
                self._check_usable()
                if not self.has_text:
                    raise TokenizerError(
                        "the artifact holds no tokenizer",
                        where=str(self._artifact.path),
                        hint="pass token ids instead of text",
                    )
                self._tokenizer = Tokenizer(self._artifact.segment("tokenizer"))
            return self._tokenizer

    def encode(
        self, prompt: Any, images: Any = None, videos: Any = None, number: int | None = None
    ) -> Prompt:
        """Return a prompt: a text, ids, a conversation, or one with pictures already. Errors say the `number` of several."""
        attachments = self._attached(images, videos)
        try:
            if isinstance(prompt, MultimodalPrompt):
                if attachments:
                    raise OptionError(
                        "the prompt has pictures of its own", where=attachments[0].where
                    )
                return check_prompt(prompt, self._artifact.manifest, self._context)
            if is_conversation(prompt):
                return self.encode_chat(prompt, images=images, videos=videos)
            vocab = self._artifact.manifest.model.vocab_size
            ids = encode_prompt(prompt, lambda: self.tokenizer, vocab, self._context)
            return self._with_pictures(self._with_pads(ids, attachments), attachments)
        except PromptError as error:
            if number is not None:
                error.where = ", ".join(filter(None, (f"prompt {number}", error.where)))
            raise

    def render(
        self, messages: Sequence[Message], *, allow_files: bool = False, **options: Any
    ) -> str:
        """Return the text of a conversation, one pad for each picture. See `Model.apply_chat_template`."""
        from q35c.runtime.chat import render_chat

        template, special_tokens = self._chat_template()
        places, _ = self.take(messages, allow_files=allow_files)
        return render_chat(template, _readable(places), special_tokens=special_tokens, **options)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        images: Any = None,
        videos: Any = None,
        allow_files: bool = False,
        **options: Any,
    ) -> Prompt:
        """Return the prompt of a conversation. See `Model.encode_chat`."""
        places, attachments = self.take(messages, images, videos, allow_files)
        return self.encode_places(places, attachments, **options)

    def take(
        self, messages: Any, images: Any = None, videos: Any = None, allow_files: bool = False
    ) -> tuple[list[Any], list[Attachment]]:
        """Return messages with places for what they show and what is attached, and that, in order.

        Raises OptionError, MediaError, naming the part.
        """
        from q35c.runtime.chat.messages import check_messages, refuse_media

        listed = check_messages(messages)
        if attached := self._attached(images, videos):
            listed = show(listed, attached)
        if self.eyes is None:
            refuse_media(listed)
        return take_attachments(listed, arguments.flag("allow_files", allow_files))

    def check_shown(self, messages: Any, where: str) -> None:
        """Open what messages show, without looking at it. Raises MediaError, PromptError at `where`."""
        _, attachments = take_attachments(messages)
        named = [replace(attachment, where=where) for attachment in attachments]
        if self.eyes is None:
            refuse_attachments(named)
        else:
            self.eyes.look(named, self._context, is_blank=True)

    def encode_places(
        self,
        messages: Sequence[Message],
        attachments: Sequence[Attachment],
        *,
        allow_special: bool = False,
        salt: str = "",
        is_blank: bool = False,
        **options: Any,
    ) -> Prompt:
        """Return the prompt of a conversation in which places stand for these pictures and clips, in order.

        What was seen is shared between callers of the same `salt`; if `is_blank`, nothing is computed, and rows are zeros.
        """
        from q35c.runtime.chat import render_guarded

        tokenizer = self.tokenizer
        template, special_tokens = self._chat_template()
        tokens = () if allow_special else tokenizer.special_tokens
        text, reveal = render_guarded(
            template, _readable(messages), tokens, special_tokens=special_tokens, **options
        )
        ids = tokenizer.encode(text) if allow_special else tokenizer.encode_guarded(text, reveal)
        return self._with_pictures(ids, attachments, salt, is_blank)

    def _attached(self, images: Any, videos: Any) -> list[Attachment]:
        """Return what a caller attaches. Raises MediaError where the model reads text alone."""
        attached = [
            *(attach(images, "images", is_clip=False) if images is not None else ()),
            *(attach(videos, "videos", is_clip=True) if videos is not None else ()),
        ]
        if self.eyes is None:
            refuse_attachments(attached)
        return attached

    def _with_pads(self, ids: list[int], attachments: Sequence[Attachment]) -> list[int]:
        """Return ids with a place for each picture and clip before the text, unless the text has places."""
        if self.eyes is None or not attachments:
            return ids
        config = self.eyes.config
        pads = (config.image_token_id, config.video_token_id)
        if any(token in pads for token in ids):
            return ids
        begun: list[int] = []
        for attachment in attachments:
            pad = pads[attachment.is_clip]
            begun += [config.vision_start_token_id, pad, config.vision_end_token_id]
        return begun + ids

    def _with_pictures(
        self,
        ids: list[int],
        attachments: Sequence[Attachment],
        salt: str = "",
        is_blank: bool = False,
    ) -> Prompt:
        if self.eyes is None or not attachments:
            return ids
        check_prompt(ids, self._artifact.manifest, self._context)
        seen = self.eyes.look(attachments, self._context - len(ids), salt, is_blank=is_blank)
        config = self.eyes.config
        made = assemble(ids, attachments, seen, config, lambda text: self.tokenizer.encode(text))
        return check_prompt(made, self._artifact.manifest, self._context)

    def _chat_template(self) -> tuple[str, dict[str, str]]:
        with self._lazy:
            if self._template is None:
                self._check_usable()
                self._template = read_template(self._artifact)
            return self._template


def split(prompt: Any, images: Any = None, videos: Any = None) -> tuple[list[Any], bool]:
    """Return prompts as a list, and whether there was a single one, as which pictures ask for. Raises PromptError, OptionError."""
    if is_conversation(prompt):
        return [prompt], True
    prompts, is_single = split_prompts(prompt, MultimodalPrompt)
    if not is_single and (images is not None or videos is not None):
        raise OptionError(
            "pictures belong to one prompt", where="images", got=f"{len(prompts)} prompts"
        )
    return prompts, is_single


def is_conversation(prompt: Any) -> bool:
    """Say whether a prompt is a list of messages."""
    if not isinstance(prompt, (list, tuple)):
        return False
    items = cast(Sequence[Any], prompt)
    return bool(items) and isinstance(items[0], Mapping)


def _readable(messages: Any) -> list[Any]:
    """Return messages whose calls have arguments that templates read."""
    from q35c.runtime.chat.messages import parse_arguments

    return parse_arguments(messages)
