"""Talk to a model: the whole conversation lives in one session, and each turn adds only its own tokens.

python examples/chat.py [model.q35c]        (an empty line ends it)
"""

import sys

import q35c
from q35c.demo import demo_artifact

path = sys.argv[1] if len(sys.argv) > 1 else demo_artifact()[0]
with q35c.load(path) as model, model.session() as session:
    rendered = ""  # what the session has read and written so far
    messages: list[dict[str, str]] = []
    while text := input("> "):
        messages.append({"role": "user", "content": text})
        prompt = model.apply_chat_template(messages)
        # A template may rewrite earlier turns (it drops old reasoning, say): then the session begins anew,
        # because a recurrent state cannot be cut back.
        if not prompt.startswith(rendered):
            session.reset()
            rendered = ""
        stream = model.generate(
            prompt[len(rendered) :], session=session, stream=True, max_new_tokens=64, seed=1
        )
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        answer = stream.result
        messages.append({"role": "assistant", "content": answer.text})
        rendered = prompt + model.tokenizer.decode(answer.ids, skip_special_tokens=False)
