"""Structures as text for the grammar compiler: what they may cost, and the form of the model's tool calls.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value is the text itself where the schema allows a string, else JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from q35c import arguments
from q35c.errors import OptionError

MOST_CHARACTERS = 64 << 10  # of a schema as JSON, of a grammar, of all choices
MOST_DEPTH, MOST_NODES, MOST_ENUM, MOST_OPTIONAL = 32, 1000, 10_000, 500
MOST_PATTERN = 10_000
MOST_TOOLS = 256
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_KEY = re.compile(r"[^<>\n\r\0]{1,256}")
# A tool's schema describes what the model should say: where it cannot be enforced, the rest of it is.
_LENIENT = {"x-guidance": {"lenient": True, "coerce_one_of": True}}
# Between the parts of a document: nothing, a space, or a line's end and its indentation. Without a limit a model can
# write spaces until its tokens are used up.
_SPACES = {"whitespace_pattern": r"( |\n {0,16})?"}
# An integer that is -2^63 as a double ends the process: the package recurses without end.
MOST_NUMBER = 10**18
# A multiple of n is an automaton of n states, and both of two are one of their least common multiple.
MOST_MULTIPLE = 100_000
_PREFIX = "PREFIX: /\\n{1,2}/"

Schema = Mapping[str, Any]


class GrammarText:
    """Write one structure as a grammar."""

    def __init__(
        self, own_token: Callable[[str], int | None], refusal: Callable[[str], str], where: str
    ) -> None:
        """`own_token` returns the id of a text that must be one token, `refusal` why a grammar cannot be used."""
        self._own_token, self._refusal, self._where = own_token, refusal, where

    def of(self, kind: str, value: Any, *, is_thinking: bool, is_parallel: bool) -> str:
        """Return the grammar. Raises OptionError for values of the wrong kind or that cost too much."""
        where = self._where
        if kind == "grammar":
            text = check_text(value, MOST_CHARACTERS, where)
            _check_nested_schemas(text, where)
            return self._nested(text, is_thinking)
        rules: list[str]
        if kind == "calls":
            body, rules = self._calls(value, is_parallel)
        elif kind == "regex":
            from llguidance import regex_to_lark

            pattern = check_text(value, MOST_PATTERN, where)
            body, rules = "TEXT", [f"TEXT: /{regex_to_lark(pattern, '')}/"]
        elif kind == "choice":
            texts = _check_choices(value, where)
            body, rules = "(" + " | ".join(map(_quoted, texts)) + ")", []
        else:
            schema: Any = {"type": "object"} if kind == "object" else check_cost(value, where)
            body, rules = _json(schema), []
        return _grammar([*_start(body, is_thinking), *rules])

    def _nested(self, text: str, is_thinking: bool) -> str:
        if not is_thinking:
            return _grammar([text])
        outer = "\n".join(_start("@answer", is_thinking))
        return json.dumps(
            {"grammars": [{"lark_grammar": outer}, {"name": "answer", "lark_grammar": text}]}
        )

    def _calls(self, tools: Any, is_parallel: bool) -> tuple[str, list[str]]:
        pairs = arguments.sequence(
            self._where, tools, "pairs of a name and a schema", most=MOST_TOOLS
        )
        if not pairs:
            raise OptionError("no tools", where=self._where)
        rules: list[str] = []
        names: list[str] = []
        for number, (name, schema) in enumerate(pairs):
            names.append(f"tool_{number}")
            rules += self._tool(names[-1], name, schema, f"{self._where}[{number}]")
        call = f'{self._literal(OPEN)} "\\n" ({" | ".join(names)}) {self._literal(CLOSE)}'
        rules.append(f"call: {call}")
        return ('call ("\\n" call)*' if is_parallel else "call"), rules

    def _tool(self, rule: str, name: Any, schema: Any, where: str) -> Iterator[str]:
        """Yield the rules of one tool's calls: its parameters in order, those that are not required by chance."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError("not a tool's name", where=where, got=name)
        schema = _check_parameters(schema, where)
        if problem := self._refusal(_grammar([f"start: {_json(_LENIENT | dict(schema))}"])):
            raise OptionError(f"malformed: {problem}", where=where)
        parts = [_quoted(f"<function={name}>\n")]
        required = schema.get("required", ())
        properties = cast(Schema, schema.get("properties", {}))
        for number, (key, item) in enumerate(properties.items()):
            if not _KEY.fullmatch(key):
                raise OptionError("not a parameter's name", where=where, got=key)
            value = f"{rule}_{number}"
            parts.append(f"{value}" if key in required else f"{value}?")
            yield from _parameter(value, key, item, schema)
        parts.append(_quoted("</function>\n"))
        yield f"{rule}: {' '.join(parts)}"

    def _literal(self, text: str) -> str:
        token = self._own_token(text)
        return _quoted(text) if token is None else f"<[{token}]>"


def check_text(value: Any, most: int, where: str) -> str:
    """Return a text that is not too long. Raises OptionError."""
    text = arguments.text(where, value)
    if not 1 <= len(text) <= most:
        raise OptionError(
            "too costly", where=where, expected=f"1 to {most} characters", got=len(text)
        )
    return text


def check_cost(schema: Any, where: str) -> Any:
    """Return a JSON schema that a compiler can be given. Raises OptionError for what would cost too much.

    Some schemas of a few kilobytes take a compiler seconds, so size alone is no measure.
    """
    if not isinstance(schema, (Mapping, bool)):
        raise OptionError("not a JSON schema", where=where, got=schema)
    nodes = 0
    multiples: list[Any] = []
    todo: list[tuple[Any, int]] = [(schema, 1)]
    while todo:
        item, depth = todo.pop()
        _check(depth <= MOST_DEPTH, where, f"at most {MOST_DEPTH} levels")
        if isinstance(item, Mapping):
            nodes += 1
            _check(nodes <= MOST_NODES, where, f"at most {MOST_NODES} objects")
            mapping = cast(Schema, item)
            _check_object(mapping, where)
            if isinstance(multiple := mapping.get("multipleOf"), (int, float)):
                multiples.append(multiple)
            todo += ((part, depth + 1) for part in mapping.values())
        elif isinstance(item, list):
            parts = cast(list[Any], item)
            _check(len(parts) <= MOST_ENUM, where, f"at most {MOST_ENUM} values")
            todo += ((part, depth + 1) for part in parts)
        elif isinstance(item, (int, float)):
            _check(abs(item) <= MOST_NUMBER, where, f"no number beyond {MOST_NUMBER}")
    _check_multiples(multiples, where)
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError):
        raise OptionError("not a JSON schema", where=where) from None
    _check(size <= MOST_CHARACTERS, where, f"at most {MOST_CHARACTERS} characters as JSON")
    return cast(Any, schema)


def _check_nested_schemas(grammar: str, where: str) -> None:
    """Check the schemas that a Lark text holds. Raises OptionError."""
    for found in re.finditer(r"%json\b\s*", grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError):
            raise OptionError("malformed: %json has no schema behind it", where=where) from None
        check_cost(schema, where)


def _check_multiples(multiples: list[Any], where: str) -> None:
    """Check that what is to be a multiple of all these can be followed."""
    from fractions import Fraction  # brings decimal with it; few schemas need it

    values = [abs(Fraction(str(value))) for value in multiples if value]
    scale = math.lcm(*(value.denominator for value in values))
    common = math.lcm(*(int(value * scale) for value in values))
    _check(common <= MOST_MULTIPLE, where, f"a least common multipleOf of at most {MOST_MULTIPLE}")


def _check_object(item: Schema, where: str) -> None:
    properties, required = item.get("properties"), item.get("required")
    if isinstance(properties, Mapping):
        needed = len(cast(list[Any], required)) if isinstance(required, list) else 0
        optional = len(cast(Schema, properties)) - needed
        _check(optional <= MOST_OPTIONAL, where, f"at most {MOST_OPTIONAL} optional properties")


def _check(is_right: bool, where: str, expected: str) -> None:
    if not is_right:
        raise OptionError("the schema is too costly", where=where, expected=expected)


def _check_choices(value: Any, where: str) -> list[str]:
    texts = arguments.sequence(where, value, "a list of texts", most=MOST_ENUM)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise OptionError("not choices", where=where, expected="a list of texts that are not empty")
    check_text("".join(texts), MOST_CHARACTERS, where)
    return texts


def _check_parameters(schema: Any, where: str) -> Schema:
    """Return the schema of a tool's parameters, in which every part has the form that is looked at here."""
    schema = check_cost({} if schema is None else schema, where)
    if not isinstance(schema, Mapping):
        raise OptionError("not a JSON schema of an object", where=where, got=schema)
    parameters = cast(Schema, schema)
    if parameters.get("type", "object") != "object":
        raise OptionError("parameters are an object", where=where, got=parameters["type"])
    for name, kind in (("properties", Mapping), ("required", list)):
        if name in parameters and not isinstance(parameters[name], kind):
            raise OptionError(f"malformed: {name}", where=where, got=parameters[name])
    return parameters


def _parameter(rule: str, key: str, schema: Any, root: Schema) -> Iterator[str]:
    """Yield the rules of one parameter."""
    begin, end = _quoted(f"<parameter={key}>\n"), "\n</parameter>\n"
    texts = _texts(schema, root)
    if texts is None:
        definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
        typed = _LENIENT | definitions | dict(cast(Schema, schema))
        yield f"{rule}: {begin} {_json(typed)} {_quoted(end)}"
    elif texts:
        yield f"{rule}: {begin} ({' | '.join(map(_quoted, texts))}) {_quoted(end)}"
    else:
        yield f"{rule}: {begin} {rule}_text"
        yield f"{rule}_text[suffix={_quoted(end)}]: /(?s:.*)/"


def _texts(schema: Any, root: Schema, depth: int = 0) -> Sequence[str] | None:
    """Return the texts that a schema allows, none if any; None if it allows no text."""
    if not isinstance(schema, Mapping) or depth > MOST_DEPTH:
        return ()
    item = cast(Schema, schema)
    if "$ref" in item:
        return _texts(_resolve(item["$ref"], root), root, depth + 1)
    if "const" in item or "enum" in item:
        values: list[Any] = [item["const"]] if "const" in item else item["enum"]
        texts = [value for value in values if isinstance(value, str)] if values else []
        return texts if len(texts) == len(values) else None if not texts else ()
    for name in ("anyOf", "oneOf"):
        if isinstance(item.get(name), list):
            parts = [_texts(part, root, depth + 1) for part in item[name]]
            return None if all(part is None for part in parts) else ()
    kind = item.get("type", "string")
    return () if kind == "string" or (isinstance(kind, list) and "string" in kind) else None


def _resolve(reference: Any, root: Schema) -> Any:
    """Return what a reference within the schema names, an empty schema if nothing."""
    item: Any = root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return {}
    for name in reference[2:].split("/"):
        item = cast(Schema, item).get(name) if isinstance(item, Mapping) else None
    return {} if item is None else item


def _start(body: str, is_thinking: bool) -> list[str]:
    return [f"start: PREFIX? {body}", _PREFIX] if is_thinking else [f"start: {body}"]


def _json(schema: Any) -> str:
    if isinstance(schema, bool):
        return "%json " + ("{}" if schema else '{"not": {}}')
    own: Any = schema.get("x-guidance", {})
    if isinstance(own, Mapping):
        own = {**_SPACES, **cast(Schema, own)}
    return "%json " + json.dumps({**schema, "x-guidance": own})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _grammar(rules: Sequence[str]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark("\n".join(rules))
