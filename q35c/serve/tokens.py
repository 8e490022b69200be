"""Text to token ids and back."""

from __future__ import annotations

from starlette.responses import Response

from q35c import arguments
from q35c.serve.conversation import Ask, Sampling, check_weight
from q35c.serve.desk import Desk
from q35c.serve.incoming import Incoming
from q35c.serve.json_response import json_response
from q35c.serve.openai import read_messages, read_tools
from q35c.serve.options import read_template


async def answer_tokenize(desk: Desk, incoming: Incoming) -> Response:
    """Answer with the ids of a `prompt`, or of the prompt that `messages` become."""
    fields = await incoming.fields()
    desk.check_model(fields)
    if fields.value("messages") is not None:
        ask = Ask(
            read_messages(fields),
            Sampling(),
            read_tools(fields),
            template=read_template(fields, None),
        )
        ids = await desk.encode(ask)
    else:
        prompt = fields.require("prompt", fields.text("prompt"))
        check_weight(desk.model, prompt, "prompt")
        ids = await desk.run(lambda: desk.model.tokenizer.encode(prompt))
    answer = {"tokens": ids, "count": len(ids), "max_model_len": desk.model.context}
    return json_response(answer)


async def answer_detokenize(desk: Desk, incoming: Incoming) -> Response:
    """Answer with the text of `tokens`, control tokens included."""
    fields = await incoming.fields()
    desk.check_model(fields)
    listed = fields.require("tokens", fields.items("tokens", 1 << 20))
    last = desk.model.vocab_size - 1
    for index, token in enumerate(listed):
        if type(token) is not int or not 0 <= token <= last:
            arguments.integer(f"tokens[{index}]", token, 0, last)
    text = await desk.run(lambda: desk.model.tokenizer.decode(listed, skip_special_tokens=False))
    return json_response({"prompt": text})
