"""Make answers obey a structure: a mask of the allowed tokens for each step. Needs the package `llguidance`.

A `Constraint` is compiled once and says what an answer may be; each row has a `Matcher` of its own that follows it. What
cannot be enforced is refused by name, never left out. Where an answer begins inside reasoning, the structure begins
behind `</think>`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections import deque
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from q35c import arguments
from q35c.errors import OptionError, ToolchainError
from q35c.runtime.grammar_text import GrammarText
from q35c.runtime.sampling import Mask
from q35c.runtime.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["object", "schema", "regex", "choice", "grammar", "calls"]
KINDS: tuple[Kind, ...] = ("object", "schema", "regex", "choice", "grammar", "calls")
END_OF_REASONING = "</think>"
_EXCERPT = re.compile(r"\s*\d+ \| |\s*\^+$")
_JSON_PREFIX = "failed to compile JSON schema: "
# What the compiler says where it is a matter of what it can do, not of a schema that is wrong.
_UNSUPPORTED = ("Unimplemented keys", "oneOf constraints", "Unknown format", "Resource ")


class Grammars:
    """Compile structures for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: Iterable[int]) -> None:
        """`vocab` is the number of logits; one of the stop ids ends an answer. The package is loaded on first use."""
        self.tokenizer = tokenizer
        self.vocab = vocab
        self.stop_ids = tuple(sorted(stop_ids))
        self._lock = threading.Lock()
        self._backend: LLTokenizer | None = None

    def compile(
        self,
        kind: str,
        value: Any,
        *,
        where: str = "structure",
        is_thinking: bool = False,
        is_parallel: bool = True,
        thinking_tokens: int | None = None,
    ) -> Constraint:
        """Return the constraint of a structure.

        kind             "object" (any JSON object), "schema", "regex", "choice", "grammar" (Lark), "calls" (tool calls)
        value            None, a JSON schema, a pattern, texts, a Lark text, or pairs of a tool's name and its schema
        where            what errors name
        is_thinking      the answer begins inside reasoning
        is_parallel      more than one call is allowed
        thinking_tokens  tokens after which reasoning is closed; None: whenever the model does

        Raises OptionError for what is malformed, costs too much, or cannot be enforced; ToolchainError without the
        package.
        """
        arguments.choice("kind", kind, KINDS, "structure")
        backend = self.backend
        text = GrammarText(functools.partial(self._literal_ids, backend), self.refusal, where)
        with _surviving(where):
            grammar = text.of(kind, value, is_thinking=is_thinking, is_parallel=is_parallel)
            matcher = self._start_of(grammar, where)
        if thinking_tokens is not None:
            thinking_tokens = arguments.integer("thinking_tokens", thinking_tokens, 0)
        return Constraint(self, matcher, where, is_thinking, thinking_tokens)

    def _start_of(self, grammar: str, where: str) -> LLMatcher:
        if problem := self.refusal(grammar):
            unsupported = problem.startswith(_UNSUPPORTED)
            what = "cannot be enforced" if unsupported else "malformed"
            raise OptionError(f"{what}: {problem}", where=where)
        matcher = self.make_matcher(grammar)
        if matcher.is_error():
            raise OptionError(f"cannot be enforced: {_brief(matcher.get_error())}", where=where)
        return matcher

    @property
    def backend(self) -> LLTokenizer:
        """Return the vocabulary as the package needs it: a second or two at first. Raises ToolchainError."""
        with self._lock:
            if self._backend is None:
                self._backend = self._load()
            return self._backend

    def _load(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError:
            raise ToolchainError(
                "structured answers need the package 'llguidance', which is not installed",
                hint="pip install 'q35c[serve]'",
            ) from None
        document, stops = self.tokenizer.document, list(self.stop_ids) or None
        return LLTokenizer(document, n_vocab=self.vocab, eos_token=stops)

    @functools.cached_property
    def reasoning_mask(self) -> Mask:
        """Return a mask of all tokens but those that end an answer."""
        return _mask_of(np.delete(np.arange(self.vocab), self.stop_ids), self.vocab)

    def refusal(self, grammar: str) -> str:
        """Return why a grammar cannot be used, nothing if it can."""
        from llguidance import LLMatcher

        return _brief(LLMatcher.validate_grammar(grammar, self.backend))

    def make_matcher(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(self.backend, grammar, log_level=0, limits=limits)

    def _literal_ids(self, backend: LLTokenizer, text: str) -> int | None:
        """Return the id of a text that is a token of its own, which its bytes do not spell."""
        token = self.tokenizer.token_id(text)
        is_own = token is not None and backend.is_special_token(token)
        return token if is_own else None


class Constraint:
    """What an answer must look like. Each row asks for a matcher."""

    def __init__(
        self,
        grammars: Grammars,
        start: LLMatcher,
        where: str,
        is_thinking: bool,
        thinking_tokens: int | None,
    ) -> None:
        """Made by `Grammars.compile`."""
        self._grammars, self._start, self._where = grammars, start, where
        self._is_thinking, self._thinking_tokens = is_thinking, thinking_tokens

    def matcher(self) -> Matcher:
        """Return a matcher at the beginning of an answer."""
        reasoning = _Reasoning(self._grammars, self._thinking_tokens) if self._is_thinking else None
        return Matcher(self._grammars, self._start.deep_copy(), self._where, reasoning)


class Matcher:
    """Follow one answer, token by token."""

    def __init__(
        self, grammars: Grammars, matcher: LLMatcher, where: str, reasoning: _Reasoning | None
    ) -> None:
        """Made by `Constraint.matcher`."""
        self._grammars, self._matcher, self._where = grammars, matcher, where
        self._reasoning = reasoning

    @property
    def is_complete(self) -> bool:
        """Say whether the answer may end here."""
        return self._reasoning is None and self._matcher.is_accepting()

    def mask(self) -> Mask:
        """Return which tokens may come next. Raises OptionError if that costs too much to find out."""
        if self._reasoning is not None:
            return self._reasoning.mask()
        with _surviving(self._where):
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """Go on by a token that the mask allows. Raises OptionError for any other."""
        with _surviving(self._where):
            if self._reasoning is None:
                self._matcher.consume_token(token)
            elif (rest := self._reasoning.accept(token)) is not None:
                self._reasoning = None
                if rest:  # the token that closed the reasoning was longer
                    self._matcher.consume_tokens(self._grammars.backend.tokenize_str(rest))
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = _brief(self._matcher.get_error())
            raise OptionError(f"the structure cannot be followed: {problem}", where=self._where)


@contextlib.contextmanager
def _surviving(where: str) -> Generator[None]:
    """Turn a panic of the package, which is no Exception, into an error of the structure that led to it."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise OptionError("cannot be enforced: its compiler fails", where=where) from None


class _Reasoning:
    """Wait for the end of reasoning in the text, as that is what the answer's reader looks at."""

    def __init__(self, grammars: Grammars, most_tokens: int | None) -> None:
        self._grammars = grammars
        self._stream = TextStream(grammars.tokenizer)
        self._id = grammars.tokenizer.token_id(END_OF_REASONING)
        self._tail = ""
        self._left = most_tokens
        self._forced: deque[int] = deque()

    def mask(self) -> Mask:
        """Return all tokens but those that end the answer; or the one that closes the reasoning."""
        if self._left == 0 and not self._forced:
            ids = (
                self._grammars.tokenizer.encode(END_OF_REASONING)
                if self._id is None
                else [self._id]
            )
            self._forced.extend(ids)
        if self._forced:
            return _mask_of(np.array([self._forced[0]]), self._grammars.vocab)
        return self._grammars.reasoning_mask

    def accept(self, token: int) -> str | None:
        """Return the text behind the end of reasoning, None before it."""
        if self._left:
            self._left -= 1
        if self._forced:
            self._forced.popleft()
        if token == self._id:
            return ""
        text = self._tail + self._stream.push(token)
        at = text.find(END_OF_REASONING)
        if at >= 0:
            return text[at + len(END_OF_REASONING) :]
        self._tail = text[1 - len(END_OF_REASONING) :]
        return None


def _mask_of(ids: Any, vocab: int) -> Mask:
    bits = np.zeros(-(-vocab // 32) * 32, dtype=np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _brief(text: str) -> str:
    """Return what a message says, without the excerpt of a grammar that nobody has written."""
    lines = text.replace("<non-verbose/>", "").strip().splitlines()
    said = " ".join(line.strip() for line in lines if not _EXCERPT.match(line)).strip()
    return said.rpartition(_JSON_PREFIX)[2][:300]
