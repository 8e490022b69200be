"""The fields that dialects share, read and checked: sampling, tools, structure, who asks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from q35c.errors import OptionError, RequestError
from q35c.runtime.sampling import MAX_SEED
from q35c.runtime.tokenizer import check_stops
from q35c.serve.conversation import Caller
from q35c.serve.fields import Fields
from q35c.serve.request import Structure

MOST_TOKENS = 1 << 31
MOST_CHOICES, MOST_LOGPROBS, MOST_BIASES, MOST_TOOLS = 8, 20, 1024, 256
MOST_MESSAGES, MOST_PARTS = 4096, 4096
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SALT = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TEMPLATE_FLAGS = ("enable_thinking", "preserve_thinking")
_DIGITS = re.compile(r"[0-9]{1,10}")


def read_sampling_options(fields: Fields, vocab: int) -> dict[str, Any]:
    """Return the numbers that shape sampling; what the client leaves open is absent."""
    top_k = fields.integer("top_k", -1, 1 << 31)
    bias = read_bias(fields, vocab)
    options = {
        "temperature": fields.number("temperature", 0.0, 1000.0),
        "top_k": 0 if top_k == -1 else top_k,
        "top_p": fields.number("top_p", 0.0, 1.0),
        "min_p": fields.number("min_p", 0.0, 1.0),
        "repetition_penalty": fields.number("repetition_penalty", 1e-3, 1000.0),
        "presence_penalty": fields.number("presence_penalty", -1000.0, 1000.0),
        "frequency_penalty": fields.number("frequency_penalty", -1000.0, 1000.0),
        "logit_bias": bias or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def read_bias(fields: Fields, vocab: int) -> dict[int, float]:
    """Return what is added to the logits of tokens."""
    nested = fields.nested("logit_bias")
    if nested is None:
        return {}
    if len(nested.document) > MOST_BIASES:
        raise OptionError(
            "too many tokens", where="logit_bias", expected=f"at most {MOST_BIASES} of them"
        )
    made: dict[int, float] = {}
    for name in nested.document:
        if not _DIGITS.fullmatch(name) or int(name) >= vocab:
            raise OptionError(
                "not a token id", where="logit_bias", expected=f"0 to {vocab - 1} as a text"
            )
        bias = nested.number(name, -100.0, 100.0)
        if bias is not None:
            made[int(name)] = bias
    return made


def read_seed(fields: Fields) -> int | None:
    """Return a seed; negative ones, which some clients send, count from the top."""
    seed = fields.integer("seed", -(1 << 63), MAX_SEED)
    return None if seed is None else seed % (MAX_SEED + 1)


def read_stop(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """Return stop strings."""
    value = fields.value(name)
    try:
        return check_stops(value)
    except OptionError as error:
        error.where = fields.path(name)
        raise


def read_caller(fields: Fields, key: int, user: str | None) -> Caller:
    """Return who asks. A user's name may be anything, so its hash stands for it."""
    salt = fields.text("cache_salt", 128)
    if salt is not None and not _SALT.fullmatch(salt):
        raise OptionError(
            "not a salt", where=fields.path("cache_salt"), expected="1 to 128 of A-Z a-z 0-9 _ -"
        )
    priority = fields.integer("priority", -1000, 1000) or 0
    digest = "" if user is None else hashlib.sha256(user.encode()).hexdigest()[:16]
    return Caller(key, digest, salt or "", priority)


def read_template(fields: Fields, effort: str | None) -> dict[str, Any]:
    """Return variables for the template; only those on the list are let through."""
    nested = fields.nested("chat_template_kwargs")
    made: dict[str, Any] = {}
    if effort == "none":
        made["enable_thinking"] = False
    for name in nested.document if nested else ():
        if name not in _TEMPLATE_FLAGS:
            raise OptionError(
                "not a variable that requests may set",
                where="chat_template_kwargs",
                expected=", ".join(_TEMPLATE_FLAGS),
            )
        assert nested is not None
        if (value := nested.flag(name)) is not None:
            made[name] = value
    return made


def check_tool_name(name: Any, where: str) -> str:
    """Return a tool's name. Raises OptionError if it could not stand in a prompt."""
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise OptionError(
            "not a tool's name", where=where, expected="1 to 128 of A-Z a-z 0-9 _ . : -"
        )
    return name


def make_tool(name: str, description: str | None, parameters: Any, where: str) -> dict[str, Any]:
    """Return a function in OpenAI's form, with its keys in the order that templates are trained on."""
    if parameters is not None and not isinstance(parameters, Mapping):
        raise OptionError("not a schema", where=where, expected="a JSON object")
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def read_choice_of_tools(
    value: Any, names: tuple[str, ...], where: str
) -> tuple[bool, tuple[str, ...]]:
    """Return whether tools are offered at all, and those of which one must be called."""
    if value is None or value == "auto":
        return True, ()
    if value == "none":
        return False, ()
    if value in ("required", "any"):
        if not names:
            raise OptionError("no tools are offered", where=where)
        return True, names
    if isinstance(value, str) and value in names:
        return True, (value,)
    raise OptionError(
        "not a choice of tools", where=where, expected="auto, none, required, or a tool's name"
    )


def read_structure(fields: Fields) -> Structure | None:
    """Return what the answer must look like, by `response_format` or `structured_outputs`."""
    wanted = read_response_format(fields.nested("response_format"), "response_format")
    outputs = fields.nested("structured_outputs")
    if outputs is None:
        return wanted
    found = _read_outputs(outputs)
    if len(found) > 1 or (found and wanted):
        raise OptionError("more than one structure", where="structured_outputs", expected="one")
    return found[0] if found else wanted


def read_response_format(fields: Fields | None, where: str) -> Structure | None:
    """Return the structure of OpenAI's field; the schema may lie in it or one level below."""
    if fields is None:
        return None
    kind = fields.require("type", fields.choice("type", ("text", "json_object", "json_schema")))
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure("object", None, where)
    holder = fields if fields.value("schema") is not None else fields.nested("json_schema")
    holder = fields.require("json_schema", holder)
    holder.text("name", 256)
    holder.flag("strict")
    schema = holder.value("schema")
    if not isinstance(schema, (dict, bool)):
        raise OptionError(
            "the schema is missing", where=holder.path("schema"), expected="a JSON schema"
        )
    return Structure("schema", schema, where)


def _read_outputs(fields: Fields) -> list[Structure]:
    found: list[Structure] = []
    where = "structured_outputs"
    if (schema := fields.value("json")) is not None:
        if not isinstance(schema, (dict, bool)):
            raise OptionError("not a schema", where=f"{where}.json", expected="a JSON schema")
        found.append(Structure("schema", schema, f"{where}.json"))
    if (pattern := fields.text("regex", 10_000, 1)) is not None:
        found.append(Structure("regex", pattern, f"{where}.regex"))
    if (texts := fields.items("choice", 10_000)) is not None:
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise OptionError("not a choice", where=f"{where}.choice", expected="a list of texts")
        found.append(Structure("choice", tuple(texts), f"{where}.choice"))
    if (grammar := fields.text("grammar", 64 << 10, 1)) is not None:
        found.append(Structure("grammar", grammar, f"{where}.grammar"))
    return found


def check_model(name: Any, names: tuple[str, ...], any_name: str) -> str:
    """Return the model's name, the first of ours if none is asked for. Raises RequestError if it is none of ours."""
    if name is None:
        return next((own for own in names if own != any_name), "model")
    if not isinstance(name, str) or not 1 <= len(name) <= 256:
        raise OptionError(
            "value is not allowed", where="model", expected="a text of 1 to 256 characters"
        )
    if name not in names and any_name not in names:
        raise RequestError(
            "no such model",
            status=404,
            where="model",
            code="model_not_found",
            hint="GET /v1/models lists them",
        )
    return name
