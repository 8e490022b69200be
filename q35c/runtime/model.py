"""A loaded model: immutable, shared by threads. Everything that changes is in sessions."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from q35c import arguments
from q35c.artifact import Artifact, Manifest
from q35c.artifact.leaves import Probe
from q35c.errors import OptionError
from q35c.runtime.device import Block, Logits, Rows
from q35c.runtime.executor import Executor, Recording
from q35c.runtime.generate import (
    Row,
    Stream,
    resolve_options,
    run_rows,
)
from q35c.runtime.grammar import Grammars
from q35c.runtime.lease import MESSAGE_START, Lease
from q35c.runtime.memory import StateBudget, available_memory
from q35c.runtime.multimodal import Prompt, PromptLike, token_ids
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.prompting import Prompting, split
from q35c.runtime.sampling import MAX_SEED
from q35c.runtime.seeing import Eyes
from q35c.runtime.session import Progress, Session
from q35c.runtime.sight import Patches, see
from q35c.runtime.tokenizer import Tokenizer
from q35c.vision.patches import Frame

if TYPE_CHECKING:
    from types import TracebackType

    from q35c.runtime.chat import Message


class Model:
    """A model ready to run. Safe to share between threads; sessions are not."""

    def __init__(
        self,
        artifact: Artifact,
        executor: Executor,
        budget: StateBudget,
        context: int,
        batch: int,
    ) -> None:
        """Made by `load_model`."""
        self.context = context
        self.batch = batch
        self.threads = executor.device.threads
        self.device = executor.device.name
        self._artifact = artifact
        self._executor = executor
        self._budget = budget
        self._lazy = threading.RLock()  # a signal handler may need the same
        self._grammars: Grammars | None = None
        vision = artifact.manifest.vision
        eyes = None if vision is None else Eyes(vision.config, vision.parameters, self._see)
        self._prompting = Prompting(artifact, context, eyes, executor.check_usable)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker threads and close the file; later calls raise OptionError. May be called twice.

        A model does not survive a fork: in the child each call but this one raises OptionError, whatever the number of
        threads.
        """
        self._executor.close()
        self._artifact.close()

    @property
    def manifest(self) -> Manifest:
        """Return what the artifact says about itself."""
        return self._artifact.manifest

    @property
    def vocab_size(self) -> int:
        """Return the number of logits."""
        return self.manifest.model.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, built on first use. Raises TokenizerError if there is none."""
        self._executor.origin.check()
        return self._prompting.tokenizer

    @property
    def grammars(self) -> Grammars:
        """Return what compiles structures of answers. Raises TokenizerError without a tokenizer."""
        with self._lazy:
            if self._grammars is None:
                stops = self.manifest.generation.stop_ids
                self._grammars = Grammars(self.tokenizer, self.vocab_size, stops)
            return self._grammars

    def see(self, patches: Patches, grid: Sequence[int]) -> Rows:
        """Return the rows that stand for a picture, or a pair of frames, in place of its tokens: f32[tokens, hidden].

        `patches` are u8[rows * columns, patch_bytes] as `q35c.vision` makes them, `grid` their rows and columns; 2 x 2 patches
        are one token. Raises PromptError for others, and where the model has no vision tower.
        """
        self._executor.check_usable()
        return see(self._executor, patches, grid)

    def _see(self, frame: Frame) -> Rows:
        return self.see(frame.patches, (frame.rows, frame.columns))

    def session(self, context: int | None = None) -> Session:
        """Open the state of one sequence of at most `context` tokens, by default the model's context.

        Raises MemoryRefused if it would not fit beside the sessions that are open, OptionError.
        """
        self._executor.check_usable()
        if context is None:
            context = self.context
        context = arguments.integer("context", context, 1, self.context)
        return Session(self._executor, self._budget, self._artifact.digest, context)

    def cache(self, max_bytes: int | None = None) -> PrefixCache:
        """Return what keeps states of prompts, for `generate`: of prompts that begin alike that part is computed once.

        `max_bytes` is by default a quarter of the memory that is left. With a cache, even of 0 bytes, a prompt is cut into calls
        at multiples of 64 tokens, so that the result does not depend on what is kept. Raises OptionError.
        """
        limit = available_memory().bytes // 4 if max_bytes is None else max_bytes
        limit = arguments.integer("max_bytes", limit, 0, 2**62)
        start = self.tokenizer.token_id(MESSAGE_START) if self._prompting.has_text else None
        return PrefixCache(self.session, self.manifest, limit, start, self._artifact.digest)

    def record(self) -> AbstractContextManager[list[Recording]]:
        """Return a context in which the times of every kernel are added to the list that it yields."""
        return self._executor.record()

    def probe_memory(self, size: int) -> Block:
        """Return memory that probes may use. Raises MemoryRefused if the address space does not suffice."""
        return self._executor.device.block(arguments.integer("size", size, 1, 2**62))

    def run_probe(self, probe: Probe, address: int, amount: int) -> float:
        """Return the seconds of `amount` units of a probe's work, on memory at an aligned address that it may overwrite."""
        probe = arguments.instance("probe", probe, Probe)
        address = arguments.integer("address", address, 1, 2**63 - 1)
        amount = arguments.integer("amount", amount, 1, 2**62)
        return self._executor.run_probe(probe, address, amount)

    def score(self, ids: PromptLike, progress: Progress | None = None) -> Logits:
        """Return the logits f32[S, V] after each token of a sequence. Raises as `Session.score`."""
        with self.session() as session:
            return session.score(ids, progress)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        stream: bool = False,
        session: Session | None = None,
        cache: PrefixCache | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
        response_format: Any = None,
    ) -> Any:
        """Continue a prompt, or each of a list of prompts.

        prompt              a text, token ids as a list, tuple, other sequence or integer array, a conversation, or a
                            `MultimodalPrompt`; or a list of those, or an integer array of two axes, a prompt each row
        images, videos      what the prompt shows, before its text or where it has pads: paths, bytes of files, data URLs, Pillow
                            images, arrays; for clips also `Clip`, or lists of frames
        max_new_tokens      tokens at most, 128 by default; fewer if the context is full; -1: until it is full
        stream              return a `Stream` of text pieces instead of the whole text
        session             continue in this session (one prompt); it then holds prompt and answer, also of a
                            stream that was closed, but for a last token that found the context full
        cache               begin with what is kept of earlier prompts (`Model.cache`), and keep this one
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty
                            how to sample, by default as the checkpoint says; temperature 0 is greedy
        frequency_penalty   taken from a token's logit for each time it was generated
        logit_bias          what is added to the logits of tokens, by id
        seed                0..2^64-1; prompt i uses seed + i; by default a random one
        stop, stop_ids      a text or a list of texts (or control tokens), and a list of token ids, that end the text; `stop_ids`
                            replaces the defaults
        response_format     what the text must look like, in the form of `structures.read_format`

        Returns a `Generation` (a `str`) for one prompt, a list of them for a list, or a `Stream`. Raises
        PromptError, OptionError, TokenizerError, MemoryRefused.
        """
        self._executor.check_usable()
        is_stream = arguments.flag("stream", stream)
        options = resolve_options(
            self.manifest.generation,
            self.vocab_size,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
            stop=stop,
            stop_ids=stop_ids,
        )
        prompts, is_single = split(prompt, images, videos)
        if session is not None:
            arguments.instance("session", session, Session).check_owner(self._executor)
            if not is_single:
                raise OptionError("a session continues one prompt", where="session")
        if cache is not None:
            self._check_cache(cache, session)
        tokenizer = self.tokenizer if self._prompting.has_text else None
        if options.stop:
            if tokenizer is None:
                raise OptionError("stop strings need a tokenizer", where="stop")
            texts, ids = tokenizer.split_stops(options.stop)
            options = replace(options, stop=texts, stop_ids=options.stop_ids | ids)
        encoded = [
            self._prompting.encode(item, images, videos, None if is_single else number)
            for number, item in enumerate(prompts)
        ]
        rows = [
            Row(ids, options, (options.seed + index) % (MAX_SEED + 1), tokenizer, session)
            for index, ids in enumerate(encoded)
        ]
        self._follow(rows, response_format)

        def open_session(prompt: Prompt) -> Session | Lease:
            context = min(self.context, len(prompt) + options.max_new_tokens)
            return self.session(context) if cache is None else cache.open(prompt, context)

        pieces = Stream(rows, run_rows(rows, self.batch, open_session), is_single)
        if is_stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result if is_single else pieces.results

    def _follow(self, rows: Sequence[Row], response_format: Any) -> None:
        """Let the tokens of rows follow a structure, after what a prompt lets the model think. Raises OptionError."""
        if response_format is None:
            return
        from q35c.runtime.answering import begins_thinking, find_matcher
        from q35c.runtime.structures import read_format

        wanted = read_format(response_format)
        for row in rows:
            is_thinking = begins_thinking(self.tokenizer, token_ids(row.prompt))
            row.matcher = find_matcher(self, wanted, is_thinking)

    def chat(self, messages: Sequence[Message], *, stream: bool = False, **options: Any) -> Any:
        """Answer a conversation: messages as clients of common APIs send them, with `role` and `content`.

        tools               functions the model may call: JSON schemas, or functions with hints and a docstring
        thinking            whether the model may reason first, where the template knows `enable_thinking`
        template            further variables of the template
        tool_choice         auto, none, required, or the name of a tool; parallel_tool_calls=False: one call at most
        response_format     what the answer must look like, in the form of `structures.read_format`
        stream              return a `ChatStream` of parts (`q35c.runtime.chat.answer`) instead of the answer
        max_new_tokens      by default until the context is full; stop: texts that end the content

        Further options as in `generate`, whose errors it raises, and those of `apply_chat_template`. Control tokens in
        messages are plain text. Returns a `ChatAnswer`, or a `ChatStream`. `Conversation` keeps what turns share.
        """
        from q35c.runtime.answering import start_chat

        is_stream = arguments.flag("stream", stream)
        made = start_chat(self, messages, **options)
        if is_stream:
            return made
        for _ in made:
            pass
        return made.result

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the prompt text of a conversation: messages with `role` and `content`.

        add_generation_prompt   end with the beginning of an answer, by default True
        continue_final_message  end inside the last message, for the model to go on there
        tools                   JSON schemas, or functions with hints and a docstring
        documents               what some templates quote from

        Further options reach the template, as `enable_thinking=False`. Arguments of tool calls may be
        mappings or JSON text. Control tokens in a message become tokens when the text is encoded:
        `encode_chat` prevents it. Raises TokenizerError if the artifact has no template or if that
        fails, OptionError if the messages are malformed or the template refuses them.
        """
        self._executor.origin.check()
        return self._prompting.render(messages, **options)

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """Return the prompt of a conversation, for `generate`: ids, or a `MultimodalPrompt` if something is shown.

        images, videos  shown by the last message of a user, before what it says; as in `generate`
        allow_files     let a text in a message name a file to be shown; without it, only data URLs
        allow_special   let control tokens that are typed in messages be ones; without it they are plain text

        Further options as in `apply_chat_template`, whose errors it raises; and MediaError, PromptError for pictures and
        clips that cannot be read, and where they take more than the context, with the part they are.
        """
        self._executor.origin.check()
        return self._prompting.encode_chat(messages, **options)

    @property
    def prompting(self) -> Prompting:
        """Return what makes prompts of texts, conversations and pictures."""
        return self._prompting

    def _check_cache(self, cache: PrefixCache, session: Session | None) -> None:
        if arguments.instance("cache", cache, PrefixCache).manifest is not self.manifest:
            raise OptionError("the cache belongs to another model", where="cache")
        if session is not None:
            raise OptionError("a session has its own beginning", where="cache")
